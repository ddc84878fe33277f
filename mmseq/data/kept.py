"""Kept: a few things that stay open between reads; of each process its own, and safe for several threads."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any


class Kept[K: Hashable, V]:
    """The last `limit` values by key. close: what is done with one that goes. A copy or a fork begins empty."""

    def __init__(self, limit: int, close: Callable[[V], None] | None = None):
        self.limit, self._close = limit, close
        self._begin()

    def _begin(self) -> None:
        self._pid, self._lock = os.getpid(), threading.Lock()
        self._values: OrderedDict[K, V] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.limit, self._close)

    def take(self, key: K) -> V | None:
        """The value, which is the caller's alone until it is put back."""
        if self._pid != os.getpid():  # a forked worker must not share file positions with its parent
            self._begin()
        with self._lock:
            return self._values.pop(key, None)

    def put(self, key: K, value: V) -> V:
        """Keep a value, in place of another of this key."""
        with self._lock:
            gone = [self._values.pop(key)] if key in self._values else []
            self._values[key] = value
            gone += [self._values.popitem(last=False)[1] for _ in range(len(self._values) - self.limit)]
        for old in gone if self._close is not None else ():
            if old is not value:
                self._close(old)  # type: ignore[misc]
        return value
