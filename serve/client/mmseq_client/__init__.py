"""Client of an mmseq policy server: numpy, msgpack and websockets, Python >= 3.9, nothing else."""

from mmseq_client.client import (
    Client,
    ClientError,
    ContractError,
    RefusedError,
    example_observation,
    fingerprint,
    healthz,
)
from mmseq_client.player import ActionQueue, ChunkPlayer

__version__ = "0.1.0"
__all__ = [
    "ActionQueue",
    "ChunkPlayer",
    "Client",
    "ClientError",
    "ContractError",
    "RefusedError",
    "example_observation",
    "fingerprint",
    "healthz",
]
