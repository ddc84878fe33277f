"""Serving: the wire codec, the server, the observation check and the safety gate."""

# ruff: noqa: E402
from mmseq.errors import require

require("mmseq_client.rules", "./serve/client")  # the rules of robots, which both ends have

from mmseq.serving.chunking import Chunking
from mmseq.serving.errors import RequestError
from mmseq.serving.observation import ObservationRules, example_observation
from mmseq.serving.policy import Contract, Policy, ReplayPolicy
from mmseq.serving.safety import GateConfig
from mmseq.serving.scheduler import SchedulerConfig
from mmseq.serving.server import Server, ServerConfig, serve

__all__ = [
    "Chunking",
    "Contract",
    "GateConfig",
    "ObservationRules",
    "Policy",
    "ReplayPolicy",
    "RequestError",
    "SchedulerConfig",
    "Server",
    "ServerConfig",
    "example_observation",
    "serve",
]
