"""Client of an mmseq policy server: numpy, msgpack and websockets, Python >= 3.9, nothing else."""

from mmseq_client.chunking import ChunkBuffer, Chunking
from mmseq_client.client import Client, healthz
from mmseq_client.contract import (
    example_observation,
    fingerprint,
    gripper_axes,
    holds_position,
    rest_action,
    zero_action,
)
from mmseq_client.errors import ClientError, ContractError, NoObservationError, RefusedError, UnsafeActionError
from mmseq_client.gate import ActionGate
from mmseq_client.loop import ControlLoop
from mmseq_client.robot import Robot, Tick
from mmseq_client.rules import Rules
from mmseq_client.simulated import SimulatedClock, SimulatedExecutor
from mmseq_client.stance import Stance

__version__ = "0.3.0"
__all__ = [
    "ActionGate",
    "ChunkBuffer",
    "Chunking",
    "Client",
    "ClientError",
    "ContractError",
    "ControlLoop",
    "NoObservationError",
    "RefusedError",
    "Robot",
    "Rules",
    "SimulatedClock",
    "SimulatedExecutor",
    "Stance",
    "Tick",
    "UnsafeActionError",
    "example_observation",
    "fingerprint",
    "gripper_axes",
    "healthz",
    "holds_position",
    "rest_action",
    "zero_action",
]
