"""What `config.json` of an exported policy says. `--policy.NAME=VALUE` replaces any of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lerobot.configs import PreTrainedConfig
from mmseq_client.contract import reads_prompt


@PreTrainedConfig.register_subclass("mmseq")
@dataclass
class MmseqConfig(PreTrainedConfig):
    """Written by `mmseq export CHECKPOINT lerobot OUT`, beside `embodiment.json`, the robot's contract.

    server: `HOST:PORT` of `mmseq serve`; without one the policy runs here, from the folder `checkpoint`. token_file,
    ca_file: the server's token, and the certificates that its own is signed by. timeout_s: the longest wait for one
    answer. arrow, passes: see `mmseq serve --policy`, `--passes`. horizon: control steps of a chunk. n_action_steps:
    of these, how many are executed before the next is asked for. rate_hz: control steps per second.
    action_feature_names: the order of the actions. prompt: the instruction where LeRobot gives none.
    reads_prompt: whether the arrow is given one; None: as it looks.
    """

    server: str | None = None
    token_file: str | None = None
    ca_file: str | None = None
    timeout_s: float = 60.0
    arrow: str | None = None
    passes: int | None = None
    horizon: int = 1
    n_action_steps: int = 1
    rate_hz: float = 0.0
    action_feature_names: list[str] = field(default_factory=list)
    prompt: str | None = None
    reads_prompt: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.n_action_steps <= self.horizon:
            raise ValueError(f"n_action_steps is {self.n_action_steps}; give 1 to {self.horizon}, the chunk's length")

    @property
    def wants_prompt(self) -> bool:
        return reads_prompt({"policy": self.arrow or "", "reads_prompt": self.reads_prompt})

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(self.horizon))

    @property
    def reward_delta_indices(self) -> None:
        return None

    def get_optimizer_preset(self) -> Any:
        raise NotImplementedError("LeRobot does not train this policy; use `mmseq train` or `mmseq finetune`")

    def get_scheduler_preset(self) -> Any:
        return None

    def validate_features(self) -> None:
        if self.action_feature is None:
            raise ValueError("config.json names no action; export the policy again")
