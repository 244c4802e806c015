"""Whose the processor is, from what Linux tells of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from taming_dist.kernels import processor


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    processor.mkl_is_slow.cache_clear()
    yield
    processor.mkl_is_slow.cache_clear()


@pytest.mark.parametrize(
    ("told", "slow"),
    [
        ("vendor_id\t: GenuineIntel\nmodel name\t: Xeon\n\nvendor_id\t: GenuineIntel\n", False),
        ("vendor_id\t: AuthenticAMD\nmodel name\t: EPYC\n", True),
        ("CPU implementer\t: 0x41\n", False),  # no x86: MKL is not there
        (None, False),
    ],
)
def test_mkl_is_slow_on_x86_processors_that_are_not_intels(
    told: str | None, slow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpuinfo"
    if told is not None:
        file.write_text(told)
    monkeypatch.setattr(processor, "CPU_INFO", file)
    assert processor.mkl_is_slow() is slow
