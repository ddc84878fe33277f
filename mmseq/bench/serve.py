"""Serving: round trips without a model, fairness, saturation and health, against openpi's own server, in turns.

    MMSEQ_OPENPI=/path/to/openpi mmseq bench serve --json serve.json

Both servers run in processes of their own, with the same policy, on loopback; the clients are the same and send the
same bytes. One client for the round trip, with a policy that does nothing; then `clients` of them as fast as they can,
with a model that takes `model_ms` for one request or a batch. Every answer is compared with what its client sent.
"""

from __future__ import annotations

import asyncio
import http.client
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmseq.bench.rows import BenchRow, Spread, require_positive, row
from mmseq.bench.servers import HORIZON, openpi_name, robot
from mmseq.errors import ConfigError, ServeError

SIDES = ("ours", "openpi")


@dataclass(kw_only=True)
class Config:
    """What `mmseq bench serve` measures."""

    cameras: int = 3  # images of an observation
    image: int = 224  # pixels along a side of each
    calls: int = 500  # round trips of a turn
    seconds: float = 20.0  # of round trips, all turns and both sides together
    clients: int = 32  # at once, of a turn under load
    load_s: float = 6.0  # seconds of a turn under load
    load_turns: int = 3  # turns under load
    model_ms: float = 5.0  # what the model takes for one request or a batch, under load

    def check(self) -> None:
        """Raises: ConfigError naming the option."""
        require_positive(self, "cameras", "image", "calls", "clients", "load_s", "load_turns")
        for name in ("seconds", "model_ms"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")


def bench(config: Config) -> tuple[list[BenchRow], list[str]]:
    """Rows, and what else there is to say. Raises: ConfigError, ServeError when a server does not start."""
    config.check()
    with servers(config, 0.0) as ports:
        trips = round_trips(config, ports)
    name = openpi_name()
    rows = [
        row(f"serve.round_trip.p{q}", "ms", trips["ours", q], name, trips["openpi", q], better="lower")
        for q in (50, 99)
    ]
    with servers(config, config.model_ms) as ports:
        loads = {side: [] for side in SIDES}
        for turn in range(config.load_turns):
            for side in SIDES if turn % 2 == 0 else reversed(SIDES):
                loads[side].append(load(config, ports[side]))
    for key, unit, better in (
        ("answers_per_s", "answers/s", "higher"),
        ("fairness", "share", "higher"),
        ("p99_ms", "ms", "lower"),
        ("health_p99_ms", "ms", "lower"),
        ("crossed", "answers", "lower"),
    ):
        here, there = (Spread(tuple(one[key] for one in loads[side])) for side in SIDES)
        rows.append(row(f"serve.load.{key}", unit, here, name, there, better=better))
    notes = [
        f"one client, {config.cameras} images of {config.image} x {config.image}, {len(message(config, 0)):,} bytes: "
        f"each value is the median over turns of {config.calls} round trips; all of them together, p99 "
        f"{trips['ours', 'all']:.2f} ms here, {trips['openpi', 'all']:.2f} ms there",
        f"{config.clients} clients, a model of {config.model_ms:g} ms for one request or a batch: fairness is the "
        "fewest answers of a client over the mean; health is GET /healthz on a new connection, meanwhile",
    ]
    return rows, notes


@contextmanager
def servers(config: Config, model_ms: float) -> Iterator[dict[str, int]]:
    """The port of each side, once it answers."""
    ports = {side: free_port() for side in SIDES}
    processes = []
    try:
        for side in SIDES:
            line = [sys.executable, "-m", "mmseq.bench.servers", side, str(ports[side])]
            line += [str(config.cameras), str(config.image), str(model_ms)]
            processes.append(subprocess.Popen(line, stderr=subprocess.PIPE, text=True))
        for side, process in zip(SIDES, processes):
            until = time.monotonic() + 60
            while health_ms(ports[side]) is None:
                if process.poll() is not None or time.monotonic() > until:
                    process.kill()
                    said = (process.communicate()[1] or "").strip().splitlines()
                    raise ServeError(f"the server of {side} did not start: {said[-1] if said else 'it said nothing'}")
                time.sleep(0.05)
        yield ports
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def message(config: Config, seed: int) -> bytes:
    from mmseq.serving import codec, example_observation

    return codec.pack(example_observation(robot(config.cameras, config.image), seed=seed))


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def health_ms(port: int) -> float | None:
    """How long `GET /healthz` takes on a new connection; None when there is no answer."""
    begun = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/healthz")
        good = connection.getresponse().status == 200
        return 1000 * (time.perf_counter() - begun) if good else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def round_trips(config: Config, ports: dict[str, int]) -> dict[Any, Any]:
    """Of each side, the Spread over turns of the median (50) and p99 (99) in ms, and p99 of all together ("all")."""
    from websockets.sync.client import connect

    data = message(config, 0)
    turns: dict[str, list[np.ndarray]] = {side: [] for side in SIDES}
    sockets = {}
    try:
        for side, port in ports.items():
            options: dict[str, Any] = {"compression": None, "max_size": None, "proxy": None}
            sockets[side] = connect(f"ws://127.0.0.1:{port}", **options)
            sockets[side].recv()
        started, turn = time.perf_counter(), 0
        while turn < 4 or time.perf_counter() - started < config.seconds:
            for side in SIDES if turn % 2 == 0 else reversed(SIDES):
                socket, taken = sockets[side], []
                for _ in range(config.calls + 5):
                    begun = time.perf_counter()
                    socket.send(data)
                    reply = socket.recv()
                    taken.append(1000 * (time.perf_counter() - begun))
                    if isinstance(reply, str):
                        raise ServeError(f"{side} answered {reply[:200]}")
                turns[side].append(np.array(taken[5:]))
            turn += 1
    finally:
        for socket in sockets.values():
            socket.close()
    found: dict[Any, Any] = {}
    for side in SIDES:
        kept = turns[side][1:]  # the first turn warms both sides up
        for q in (50, 99):
            found[side, q] = Spread(tuple(float(np.percentile(one, q)) for one in kept))
        found[side, "all"] = float(np.percentile(np.concatenate(kept), 99))
    return found


PROBE = """
import sys, time
from mmseq.bench.serve import health_ms
until, found = time.monotonic() + float(sys.argv[2]), []
while not found or time.monotonic() < until:
    found.append(health_ms(int(sys.argv[1])))
    time.sleep(0.01)
print(*(1e4 if ms is None else ms for ms in found))
"""


def load(config: Config, port: int) -> dict[str, float]:
    """Clients as fast as they can against one server, and its health asked for by a process of its own."""
    line = [sys.executable, "-c", PROBE, str(port), str(config.load_s)]
    probe = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    try:
        found = asyncio.run(_load(config, port))
        health = sorted(float(ms) for ms in probe.communicate()[0].split())
    finally:
        probe.kill()
    return found | {"health_p99_ms": float(np.percentile(health, 99))}


async def _load(config: Config, port: int) -> dict[str, float]:
    from websockets.asyncio.client import connect

    from mmseq.serving import codec

    answers, crossed, taken = [0] * config.clients, 0, []
    until = time.perf_counter() + config.load_s

    async def client(i: int) -> None:
        nonlocal crossed
        data = message(config, i)
        state = codec.unpack(data)["observation.state"]
        options: dict[str, Any] = {"compression": None, "max_size": None, "proxy": None, "open_timeout": 60}
        async with connect(f"ws://127.0.0.1:{port}", **options) as socket:
            await socket.recv()
            while answers[i] == 0 or time.perf_counter() < until:
                begun = time.perf_counter()
                await socket.send(data)
                reply = await socket.recv()
                taken.append(1000 * (time.perf_counter() - begun))
                if isinstance(reply, str):
                    raise ServeError(f"a client was answered {reply[:200]}")
                crossed += not np.array_equal(codec.unpack(reply)["actions"], np.tile(state, (HORIZON, 1)))
                answers[i] += 1

    begun = time.perf_counter()
    await asyncio.gather(*(client(i) for i in range(config.clients)))
    return {
        "answers_per_s": sum(answers) / (time.perf_counter() - begun),
        "fairness": min(answers) / statistics.mean(answers),
        "p99_ms": float(np.percentile(taken, 99)),
        "crossed": float(crossed),
    }
