"""Serve a policy to robots on one port: openpi's websocket protocol and HTTP.

from mmseq.serving import ReplayPolicy, ServerConfig, serve
serve(ReplayPolicy(episode, embodiment), ServerConfig(port=8000))     # until SIGTERM or SIGINT

with Server(policy, ServerConfig(port=0)) as server:                  # in tests: any free port
    print(server.port)
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from mmseq.errors import ServeError, require
from mmseq.serving.app import build_app
from mmseq.serving.codec import Limits
from mmseq.serving.observation import ObservationRules
from mmseq.serving.policy import Policy
from mmseq.serving.safety import GateConfig
from mmseq.serving.service import Service

log = logging.getLogger("mmseq.serving")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Where and how to serve.

    port: 0 takes a free one. token: clients send it as `Authorization: Api-Key TOKEN`; a host other than
    loopback needs one. max_waiting: requests that may wait for the model. grace_s: time that requests under
    way get to finish when the server stops.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = field(default=None, repr=False)
    limits: Limits = field(default_factory=Limits)
    observation: ObservationRules = field(default_factory=ObservationRules)
    gate: GateConfig = field(default_factory=GateConfig)
    max_waiting: int = 32
    grace_s: float = 10.0

    def __post_init__(self):
        if self.token is not None and (not self.token or not self.token.isascii() or self.token != self.token.strip()):
            raise ServeError("the token must be ASCII text without spaces around it, and not empty")
        if not 0 <= self.port <= 65535:
            raise ServeError(f"port is {self.port}, outside 0..65535")
        if self.token is None and not is_loopback(self.host):
            raise ServeError(
                f"host {self.host!r} is reachable from other machines and there is no token",
                fix="set a token, or serve on 127.0.0.1",
            )


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises: ServeError that names host and port and the way out."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ServeError(f"cannot serve on host {host!r}: {error.strerror or error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ServeError(
                f"port {port} on {host} is in use", fix="stop the process that holds it, or choose another port"
            ) from error
        if error.errno == errno.EACCES:
            raise ServeError(f"port {port} needs privileges", fix="choose a port from 1024 on") from error
        raise ServeError(f"cannot serve on {host}:{port}: {error.strerror}") from error
    return listener


class Server:
    """A server in a background thread, with the model in a second one."""

    def __init__(self, policy: Policy, config: ServerConfig | None = None):
        self.config = config or ServerConfig()
        self.service = Service(
            policy, rules=self.config.observation, gate=self.config.gate, max_waiting=self.config.max_waiting
        )
        self.port = self.config.port
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> Server:
        """Returns when requests are accepted. Raises: ServeError when the port cannot be had."""
        if self._thread is not None:
            raise ServeError("the server has been started already", fix="make a new Server")
        uvicorn = require("uvicorn", "serve")
        app = build_app(self.service, token=self.config.token, limits=self.config.limits)
        listener = listen(self.config.host, self.config.port)
        self.port = listener.getsockname()[1]
        self._uvicorn = uvicorn.Server(
            uvicorn.Config(
                app,
                log_config=None,
                log_level="warning",
                access_log=False,
                lifespan="off",
                ws="auto",
                ws_max_size=self.config.limits.max_message_bytes,
                ws_per_message_deflate=False,  # images do not shrink, and latency grows
                timeout_graceful_shutdown=max(1, round(self.config.grace_s)),
                server_header=False,
            )
        )
        ready = threading.Event()
        self.service.worker.start()
        self._thread = threading.Thread(target=self._run, args=(listener, ready), name="mmseq-server", daemon=True)
        self._thread.start()
        ready.wait()
        if not self._uvicorn.started:
            self.stop()
            raise ServeError(f"the server on port {self.port} did not start", fix="see the log")
        log.info("serving %s on %s", self.service.contract.name, self.url)
        return self

    @property
    def url(self) -> str:
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        return f"http://{host}:{self.port}"

    @property
    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _run(self, listener: socket.socket, ready: threading.Event) -> None:
        async def main() -> None:
            self._loop = asyncio.get_running_loop()
            serving = asyncio.create_task(self._uvicorn.serve(sockets=[listener]))
            while not self._uvicorn.started and not serving.done():
                await asyncio.sleep(0.002)
            ready.set()
            await serving

        try:
            asyncio.run(main())
        except BaseException:
            log.exception("the server ended")
        finally:
            listener.close()
            ready.set()

    def stop(self) -> None:
        """Answer what is under way, at most `grace_s`, then close every connection. May be called twice."""
        if self._thread is None:
            return
        if self._thread.is_alive() and self._loop is not None:
            try:
                drained = asyncio.run_coroutine_threadsafe(self.service.drain(self.config.grace_s), self._loop)
                drained.result(self.config.grace_s + 1)
            except (RuntimeError, TimeoutError):
                log.warning("requests under way were cut off")
        self._uvicorn.should_exit = True
        self._thread.join(self.config.grace_s + 5)
        if not self.service.worker.stop(1.0):
            log.warning("the policy is still busy; its thread is left behind")

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()


def serve(
    policy: Policy, config: ServerConfig | None = None, *, on_ready: Callable[[Server], None] | None = None
) -> None:
    """Serve until SIGTERM or SIGINT, then stop cleanly and return. Call from the main thread.

    on_ready: called once requests are accepted, e.g. to print the address.
    """
    server, asked = Server(policy, config), threading.Event()
    previous = {number: signal.signal(number, lambda *_: asked.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with server:
            if on_ready is not None:
                on_ready(server)
            while not asked.wait(1.0):
                if not server.alive:
                    raise ServeError("the server ended by itself", fix="see the log")
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
