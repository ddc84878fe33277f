"""A request from its decoding to its reply, without any network: check, infer, safety gate, timing."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from mmseq.embodiment import Embodiment
from mmseq.errors import MMSeqError
from mmseq.serving.errors import RequestError
from mmseq.serving.observation import ObservationRules, check_given, check_observation
from mmseq.serving.policy import Contract, Policy
from mmseq.serving.safety import GateConfig, SafetyGate
from mmseq.serving.worker import Worker

log = logging.getLogger("mmseq.serving")


class Service:
    """One policy behind its contract. The coroutines belong to one event loop."""

    def __init__(self, policy: Policy, *, rules: ObservationRules, gate: GateConfig, max_waiting: int):
        self.policy = policy
        self.contract = Contract.from_policy(policy)
        self.rules = rules
        self.gate = SafetyGate(gate)
        self.worker = Worker(max_waiting)
        self.started_at = time.monotonic()
        self.requests: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.in_flight = 0
        self.stopping = False

    async def infer(self, observation: dict[str, Any]) -> dict[str, Any]:
        """The reply to an observation: `actions` float32 (H, D), `policy_timing`, `server_timing`, in ms.

        Raises: RequestError.
        """
        self.requests["infer"] += 1
        checked, embodiment = check_observation(observation, self.contract, self.rules)
        result, timing = await self._run(self.policy.infer, checked)
        if "actions" not in result:
            raise self._broken("infer", TypeError(f"no 'actions' in {sorted(result)}"))
        reply = dict(result)
        reply["actions"], clamped = self.gate.check(
            result["actions"], embodiment, horizon=self.contract.horizon, prefix=checked.get("action_prefix")
        )
        if clamped:
            reply["safety"] = {"clamped": clamped}
        reply.setdefault("policy_timing", {"infer_ms": timing["infer_ms"]})
        reply["server_timing"] = timing
        return reply

    async def predict(self, body: dict[str, Any]) -> dict[str, Any]:
        """`{"arrow": text, "observation": map}` -> `{"prediction": {stream: value}, "server_timing": {...}}`.

        Predicted actions go through the safety gate like those of `infer`. Raises: RequestError.
        """
        self.requests["predict"] += 1
        arrow, observation = body.get("arrow"), body.get("observation")
        if not isinstance(arrow, str) or not isinstance(observation, dict) or set(body) != {"arrow", "observation"}:
            raise RequestError(
                "malformed", f"expected arrow (text) and observation (map), got {sorted(map(str, body))[:8]}"
            )
        if not all(isinstance(key, str) for key in observation):
            raise RequestError("malformed", "the keys of an observation are text", key="observation")
        checked, embodiment = check_given(observation, self.contract, self.rules)
        result, timing = await self._run(self.policy.predict, arrow, checked)
        prediction = self._gate_prediction(dict(result), embodiment)
        return {"prediction": prediction, "server_timing": timing}

    def _gate_prediction(self, prediction: dict[str, Any], embodiment: Embodiment) -> dict[str, Any]:
        for key, value in prediction.items():
            if key.partition("@")[0] in ("action", "actions"):
                prediction[key], _ = self.gate.check(value, embodiment, horizon=None)
        return prediction

    async def _run(self, call: Callable[..., Any], *arguments: Any) -> tuple[dict[str, Any], dict[str, float]]:
        if self.stopping:
            raise RequestError("stopping", "the server is stopping")
        asked = time.perf_counter()

        def timed() -> tuple[Any, float, float]:
            begun = time.perf_counter()
            result = call(*arguments)
            return result, begun, time.perf_counter()

        self.in_flight += 1
        try:
            result, begun, ended = await asyncio.wrap_future(self.worker.submit(timed))
        except RequestError:
            raise
        except MMSeqError as error:
            raise RequestError("refused", str(error)) from error
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            raise self._broken(call.__name__, error) from error
        finally:
            self.in_flight -= 1
        if not isinstance(result, dict):
            raise self._broken(call.__name__, TypeError(f"returned {type(result).__name__}"))
        return result, {"infer_ms": 1000 * (ended - begun), "queue_ms": 1000 * (begun - asked)}

    def _broken(self, call: str, error: BaseException) -> RequestError:
        log.error("the policy failed in %s", call, exc_info=error)
        return RequestError(
            "policy_failed", f"the policy failed in {call} with {type(error).__name__}", fix="see the server's log"
        )

    def refused(self, error: Exception) -> RequestError:
        """Count an error on its way to a client; one that is a bug of ours is logged and told as `internal`."""
        if not isinstance(error, RequestError):
            log.error("a request failed", exc_info=error)
            error = RequestError(
                "internal", f"the server failed with {type(error).__name__}", fix="see the server's log"
            )
        self.errors[error.code] += 1
        return error

    def status(self) -> dict[str, Any]:
        return {
            "uptime_s": round(time.monotonic() - self.started_at, 1),
            "in_flight": self.in_flight,
            "waiting": self.worker.waiting,
            "requests": dict(self.requests),
            "errors": dict(self.errors),
            "safety": self.gate.status(),
        }

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests and wait for those under way."""
        self.stopping = True
        deadline = time.monotonic() + timeout_s
        while self.in_flight and time.monotonic() < deadline:
            await asyncio.sleep(0.01)


def example_observation(embodiment: Embodiment, *, seed: int = 0) -> dict[str, Any]:
    """A valid random observation of `embodiment`: to try a server, to warm a model up, in tests."""
    random = np.random.default_rng(seed)
    observation: dict[str, Any] = {
        f"observation.images.{camera.name}": random.integers(0, 256, (camera.height, camera.width, 3), dtype=np.uint8)
        for camera in embodiment.cameras
    }
    if embodiment.proprio:
        low, high = np.asarray(embodiment.proprio.low), np.asarray(embodiment.proprio.high)
        observation["observation.state"] = random.uniform(low, high).astype(np.float32)
    return {**observation, "prompt": "do the task", "embodiment": embodiment.name}
