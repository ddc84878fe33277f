"""What the server says no with: one exception, a short machine-readable code, a sentence for people.

On the websocket it travels as a text frame (binary frames are replies), over HTTP as the body of
the matching status; both carry `{"error": {"code", "message", "key", "retry_after_ms"}}`. Never a traceback.
"""

from __future__ import annotations

import json
from typing import Any

from mmseq.errors import ServeError

HTTP_STATUS = {
    "malformed": 400,
    "missing_key": 400,
    "unknown_key": 400,
    "wrong_type": 400,
    "wrong_shape": 400,
    "not_finite": 400,
    "out_of_range": 400,
    "refused": 400,
    "unauthorized": 401,
    "forbidden_origin": 403,
    "not_found": 404,
    "not_allowed": 405,
    "incomplete": 408,
    "fingerprint": 409,
    "ambiguous": 409,
    "too_large": 413,
    "unsupported": 415,
    "held": 423,
    "unsafe_action": 502,
    "policy_failed": 500,
    "internal": 500,
    "busy": 503,
    "stopping": 503,
    "late": 504,
}


class RequestError(ServeError):
    """A request that is refused.

    code: one of `HTTP_STATUS`. key: the key of the observation or message that is at fault. retry_after_ms: when
    asking again may succeed. reason: of an operator's hold. details: further fields of the answer.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        key: str | None = None,
        fix: str | None = None,
        retry_after_ms: float | None = None,
        reason: str | None = None,
        details: dict[str, Any] | None = None,
    ):
        super().__init__(message, fix=fix)
        self.code, self.key = code, key
        self.retry_after_ms, self.reason = retry_after_ms, reason
        self.details = details or {}

    @property
    def status(self) -> int:
        return HTTP_STATUS.get(self.code, 500)

    @property
    def closes(self) -> bool:
        """Whether the connection ends with this error: only when the server itself is at fault or leaving."""
        return self.code in ("policy_failed", "internal", "stopping")

    def to_json(self) -> str:
        body: dict[str, Any] = {"code": self.code, "message": str(self)}
        for name in ("key", "retry_after_ms", "reason"):
            if getattr(self, name) is not None:
                body[name] = getattr(self, name)
        return json.dumps({"error": {**body, **self.details}})
