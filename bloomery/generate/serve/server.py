"""The process: listening, and ending without dropping what runs."""

import ipaddress
import socket
from types import FrameType

import uvicorn

from bloomery.errors import ConfigError
from bloomery.generate.serve.app import Service

_CLOSING_SECONDS = 2  # for connections, once their answers are written


class _Server(uvicorn.Server):
    """Hears SIGTERM and SIGINT: the first drains, the second ends at once."""

    def __init__(self, service: Service, config: uvicorn.Config):
        super().__init__(config)
        self._service, self._asked = service, False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._asked:
            self.should_exit = self.force_exit = True
        self._asked = True
        self._service.drain()

    async def on_tick(self, counter: int) -> bool:
        self.should_exit = self.should_exit or self._service.drained()
        return await super().on_tick(counter)


def serve(service: Service, listening: socket.socket) -> None:
    """Answer on an open socket until SIGTERM or SIGINT, then drain and return."""
    config = uvicorn.Config(
        service.app, log_level="warning", access_log=False, lifespan="on", timeout_graceful_shutdown=_CLOSING_SECONDS,
        server_header=False,
    )  # fmt: skip
    _Server(service, config).run([listening])


def listen(host: str, port: int, protected: bool) -> socket.socket:
    """An open socket; port 0 takes a free one. Refuses other machines' calls unless `protected`."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise ConfigError(f"--host: {host}: {error.strerror}; give an address of this machine") from None
    if not (protected or ipaddress.ip_address(address[0]).is_loopback):
        raise ConfigError(
            f"--host: {host} is open to other machines and there is no API key; set BLOOMERY_API_KEY or --api-key, or "
            "say --unprotected"
        )
    opened = socket.socket(family, socket.SOCK_STREAM)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind(address)
    except OSError as error:
        opened.close()
        raise ConfigError(f"--port: {host}:{port}: {error.strerror}; choose another port") from None
    return opened


def address(listening: socket.socket) -> str:
    """The URL that clients are given as their base."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
