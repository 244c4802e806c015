"""The server of the page: on one machine's own address unless it is told otherwise, and such that
the page asks nobody else for anything.

Importing this module imports Gradio, whose telemetry is off from the start (see `quiet`).
"""

import os
import socket
from ipaddress import ip_address
from typing import Any

from taming_dist.errors import UserError

MISSING = "the page needs Gradio: pip install 'taming-dist[app]'"
LOCAL = ("127.0.0.1", "localhost", "[::1]")
# Scripts of Gradio evaluate texts, and its workers are blobs.
POLICY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; object-src 'none'; "
    "frame-ancestors 'none'; form-action 'self'"
)


def quiet(scratch: str) -> None:
    """Have Gradio, before it is imported, tell nobody anything and keep uploads in a folder.

    Raises:
        UserError: it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["GRADIO_TEMP_DIR"] = scratch
    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "gradio":
            raise
        raise UserError(MISSING) from error


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens there.

    Raises:
        UserError: the port is taken, or the address is not one of this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    except OSError as error:
        raise UserError(f"host: {host} is no address ({error.strerror}): give host=...") from error
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
        found.listen()
    except PermissionError as error:
        found.close()
        raise UserError(f"port: {port} is for the system's own: give one from 1024 on") from error
    except OSError as error:
        found.close()
        raise UserError(
            f"port: {port} on {host} cannot be used ({error.strerror}): give another, or 0 for any "
            f"that is free"
        ) from error
    return found


def address(listening: socket.socket) -> str:
    """Where a browser finds it."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Guarded:
    """An ASGI application whose answers forbid the browser to load anything from elsewhere."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                more = ((b"content-security-policy", POLICY.encode()),)
                message = {**message, "headers": [*message.get("headers", ()), *more]}
            await send(message)

        await self.app(scope, receive, sending)


def serve(blocks: Any, listening: socket.socket, upload_mb: int, **looks: Any) -> None:
    """Serve a page until the process is asked to stop. On an address that only this machine has, it
    answers to that machine's names alone, so that no other site can pose as it.

    `looks`: the theme and style that `gradio.mount_gradio_app` takes.
    """
    import gradio
    import uvicorn
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    host, port = listening.getsockname()[:2]
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    if ip_address(host).is_loopback:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(LOCAL))
    app.add_middleware(Guarded)
    gradio.mount_gradio_app(
        app,
        blocks,
        path="/",
        server_name=host,
        server_port=port,
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=upload_mb * 2**20,
        ssr_mode=False,
        mcp_server=False,
        **looks,
    )
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[listening])
