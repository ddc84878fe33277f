"""The policy that LeRobot's factory finds: chunks from a server or a checkpoint, one action per control step.

lerobot-eval --policy.path=OUT --policy.server=gpu:8000 --env.type=metaworld --env.task=window-open-v3
"""

from __future__ import annotations

import json
import logging
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from mmseq_client import ActionGate, ContractError, RefusedError, Stance, rest_action
from torch import Tensor

from lerobot_policy_mmseq.backends import Local, Served
from lerobot_policy_mmseq.configuration_mmseq import MmseqConfig
from lerobot_policy_mmseq.observation import STATE, Observations

log = logging.getLogger("lerobot_policy_mmseq")


class MmseqPolicy(PreTrainedPolicy):
    """directory: what `mmseq export CHECKPOINT lerobot OUT` wrote. dataset_meta: of a dataset, whose names of axes and
    rate are then compared with the contract's.

    Raises: ContractError that names what differs from the contract: nothing has moved then.
    """

    config_class = MmseqConfig
    name = "mmseq"
    config: MmseqConfig

    def __init__(self, config: MmseqConfig, directory: Path | None = None, dataset_meta: Any = None, **_: Any):
        super().__init__(config)
        if directory is None:
            raise ContractError("this policy is not made anew; give --policy.path, the folder of `mmseq export`")
        config.validate_features()
        self.contract: dict[str, Any] = json.loads((directory / "embodiment.json").read_text())
        self.names = list(self.contract["action"]["names"])
        self._check(dataset_meta)
        self.observations = Observations(self.contract, list(config.input_features or ()), config)
        self.gate = ActionGate(self.contract)
        self.backend: Served | Local = (
            Served(config, self.contract) if config.server else Local(config, self.contract, directory / "checkpoint")
        )
        self.reset()

    def _check(self, dataset_meta: Any) -> None:
        """LeRobot replaces the shape of the action by that of the environment or the dataset."""
        feature, config = self.config.action_feature, self.config
        if tuple(feature.shape) != (len(self.names),):
            raise ContractError(f"'action' is {tuple(feature.shape)} there, ({len(self.names)},) here: {self.names}")
        stated = {"action_feature_names": (config.action_feature_names, self.names)}
        stated["rate_hz"] = (config.rate_hz, self.contract["rate_hz"])
        if dataset_meta is not None:
            stated["fps of the dataset"] = (dataset_meta.fps, self.contract["rate_hz"])
            state = list((self.contract.get("proprio") or {}).get("names", ()))
            for key, mine in (("action", self.names), (STATE, state)):
                names = dataset_meta.features.get(key, {}).get("names")
                if mine and isinstance(names, list):
                    stated[f"names of {key!r} in the dataset"] = (names, mine)
        for what, (theirs, mine) in stated.items():
            if theirs != mine:
                raise ContractError(f"{what}: {theirs}, {mine} in the contract of {self.contract['name']!r}")

    @classmethod
    def from_pretrained(
        cls, pretrained_name_or_path: Any, *, config: Any = None, revision: str | None = None, **kwargs: Any
    ) -> MmseqPolicy:
        """From a folder, or from a repository of the Hub that holds one."""
        directory = Path(pretrained_name_or_path)
        if not directory.is_dir():
            from huggingface_hub import snapshot_download

            directory = Path(snapshot_download(str(pretrained_name_or_path), revision=revision))
        if config is None:
            config = MmseqConfig.from_pretrained(directory)
        return cls(config, directory, dataset_meta=kwargs.get("dataset_meta")).eval()

    def reset(self) -> None:
        """A new episode."""
        self._queue: deque[Tensor] = deque()
        self._last: np.ndarray | None = None  # (B, axes), what was commanded last
        self._stances: list[Stance] = []  # by row
        self._rests = True  # stopped by an operator, or not begun: somebody may move the robot by hand
        self._step = 0  # of the episode, that were executed: holding is none
        self.backend.reset()

    def supports_rtc(self) -> bool:
        return True

    @torch.no_grad()
    def predict_action_chunk(
        self,
        batch: dict[str, Tensor],
        inference_delay: int = 0,
        prev_chunk_left_over: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """float32 (B, horizon, axes). LeRobot's real-time chunking: the first `inference_delay` actions that are left
        of the chunk before, (n, axes), are executed meanwhile, so the new chunk begins with exactly these.

        Raises: ContractError for a batch that is not the contract's, RefusedError, ClientError, UnsafeActionError.
        """
        prefix = _prefix(prev_chunk_left_over, min(inference_delay, self.config.horizon - 1))
        return self._chunk(batch, prefix, None)

    def _chunk(self, batch: dict[str, Tensor], prefix: np.ndarray, step: int | None) -> Tensor:
        observations = self.observations.read(batch)
        if len(prefix):
            for observation in observations:
                observation["action_prefix"] = prefix
        chunks = []
        for row, actions in enumerate(self.backend.infer(observations, step)):
            checked = self.gate.check_chunk(actions, self.config.horizon)
            before = None if self._last is None or row >= len(self._last) else self._last[row]
            if self._rests:
                before = self._stance(row).stands(observations[row], before)
            elif before is not None:
                self._stance(row).moves(observations[row], before)
            self.gate.limit_steps(checked[len(prefix) :], checked[len(prefix) - 1] if len(prefix) else before)
            chunks.append(checked)
        self._rests = False
        return torch.from_numpy(np.stack(chunks))

    @torch.no_grad()
    def select_action(self, batch: dict[str, Tensor], **_: Any) -> Tensor:
        """The action of this control step, float32 (B, axes). While an operator holds every robot, the one that keeps
        it where it is; it goes on by itself, from what it sees then.
        """
        if not self._queue:
            try:
                chunk = self._chunk(batch, _prefix(None, 0), self._step)
            except RefusedError as error:
                if error.code not in ("held", "late"):
                    raise
                log.warning("holding: %s", error)
                self._last = self._hold(error)  # what follows is limited from there
                self._rests |= error.code == "held"
                return torch.from_numpy(self._last.copy())
            self._queue.extend(chunk[:, : self.config.n_action_steps].transpose(0, 1))
        action = self._queue.popleft()
        self._step += 1
        self._last = action.numpy().copy()  # LeRobot may change what it is given
        return action

    def _stance(self, row: int) -> Stance:
        while len(self._stances) <= row:
            self._stances.append(Stance(self.gate))
        return self._stances[row]

    def _hold(self, error: RefusedError) -> np.ndarray:
        """(B, axes): the last action again, or zeros where actions are changes; the gripper keeps its value."""
        if self._last is None:  # nothing was commanded, so nothing is known that keeps it where it is
            raise error
        rest = rest_action(self.contract, self._last)
        return self.gate.check_chunk(rest, len(rest), clamp=True)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict | None]:
        raise NotImplementedError("LeRobot does not train this policy; use `mmseq train` or `mmseq finetune`")

    def get_optim_params(self) -> dict:
        raise NotImplementedError("LeRobot does not train this policy; use `mmseq train` or `mmseq finetune`")


def _prefix(left_over: Tensor | None, delay: int) -> np.ndarray:
    """float32 (n, axes), n <= delay. LeRobot fills what is left up with rows of zeros, which are no actions."""
    if left_over is None or delay < 1:
        return np.zeros((0, 0), np.float32)
    rows = left_over.reshape(-1, left_over.shape[-1])[:delay].detach().cpu().to(torch.float32).numpy()
    used = np.flatnonzero(rows.any(axis=1))
    return rows[: used[-1] + 1] if len(used) else rows[:0]
