"""Meta-World in real time as a robot: try server, client and chunking before there is hardware.

    mmseq serve runs/demo/checkpoint --port 8000
    python serve/robots/simulator_robot.py --task window-open --seconds 20

Needs `mmseq[sim]` and `mmseq-client`. `mmseq eval` measures success over many episodes, with delays.
"""

from __future__ import annotations

import argparse
import logging
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from mmseq_client import Chunking, Client, ClientError, ControlLoop
from mmseq_client.chunking import MODES

from mmseq.errors import MMSeqError
from mmseq.simulation.base import Simulator, open_simulator, to_wire
from mmseq.simulation.experts import DEMO_SPREAD


class SimulatorRobot:
    """One episode; each command is one control step of the simulator. contract: of the checkpoint."""

    def __init__(self, env: Simulator, contract: dict[str, Any]):
        self.env, self._contract = env, contract
        self.cameras = [camera["name"] for camera in contract["cameras"]]

    def contract(self) -> dict[str, Any]:
        return self._contract

    def observe(self) -> dict[str, Any]:
        return to_wire(self.env.observe(), self.cameras)

    def act(self, action: np.ndarray) -> None:
        self.env.act(action)

    def stop(self) -> None:
        """A simulator stands still between commands."""


def main(arguments: list[str] | None = None) -> SimulatorRobot:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="window-open")
    parser.add_argument("--seed", type=int, default=100_000, help="of the layout")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--token-file", type=Path, help="of the server")
    parser.add_argument("--ca-file", help="certificates (PEM) that the server's is signed by")
    parser.add_argument("--mode", default="realtime", choices=MODES)
    parser.add_argument("--execute", type=int, help="control steps from one request to the next")
    parser.add_argument("--seconds", type=float, default=10)
    args = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    token = args.token_file.read_text().strip() if args.token_file else None
    try:
        return drive(args, token)
    except (ClientError, MMSeqError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None


def drive(args: argparse.Namespace, token: str | None) -> SimulatorRobot:
    with (
        Client(args.host, args.port, token, ca_file=args.ca_file) as client,
        closing(open_simulator("metaworld", args.task, seed=args.seed, spread=DEMO_SPREAD)) as env,
    ):
        robot = SimulatorRobot(env, next(iter(client.metadata["embodiments"].values())))
        env.observe()  # the first picture takes long
        loop = ControlLoop(client, robot, Chunking(args.mode, args.execute), prompt=env.instructions[0])
        loop.run(seconds=args.seconds)
        print(f"{env.task}: {'solved' if env.succeeded else 'not solved'} in {env.steps} steps; {dict(loop.counts)}")
    return robot


if __name__ == "__main__":
    main()
