"""Replicas of the policy server with Ray Serve: a GPU each, on one machine or on all of a Ray cluster.

    pip install '.[serve,ray]' ./serve/client
    python serve/deploy/ray_serve.py --replicas 4 --gpus 1 --config serve/server.yaml device=cuda

The settings are those of `mmseq serve`; TLS belongs before Ray's proxy. The proxy gives each websocket to the replica
with the least to do, where it stays. An operator's hold on any replica reaches all within a fifth of a second, but
what it answers counts the sessions of one. Runs until SIGINT or SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
import threading
from typing import Any

import ray
from ray import serve

from mmseq.config import load_config
from mmseq.errors import ConfigError, MMSeqError, ServeError
from mmseq.serving.holds import Holds
from mmseq.serving.launch import ServeSettings, loader, server_config
from mmseq.serving.net.app import build_app
from mmseq.serving.service import Service

SHARE_S = 0.1  # between two looks at the other replicas' hold

log = logging.getLogger("mmseq.serving")


@ray.remote(num_cpus=0)
class Hold:
    """The operators' holds of all replicas, by id. hold_file: on the machine where this runs."""

    def __init__(self, hold_file: str | None = None):
        self.holds = Holds(hold_file)

    def share(self, begun: dict[str, str], ended: list[str]) -> tuple[dict[str, str], str | None]:
        """All of them, after what changed on one replica; and why the file does not have them."""
        for id, reason in begun.items():
            self.holds.begin(reason, id)
        for id in ended:
            if id in self.holds.reasons:
                self.holds.end(id)
        return self.holds.reasons, self.holds.problem


class Replica:
    """One model, and the robots whose connections it holds."""

    async def __init__(self, settings: ServeSettings, hold: Any):
        self.settings, self.hold = settings, hold
        self.config = server_config(settings)
        self.service = Service(
            await asyncio.to_thread(loader(settings)),
            rules=settings.observation,
            gate=settings.gate,
            scheduling=settings.scheduling,
            chunking=settings.chunking,
        )
        self.service.start()
        while not self.service.warm:
            if self.service.broken:
                raise ServeError(self.service.cold)
            await asyncio.sleep(0.05)
        self.known: dict[str, str] = {}  # holds, by all
        await self._exchange()  # what was in force before this start is so with the first answer
        self.sharing = asyncio.create_task(self._share())

    def __serve_build_asgi_app__(self) -> Any:  # called by Ray once the replica is made
        return build_app(
            self.service,
            token=self.config.token,
            limits=self.config.limits,
            stuck_s=self.config.stuck_s,
            max_connections=self.config.max_connections,
        )

    def check_health(self) -> None:
        """Raises: RuntimeError, upon which Ray starts another replica in this one's place."""
        if self.sharing.done():
            raise RuntimeError("holds are not shared any more")
        if self.service.scheduler.busy_s > self.settings.stuck_s:
            raise RuntimeError(self.service.not_ready(self.settings.stuck_s))

    async def _share(self) -> None:
        while True:
            await asyncio.sleep(SHARE_S)
            await self._exchange()

    async def _exchange(self) -> None:
        """Tell the others what operators said here, and do what they were told."""
        holds = self.service.holds
        mine, known = dict(holds.reasons), self.known
        begun = {id: reason for id, reason in mine.items() if known.get(id) != reason}
        self.known, problem = await self.hold.share.remote(begun, [id for id in known if id not in mine])
        now = holds.reasons  # what changed here meanwhile is told the next time
        for id, reason in self.known.items():
            if mine.get(id) != reason and now.get(id) == mine.get(id):
                self.service.hold(reason, id)
        for id in mine:
            if id not in self.known and id in now:
                self.service.release(id)
        holds.problem = problem


def start(settings: ServeSettings, *, replicas: int, gpus: float, robots: int) -> None:
    """Start the replicas and return when all are ready. robots: connections that a replica takes at most.

    Raises: ConfigError, ServeError for settings that cannot be served.
    """
    config = server_config(settings)
    loader(settings)  # mistakes are told before anything is started
    if config.tls_cert is not None:
        raise ConfigError("tls_cert is set, and Ray's proxy has no TLS", fix="put a proxy with TLS before it")
    serve.start(http_options={"host": config.host, "port": config.port})
    deployment = serve.deployment(serve.ingress()(Replica)).options(
        name="mmseq",
        num_replicas=replicas,
        max_ongoing_requests=robots,
        graceful_shutdown_timeout_s=config.grace_s,
        ray_actor_options={"num_cpus": 1, "num_gpus": gpus},
    )
    serve.run(deployment.bind(settings, Hold.remote(settings.hold_file)), name="mmseq", route_prefix="/")


def main() -> int:
    parser = argparse.ArgumentParser(description="mmseq serve, in replicas on Ray")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--gpus", type=float, default=0, help="of each replica")
    parser.add_argument("--robots", type=int, default=64, help="connections of each replica, at most")
    parser.add_argument("--config", help="the settings of mmseq serve")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    try:
        settings = load_config(ServeSettings, args.config, args.overrides)
        start(settings, replicas=args.replicas, gpus=args.gpus, robots=args.robots)
    except MMSeqError as error:
        print(f"mmseq: error: {error}", file=sys.stderr)
        return 1
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):  # after Ray, which sets its own
        signal.signal(number, lambda *_: ended.set())
    print(f"{args.replicas} replicas at http://{settings.host}:{settings.port}", flush=True)
    ended.wait()
    serve.shutdown()
    ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
