"""A batch as LeRobot makes it -> observations in the contract's shapes and units."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from mmseq_client import ContractError
from mmseq_client.images import fit
from torch import Tensor

from lerobot_policy_mmseq.configuration_mmseq import MmseqConfig

IMAGES = "observation.images."
STATE = "observation.state"

log = logging.getLogger("lerobot_policy_mmseq")


class Observations:
    """contract: the embodiment, as its file has it. keys: what the policy reads of it."""

    def __init__(self, contract: dict[str, Any], keys: list[str], config: MmseqConfig):
        sizes = {IMAGES + c["name"]: (c["height"], c["width"]) for c in contract["cameras"]}
        self.cameras = {key: size for key, size in sizes.items() if key in keys}
        self.axes: list[str] = list((contract.get("proprio") or {}).get("names", ())) if STATE in keys else []
        self.prompt, self.wants_prompt, self._told = config.prompt, config.wants_prompt, False

    def read(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """One observation for each row: images uint8 (H, W, 3), state float32 (axes,), prompt.

        Images float (B, 3, H, W) in 0..1, of any size: they are cropped and scaled as in training.
        Raises: ContractError that names the key.
        """
        wanted = [*self.cameras, *([STATE] if self.axes else [])]
        missing = [key for key in wanted if not isinstance(batch.get(key), Tensor)]
        if missing:
            there = sorted(key for key in batch if key.startswith("observation"))
            raise ContractError(
                f"the batch has no {missing}; it has {there}; name its keys after the contract's with --rename_map"
            )
        rows = len(batch[wanted[0]]) if wanted else 1
        out: list[dict[str, Any]] = [{"prompt": text} for text in self._prompts(batch, rows)]
        for key, size in self.cameras.items():
            for observation, image in zip(out, self._images(key, batch[key], rows)):
                if image.shape[:2] != size and not self._told:
                    self._told = True
                    log.info("frames of %s are cropped and scaled to %d x %d", image.shape[:2], *size)
                observation[key] = fit(image, *size)
        if self.axes:
            state = batch[STATE]
            if tuple(state.shape) != (rows, len(self.axes)):
                raise ContractError(
                    f"{STATE!r} is {tuple(state.shape)}, expected {(rows, len(self.axes))} for {self.axes}"
                )
            for observation, values in zip(out, state.detach().cpu().to(torch.float32).numpy()):
                observation[STATE] = values
        return out

    def _images(self, key: str, images: Tensor, rows: int) -> np.ndarray:
        """uint8 (B, H, W, 3)."""
        if images.ndim != 4 or images.shape[0] != rows or images.shape[1] != 3:
            raise ContractError(f"{key!r} is {tuple(images.shape)}, expected ({rows}, 3, height, width)")
        if images.dtype != torch.uint8:
            low, high = images.min().item(), images.max().item()
            if not (low >= 0 and high <= 1):
                raise ContractError(f"{key!r} is {low:.3g}..{high:.3g}, expected 0..1; leave images unnormalised")
            images = (images * 255).round().to(torch.uint8)
        return images.permute(0, 2, 3, 1).contiguous().cpu().numpy()

    def _prompts(self, batch: dict[str, Any], rows: int) -> list[str]:
        task = batch.get("task") or ""
        texts = [task] * rows if isinstance(task, str) else list(task)
        if len(texts) != rows:
            raise ContractError(f"'task' has {len(texts)} texts for {rows} observations")
        texts = [text or self.prompt or "" for text in texts]
        if self.wants_prompt and not all(texts):
            raise ContractError("the policy reads an instruction and 'task' is empty; give --task or --policy.prompt")
        return texts
