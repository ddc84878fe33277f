"""Prefixes: what requests begin with is computed once.

From one control step to the next a robot's embodiment and text stay the same; only what follows them, the frames and
the state of now, is new. The keys and values of the beginning are kept and copied into the cache of each request.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from torch import Tensor

from mmseq.model.transformer import Cache


class Prefixes:
    """Keys and values of the `limit` beginnings that were used last, of one model."""

    def __init__(self, limit: int = 64):
        self.limit = limit
        self._kept: OrderedDict[bytes, list[Tensor]] = OrderedDict()

    def recall(self, ids: np.ndarray, cache: Cache, row: int) -> bool:
        """Put the keys and values of ids (n,), int64, at the first n positions of a row; False if they are not kept."""
        found = self._kept.get(ids.tobytes())
        if found is None:
            return False
        self._kept.move_to_end(ids.tobytes())
        for line, kept in zip((*cache.keys, *cache.values), found):
            line[row, :, : len(ids)] = kept
        return True

    def keep(self, ids: np.ndarray, cache: Cache, row: int) -> None:
        """Keep what the first positions of a row hold for ids (n,), int64."""
        self._kept[ids.tobytes()] = [line[row, :, : len(ids)].clone() for line in (*cache.keys, *cache.values)]
        if len(self._kept) > self.limit:
            self._kept.popitem(last=False)
