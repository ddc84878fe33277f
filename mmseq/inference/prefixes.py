"""Prefixes: what requests begin with is computed once, and the memory of the key/value cache is used again.

From one control step to the next a robot's embodiment and text stay the same; only what follows them, the frames and
the state of now, is new. The keys and values of the beginning are kept; where they still lie in the cache that the next
request gets, not even they are copied.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch
from torch import Tensor

from mmseq.model.config import ModelConfig
from mmseq.model.transformer import Cache

CACHE_STEP = 64  # positions: requests whose texts differ by a few tokens share a cache
CACHES = 8  # kept, one of each number of requests that are decoded together


class Prefixes:
    """Of one model: keys and values of the beginnings that were used last, and caches. made: caches so far.

    limit, positions: how many beginnings are kept, and how many positions of all of them. spare: positions that a cache
    has beyond those of the request that it is made for.
    """

    def __init__(self, limit: int = 64, positions: int = 8192, spare: int = 0):
        self.limit, self.positions, self.spare, self.made = limit, positions, spare, 0
        self._frozen = False
        self._kept: OrderedDict[bytes, list[Tensor]] = OrderedDict()
        self._caches: OrderedDict[int, Cache] = OrderedDict()  # by number of requests
        self._lies_in: dict[tuple[int, int], bytes] = {}  # by number of requests and row: how that row begins

    def cache(self, config: ModelConfig, batch: int, length: int, *, dtype: torch.dtype, device: torch.device) -> Cache:
        """A cache of at least `length` positions. What an earlier request left in it is behind every mask."""
        found = self._caches.pop(batch, None)
        if found is not None and found.length < length and self._frozen:
            self._caches[batch] = found
            return Cache.empty(config, batch, length, dtype=dtype, device=device)  # for this request alone
        if found is None or found.length < length:
            length = -(-(length + self.spare) // CACHE_STEP) * CACHE_STEP
            found = Cache.empty(config, batch, length, dtype=dtype, device=device)
            self.made += 1
            self._forget_rows(batch)
        self._caches[batch] = found
        if len(self._caches) > CACHES:
            self._forget_rows(self._caches.popitem(last=False)[0])
        return found

    def freeze(self) -> None:
        """Keep the caches that there are, for which passes are compiled: longer requests get caches of their own."""
        self._frozen = True

    def clear(self) -> None:
        """Keep nothing, and no cache either unless they are frozen."""
        self._kept.clear()
        self._lies_in.clear()
        if not self._frozen:
            self._caches.clear()

    def _forget_rows(self, batch: int) -> None:
        for row in range(batch):
            self._lies_in.pop((batch, row), None)

    def recall(self, ids: np.ndarray, cache: Cache, row: int) -> bool:
        """Put the keys and values of ids (n,), int64, at the first n positions of a row; False if they are not kept."""
        key = ids.tobytes()
        found, place = self._kept.get(key), (cache.batch, row)
        shared = self._caches.get(cache.batch) is cache
        if found is None:
            if shared:
                self._lies_in.pop(place, None)
            return False
        self._kept.move_to_end(key)
        if not shared or self._lies_in.get(place) != key:
            for line, kept in zip((*cache.keys, *cache.values), found):
                line[row, :, : len(ids)] = kept
        if shared:
            self._lies_in[place] = key
        return True

    def keep(self, ids: np.ndarray, cache: Cache, row: int) -> None:
        """Keep what the first positions of a row hold for ids (n,), int64."""
        key = ids.tobytes()
        self._kept[key] = [line[row, :, : len(ids)].clone() for line in (*cache.keys, *cache.values)]
        if self._caches.get(cache.batch) is cache:
            self._lies_in[cache.batch, row] = key
        while len(self._kept) > self.limit or self._positions() > self.positions:
            self._kept.popitem(last=False)

    def _positions(self) -> int:
        return sum(lines[0].shape[-2] for lines in self._kept.values())
