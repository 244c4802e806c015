"""The server of the page: missing packages and ports."""

import sys

import pytest

from taming_dist.app.server import address, listen, quiet
from taming_dist.errors import UserError


def test_without_gradio_there_is_one_line_that_says_how_to_have_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("GRADIO_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY", "GRADIO_TEMP_DIR"):
        monkeypatch.setenv(name, "")
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"needs Gradio: pip install 'taming-dist\[app\]'"):
        quiet("scratch")


def test_a_taken_port_and_an_address_that_is_none_are_named() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert address(taken) == f"http://127.0.0.1:{port}"
        with pytest.raises(UserError, match=f"port: {port} on 127.0.0.1 cannot be used"):
            listen("127.0.0.1", port)
    with pytest.raises(UserError, match="host: no such host"):
        listen("no such host", 0)
