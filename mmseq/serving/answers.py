"""What a policy makes of a batch of requests: a result for each, or the error that its client is told.

In the model's thread. Whatever a policy raises belongs to the request that caused it, never to the thread.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from mmseq.errors import MMSeqError, ModelError, ServeError
from mmseq.serving.errors import RequestError
from mmseq.serving.policy import Policy
from mmseq.serving.scheduler import Job

log = logging.getLogger("mmseq.serving")


def answer(policy: Policy, batch: Sequence[Job]) -> None:
    """Set `outcome` of each job: a result, or a RequestError. policy: one for the whole batch, also when another
    takes its place meanwhile."""
    if len(batch) > 1:
        try:
            results = policy.infer_many([job.arguments[0] for job in batch])  # type: ignore[attr-defined]
            if len(results) != len(batch):
                raise ServeError(f"infer_many gave {len(results)} results for {len(batch)} observations")
            for job, result in zip(batch, results):
                job.outcome = _outcome(job.call, result)
            return
        except Exception as error:  # one of them may be at fault: each by itself then
            log.warning("a batch of %d failed, answering one by one: %s", len(batch), error)
    for job in batch:
        try:
            job.outcome = _outcome(job.call, getattr(policy, job.call)(*job.arguments))
        except BaseException as error:
            job.outcome = _outcome(job.call, error)


def _outcome(call: str, result: Any) -> Any:
    """A policy's result as a dict, or the RequestError that it amounts to."""
    if isinstance(result, dict | RequestError):
        return result
    if isinstance(result, MMSeqError) and not isinstance(result, ModelError):
        return RequestError("refused", str(result))
    if not isinstance(result, BaseException):
        result = TypeError(f"returned {type(result).__name__}")
    return broken(call, result)


def broken(call: str, error: BaseException) -> RequestError:
    """What a client is told of an error that is none of its own; the log has the rest."""
    log.error("the policy failed in %s", call, exc_info=error)
    return RequestError(
        "policy_failed", f"the policy failed in {call} with {type(error).__name__}", fix="see the server's log"
    )
