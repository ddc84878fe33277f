"""What can go wrong between a robot and its server."""

from __future__ import annotations

import math
from typing import Any


class ClientError(Exception):
    """The server cannot be reached, the connection broke, or what came back is not a reply."""


class ContractError(ClientError):
    """Robot and server do not mean the same thing by their numbers."""


class NoObservationError(ClientError):
    """Raised by a robot's `observe` while a sensor is silent: nothing is asked then, and the loop holds when its
    actions are over."""


class UnsafeActionError(ClientError):
    """The gate on the robot withheld actions: not finite, of another shape, or outside of the limits."""


class RefusedError(ClientError):
    """The server refused a request.

    code: a short word, as `missing_key`. key: the key at fault, if one is. retry_after_ms: when to ask again,
    where the server says it (`busy`, `held`). closed: whether the server has ended the connection with it.
    """

    def __init__(
        self,
        code: str,
        message: str,
        key: str | None = None,
        retry_after_ms: float | None = None,
        closed: bool = False,
    ):
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.key = key
        self.retry_after_ms = retry_after_ms
        self.closed = closed

    def __reduce__(self):
        return type(self), (self.code, self.message, self.key, self.retry_after_ms, self.closed)


def require_seconds(name: str, value: Any) -> None:
    """Raises: ClientError unless `value` is a finite number of seconds from 0 on."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and value >= 0):
        raise ClientError(f"{name} is {value!r}; give seconds, a finite number from 0 on")
