"""ModelInput: what the model reads. It is made, joined, padded, cut and moved here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

_LINE = ("ids", "slots", "positions")  # one entry for each position
_PLACED = {"patch_at": "patch_ids", "copy_at": "copy_ids", "soft_at": "soft"}  # where, and what is there


@dataclass
class ModelInput:
    """A line of T positions: numpy arrays where sequences are built, tensors where the model reads them.

    ids (T,); slots (T, S), the rows of the slot table whose sum says which place of its frame or chunk a token has;
    positions (T,) in their documents. patch_at (M,): positions that carry merged codes, patch_ids (M, P). copy_at (R,):
    positions whose next id may repeat copy_ids (R,). soft_at (V,): positions whose vector is made of features that are
    no codes, soft float32 (V, F).
    """

    ids: Any
    slots: Any
    positions: Any
    patch_at: Any
    patch_ids: Any
    copy_at: Any
    copy_ids: Any
    soft_at: Any
    soft: Any

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of_ids(cls, ids: np.ndarray, slots: np.ndarray, *, merge: int, soft: int = 0) -> ModelInput:
        """A line of codes alone: ids (T,), slots (T, S)."""
        patches, features = _empty(merge**2, np.int64), _empty(soft, np.float32)
        return cls(ids, slots, _counted(len(ids)), _NONE, patches, _NONE, _NONE, _NONE, features)

    @classmethod
    def join(cls, parts: Sequence[ModelInput]) -> ModelInput:
        """Parts of numpy arrays end to end; each keeps its own positions."""
        starts = np.cumsum([0, *(len(p) for p in parts[:-1])])
        line = {name: np.concatenate([getattr(p, name) for p in parts]) for name in _LINE}
        at = {name: np.concatenate([getattr(p, name) + start for p, start in zip(parts, starts)]) for name in _PLACED}
        what = {name: np.concatenate([getattr(p, name) for p in parts]) for name in _PLACED.values()}
        return cls(**line, **at, **what)

    def padded(self, length: int, pad: int) -> ModelInput:
        """With a document of `pad` after it, up to `length` positions; arrays or tensors."""
        spare = length - len(self)
        if spare <= 0:
            return self
        if isinstance(self.ids, np.ndarray):
            wide = lambda a, fill: np.concatenate([a, np.full((spare, *a.shape[1:]), fill, a.dtype)])
            return replace(
                self,
                ids=wide(self.ids, pad),
                slots=wide(self.slots, 0),
                positions=np.concatenate([self.positions, np.arange(spare)]),
            )
        return replace(
            self,
            ids=torch.cat([self.ids, self.ids.new_full((spare,), pad)]),
            slots=torch.cat([self.slots, self.slots.new_zeros((spare, self.slots.shape[1]))]),
            positions=torch.cat([self.positions, torch.arange(spare).to(self.positions)]),
        )

    def cut(self, first: int, last: int) -> ModelInput:
        """Positions first .. last - 1, counted from the first of them."""
        out: dict[str, Any] = {name: getattr(self, name)[first:last] for name in _LINE}
        for at, what in _PLACED.items():
            where = getattr(self, at)
            mine = (where >= first) & (where < last)
            out[at], out[what] = where[mine] - first, getattr(self, what)[mine]
        return ModelInput(**out)

    def tensors(self) -> ModelInput:
        """Arrays as tensors that share their memory."""
        return self._each(torch.from_numpy)

    def to(self, device: torch.device | str) -> ModelInput:
        return self._each(lambda t: t.to(device, non_blocking=True))

    def _each(self, change: Any) -> ModelInput:
        return ModelInput(**{f.name: change(getattr(self, f.name)) for f in fields(self)})


_NONE = np.zeros(0, dtype=np.int64)


@lru_cache(64)
def _empty(width: int, dtype: Any) -> np.ndarray:
    return np.zeros((0, width), dtype=dtype)


@lru_cache(4096)
def _counted(count: int) -> np.ndarray:
    """0 .. count - 1, one array for all lines: copy, do not change."""
    array = np.arange(count)
    array.flags.writeable = False
    return array
