"""Serve a policy to robots on one port: openpi's websocket protocol and HTTP.

from mmseq.serving import ReplayPolicy, ServerConfig, serve
serve(ReplayPolicy(episode, embodiment), ServerConfig(port=8000))     # until SIGTERM or SIGINT

with Server(policy, ServerConfig(port=0)) as server:                  # in tests: any free port
    print(server.port)
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field

from mmseq.errors import MMSeqError, ServeError, require
from mmseq.serving.chunking import Chunking
from mmseq.serving.codec import Limits
from mmseq.serving.errors import RequestError
from mmseq.serving.net.app import build_app
from mmseq.serving.net.notify import Notifier
from mmseq.serving.net.sockets import check_tls, is_loopback, listen, raise_file_limit
from mmseq.serving.observation import ObservationRules
from mmseq.serving.policy import Policy, prepare
from mmseq.serving.safety import GateConfig
from mmseq.serving.scheduler import SchedulerConfig
from mmseq.serving.service import Service

log = logging.getLogger("mmseq.serving")

MAX_GRACE_S = 86_400
MAX_TOKEN = 4096  # characters: a line of a websocket's head has 8192 at most


@dataclass(kw_only=True)
class Listening:
    """Where a server listens, and how it treats those who connect: settings of `mmseq serve` too."""

    host: str = "127.0.0.1"  # another address needs a token
    port: int = 8000  # 0 takes a free one
    insecure_public: bool = False  # other machines may connect without a token
    tls_cert: str | None = None  # PEM file; with it and its key the addresses are https and wss
    tls_key: str | None = None  # its private key
    max_connections: int = 256  # of robots; one more is answered `busy`, and HTTP is not counted
    limits: Limits = field(default_factory=Limits)
    observation: ObservationRules = field(default_factory=ObservationRules)
    gate: GateConfig = field(default_factory=GateConfig)
    scheduling: SchedulerConfig = field(default_factory=SchedulerConfig)
    chunking: Chunking = field(default_factory=Chunking)
    stuck_s: float = 30.0  # a model call that takes longer makes `/readyz` say 503
    grace_s: float = 10.0  # time that requests under way get to finish when the server stops
    hold_file: str | None = None  # where operators' holds are kept; default: they end with the process


@dataclass(kw_only=True)
class ServerConfig(Listening):
    """Where and how to serve."""

    token: str | None = field(default=None, repr=False)  # clients send it as `Authorization: Api-Key TOKEN`

    def __post_init__(self):
        if self.token is not None and not re.fullmatch(r"[!-~]+", self.token):
            raise ServeError("the token must be printable ASCII without spaces or line breaks, and not empty")
        if self.token is not None and len(self.token) > MAX_TOKEN:
            raise ServeError(f"the token has {len(self.token)} characters, at most {MAX_TOKEN} are read")
        if not (math.isfinite(self.stuck_s) and self.stuck_s > 0):
            raise ServeError(f"stuck_s is {self.stuck_s}", fix="use a number of seconds above 0")
        if not 0 <= self.grace_s <= MAX_GRACE_S:
            raise ServeError(f"grace_s is {self.grace_s}", fix=f"use a number of seconds from 0 to {MAX_GRACE_S}")
        if self.max_connections < 1:
            raise ServeError(f"max_connections is {self.max_connections}", fix="use 1 or more")
        if not 0 <= self.port <= 65535:
            raise ServeError(f"port is {self.port}, outside 0..65535")
        if self.token is None and not self.insecure_public and not is_loopback(self.host):
            raise ServeError(
                f"host {self.host!r} is reachable from other machines and there is no token",
                fix="set a token, or serve on 127.0.0.1",
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ServeError("tls_cert and tls_key belong together", fix="give both files, or neither")


class Server:
    """A server in a background thread, with the model in a second one.

    load: makes what is served once more from where it came from, for a reload. ended: whether all its threads have,
    once it was stopped: it waits neither for a long call of the model nor for loading.
    """

    def __init__(self, policy: Policy, config: ServerConfig | None = None, *, load: Callable[[], Policy] | None = None):
        self.config = config or ServerConfig()
        self.service = Service(
            policy,
            rules=self.config.observation,
            gate=self.config.gate,
            scheduling=self.config.scheduling,
            chunking=self.config.chunking,
            hold_file=self.config.hold_file,
        )
        self._load = load
        self._loading: Future[None] = Future()  # of the last reload
        self._loading.set_result(None)
        self._loader: threading.Thread | None = None
        self.ended = True
        self.port = self.config.port
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> Server:
        """Returns when requests are accepted. Raises: ServeError when the port cannot be had."""
        if self._thread is not None:
            raise ServeError("the server has been started already", fix="make a new Server")
        uvicorn = require("uvicorn", "serve")
        from mmseq.serving.net.http import HttpProtocol
        from mmseq.serving.net.websocket import WebSocketProtocol

        app = build_app(
            self.service,
            token=self.config.token,
            limits=self.config.limits,
            stuck_s=self.config.stuck_s,
            max_connections=self.config.max_connections,
            reload=None if self._load is None else self.reload,
        )
        if self.config.tls_cert is not None and self.config.tls_key is not None:
            check_tls(self.config.tls_cert, self.config.tls_key)
        listener = listen(self.config.host, self.config.port)
        self.port = listener.getsockname()[1]
        self._uvicorn = uvicorn.Server(
            uvicorn.Config(
                app,
                log_config=None,
                log_level="warning",
                access_log=False,
                lifespan="off",
                http=HttpProtocol,
                ws=WebSocketProtocol,
                ws_max_size=self.config.limits.max_message_bytes,
                ws_per_message_deflate=False,  # images do not shrink, and latency grows
                timeout_graceful_shutdown=max(1, round(self.config.grace_s)),
                server_header=False,
                proxy_headers=False,  # what a peer calls itself is not where it is
                ssl_certfile=self.config.tls_cert,
                ssl_keyfile=self.config.tls_key,
            )
        )
        ready = threading.Event()
        self.service.start()
        self._thread = threading.Thread(target=self._run, args=(listener, ready), name="mmseq-server", daemon=True)
        self._thread.start()
        ready.wait()
        if not self._uvicorn.started:
            self.stop()
            raise ServeError(f"the server on port {self.port} did not start", fix="see the log")
        log.info("serving %s on %s", self.service.contract.name, self.url)
        return self

    def reload(self) -> Future[None]:
        """Begin to load what is served once more, beside what serves meanwhile; it serves from the next request on.

        Loading has a thread of its own, for which neither requests nor the end of the server wait. Raises: ServeError
        when there is nothing to load, RequestError `busy` while it is being loaded. The result raises ServeError when
        it has another contract, RequestError `stopping` when the server stops first, or what loading raises.
        """
        if self._load is None:
            raise ServeError("this server has nothing to load again", fix="start it with a checkpoint")
        if not getattr(self.service.policy, "reloadable", True):
            raise ServeError(
                "a compiled policy is not loaded again beside itself: its graphs belong to one thread",
                fix="start another server and move the robots there",
            )
        if self.service.stopping:
            raise RequestError("stopping", "the server is stopping")
        if not self._loading.done():
            raise RequestError("busy", "what is served is being loaded already", fix="ask again when that is done")
        self._loading = loading = Future()
        loading.set_running_or_notify_cancel()  # it goes on when nobody waits for it
        self._loader = threading.Thread(
            target=self._reload, args=(self._load, loading), name="mmseq-reload", daemon=True
        )
        self._loader.start()
        return loading

    def _reload(self, load: Callable[[], Policy], loading: Future[None]) -> None:
        try:
            policy = load()
            prepare(policy)
            if self.service.stopping:
                return
            self.service.replace(policy)
            with suppress(InvalidStateError):  # the server stops meanwhile
                loading.set_result(None)
        except BaseException as error:
            with suppress(InvalidStateError):
                loading.set_exception(error)

    @property
    def url(self) -> str:
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        return f"{'https' if self.config.tls_cert else 'http'}://{host}:{self.port}"

    @property
    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def not_ready(self) -> str | None:
        """Why no request should be sent here; None when it is ready."""
        return self.service.not_ready(self.config.stuck_s)

    def healthy(self, timeout_s: float = 1.0) -> bool:
        """Whether its network thread runs and no model call takes longer than `stuck_s`; else it wants a restart."""
        if not self.alive or self._loop is None or self.service.scheduler.busy_s > self.config.stuck_s:
            return False
        answered = threading.Event()
        try:
            self._loop.call_soon_threadsafe(answered.set)
        except RuntimeError:  # it has just ended
            return False
        return answered.wait(timeout_s)

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
        if not self._loading.done():  # and no other begins any more
            with suppress(InvalidStateError):  # it has just ended
                self._loading.set_exception(RequestError("stopping", "the server stops before all is loaded"))
        self._uvicorn.should_exit = True
        self._thread.join(self.config.grace_s + 5)
        self.service.holds.close()
        idle = self.service.scheduler.stop(1.0)
        if not idle:
            log.warning("the policy is still busy; its thread is left behind")
        self.ended = idle and not self.alive and not (self._loader is not None and self._loader.is_alive())

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()


def _tell(loading: Future[None]) -> None:
    """Log why nothing was reloaded."""
    error = loading.exception()
    if isinstance(error, MMSeqError):
        log.error("nothing was reloaded: %s", error)
    elif error is not None:  # such as no memory for two models: the one that serves goes on
        log.error("nothing was reloaded", exc_info=error)


def serve(
    policy: Policy,
    config: ServerConfig | None = None,
    *,
    load: Callable[[], Policy] | None = None,
    on_ready: Callable[[Server], None] | None = None,
) -> bool:
    """Serve until SIGTERM or SIGINT, then stop cleanly and return. Call from the main thread. systemd is told.

    Returns whether all threads have ended. One that is left inside the model or loading is a daemon, and Python
    aborts when it exits meanwhile: leave with `os._exit`.
    Raises: ServeError when the policy fails to warm up; what started this process may start it again.

    policy: a caller that keeps no name of it lets it go once another has taken its place. load: what SIGHUP and
    `POST /v1/reload` serve from then on. on_ready: called once requests are accepted, e.g. to print the address.
    """
    server, woken = Server(policy, config, load=load), threading.Event()
    del policy  # a reload frees it
    asked: set[int] = set()

    def note(number: int, _: object) -> None:
        asked.add(number)
        woken.set()

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    interval = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)  # a model in Python must not keep the sockets waiting for 5 ms
    gc.collect()
    raise_file_limit()
    gc.freeze()  # what is loaded stays: no pause to look through a million objects of torch
    try:
        with server, Notifier(server.not_ready, server.healthy):
            if on_ready is not None:
                on_ready(server)
            while not asked & {signal.SIGTERM, signal.SIGINT}:
                woken.wait(1.0)
                woken.clear()
                if not server.alive:
                    raise ServeError("the server ended by itself", fix="see the log")
                if server.service.broken:
                    raise ServeError(server.service.cold, fix="see the log, mend it and start again")
                if signal.SIGHUP in asked:
                    asked.discard(signal.SIGHUP)
                    try:
                        server.reload().add_done_callback(_tell)
                    except MMSeqError as error:
                        log.error("nothing was reloaded: %s", error)
    finally:
        sys.setswitchinterval(interval)
        gc.unfreeze()
        for number, handler in previous.items():
            signal.signal(number, handler)
    return server.ended
