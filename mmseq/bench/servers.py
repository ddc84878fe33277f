"""Servers for `mmseq bench serve`, each in a process of its own: ours, and openpi's with the same policy.

    python -m mmseq.bench.servers ours 8000 3 224 2.0     # port, cameras, image size, milliseconds of the model

openpi's is its own file, unchanged, where MMSEQ_OPENPI names a checkout; else a stand-in of the same library, in the
same order: `websockets.asyncio.server`, msgpack with its markers for arrays, the policy called on the event loop.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

HORIZON, AXES = 16, 7


def robot(cameras: int, size: int) -> Any:
    """The embodiment of the bench: seven joints and so many square cameras."""
    from mmseq.embodiment import Axes, Camera, Embodiment

    names = tuple(f"joint_{i}" for i in range(AXES))
    low, high = (-1.0,) * AXES, (1.0,) * AXES
    axes = Axes(names=names, units=("rad",) * AXES, low=low, high=high, minimum=low, maximum=high)
    views = tuple(Camera(name=f"camera_{i}", height=size, width=size) for i in range(cameras))
    return Embodiment(name="bench", rate_hz=50.0, cameras=views, proprio=axes, action=axes)


class NullPolicy:
    """Answers with the state that it was given, so that an answer that went astray is seen.

    model_ms: sleeps so long in each call, as a GPU computes beside Python; a batch takes as long as one.
    """

    def __init__(self, body: Any, model_ms: float):
        self.body, self.model_s = body, model_ms / 1000

    def contract(self) -> dict[str, Any]:
        body = {self.body.name: self.body.to_dict()}
        return {"name": "null", "embodiments": body, "tasks": {}, "horizon": HORIZON, "prefix": False}

    def infer(self, observation: dict[str, Any]) -> dict[str, Any]:
        return self.infer_many([observation])[0]

    def infer_many(self, observations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        if self.model_s:
            time.sleep(self.model_s)
        return [{"actions": np.tile(o["observation.state"], (HORIZON, 1))} for o in observations]

    def batch_key(self, observation: dict[str, Any]) -> str:
        return "any"

    def predict(self, arrow: str, observation: dict[str, Any]) -> dict[str, Any]:
        return {}


def openpi_checkout() -> Path | None:
    """Where MMSEQ_OPENPI says that openpi's sources are."""
    named = os.environ.get("MMSEQ_OPENPI")
    return Path(named) if named else None


def openpi_name() -> str:
    return "openpi's server" if openpi_checkout() else "openpi's protocol on websockets"


def serve_openpi(policy: NullPolicy, port: int) -> None:
    """Until the process is ended. Raises: ConfigError when MMSEQ_OPENPI is no checkout of it."""
    checkout = openpi_checkout()
    if checkout is None:
        asyncio.run(_stand_in(policy, port))
        return
    import importlib.util

    from mmseq.errors import ConfigError

    path = checkout / "src/openpi/serving/websocket_policy_server.py"
    sys.path.insert(0, str(checkout / "packages/openpi-client/src"))
    spec = importlib.util.spec_from_file_location("websocket_policy_server", path)
    if not path.exists() or spec is None or spec.loader is None:
        raise ConfigError(f"MMSEQ_OPENPI is {checkout}, which lacks {path.relative_to(checkout)}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.WebsocketPolicyServer(policy, "127.0.0.1", port, {}).serve_forever()


async def _stand_in(policy: NullPolicy, port: int) -> None:
    import http

    import msgpack
    import websockets.asyncio.server
    from websockets.exceptions import ConnectionClosed

    def pack(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
        return value

    def unpack(body: dict) -> Any:
        if b"__ndarray__" in body:
            return np.ndarray(buffer=body[b"data"], dtype=np.dtype(body[b"dtype"]), shape=body[b"shape"])
        return body

    async def handle(socket: Any) -> None:
        packer = msgpack.Packer(default=pack)
        await socket.send(packer.pack({}))
        total = None
        while True:
            try:
                begun = time.monotonic()
                observation = msgpack.unpackb(await socket.recv(), object_hook=unpack)
                inferring = time.monotonic()
                reply = policy.infer(observation)
                reply["server_timing"] = {"infer_ms": 1000 * (time.monotonic() - inferring)}
                if total is not None:
                    reply["server_timing"]["prev_total_ms"] = 1000 * total
                await socket.send(packer.pack(reply))
                total = time.monotonic() - begun
            except ConnectionClosed:
                return

    def health(connection: Any, request: Any) -> Any:
        return connection.respond(http.HTTPStatus.OK, "OK\n") if request.path == "/healthz" else None

    options: dict[str, Any] = {"compression": None, "max_size": None, "process_request": health}
    async with websockets.asyncio.server.serve(handle, "127.0.0.1", port, **options) as server:
        await server.serve_forever()


def main(side: str, port: int, cameras: int, size: int, model_ms: float) -> None:
    policy = NullPolicy(robot(cameras, size), model_ms)
    if side == "openpi":
        serve_openpi(policy, port)
        return
    from mmseq.serving import SchedulerConfig, ServerConfig, serve

    serve(policy, ServerConfig(port=port, scheduling=SchedulerConfig(max_waiting=256)))


if __name__ == "__main__":
    _, chosen, *numbers, sleep_ms = sys.argv
    at, views, pixels = map(int, numbers)
    main(chosen, at, views, pixels, float(sleep_ms))
