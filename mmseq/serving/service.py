"""A request from its decoding to its reply, without any network: check, schedule, infer, splice, gate, timing."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from mmseq_client.chunking import Delays
from mmseq_client.repeats import Repeats

from mmseq.embodiment import Embodiment
from mmseq.errors import ServeError
from mmseq.serving.answers import answer, broken
from mmseq.serving.chunking import Chunking, take_turn
from mmseq.serving.errors import RequestError
from mmseq.serving.holds import NO_REASON, Holds
from mmseq.serving.keys import STATE, check_aliases
from mmseq.serving.observation import ObservationRules, check_given, check_observation
from mmseq.serving.policy import Contract, Policy, prepare
from mmseq.serving.safety import GateConfig, SafetyGate
from mmseq.serving.scheduler import Job, Scheduler, SchedulerConfig, make_job
from mmseq.serving.session import Session

log = logging.getLogger("mmseq.serving")

MAX_ARROW = 2000  # characters
HELD_CLOSE, HANG_UP_S = 1012, 0.5  # "service restart"; within which it is told
HELD_RETRY_MS = 200.0  # how soon a held client may ask whether the hold is over


class Service:
    """One policy behind its contract. The coroutines belong to one event loop. hold_file: see `Holds`.

    on_reply: told (seconds of the whole request, seconds of the model, requests in its batch) of each answer.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        rules: ObservationRules | None = None,
        gate: GateConfig | None = None,
        scheduling: SchedulerConfig | None = None,
        chunking: Chunking | None = None,
        hold_file: str | None = None,
    ):
        self.policy = policy
        contract = Contract.from_policy(policy)
        self.chunking = (chunking or Chunking()).resolve(contract.horizon, prefix=contract.prefix)
        self.contract = contract.chunked(self.chunking)
        self.rules = rules or ObservationRules()
        check_aliases(self.rules.aliases, self.contract)
        self.gate = SafetyGate(gate or GateConfig())
        self.scheduler = Scheduler(lambda batch: answer(self.policy, batch), scheduling or SchedulerConfig())
        self.on_reply: Callable[[float, float, int], None] | None = None
        self.started_at = time.monotonic()
        self.requests: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.sessions: dict[int, Session] = {}
        self.delays = Delays()
        self.in_flight = 0
        self._jobs: set[Job] = set()  # that somebody waits for
        self.stopping = False
        self.warm, self.cold = False, "warming up"
        self.broken = False  # it failed to warm up
        self.holds = Holds(hold_file)
        self.reloads = 0
        self._told = Repeats()

    # Sessions

    def open(self, peer: str = "") -> Session:
        session = Session(self.chunking, self.contract.horizon, peer=peer)
        self.sessions[session.number] = session
        self.scheduler.robots = len(self.sessions)
        log.info("robot connected: %s, session %d", peer, session.number)
        return session

    def close(self, session: Session) -> None:
        """Its robot is gone: nobody waits for what it asked."""
        if self.sessions.pop(session.number, None) is not None:
            name = session.embodiment or "no valid observation"
            log.info("robot gone: %s (%s), %d requests", session.peer, name, session.requests)
        self.scheduler.robots = len(self.sessions)
        if session.job is not None:
            self.scheduler.cancel(session.job)

    # The operators' holds

    @property
    def held(self) -> str | None:
        """Why every request is answered `held`; None when none is."""
        return str(self.holds) if self.holds.reasons else None

    def hold(self, reason: str, id: str | None = None) -> str:
        """Answer every request with `held` from now on, those under way included; the hold's id.

        id: of a hold of another replica, or of one in force that gets this reason.
        """
        begun, id = self.holds.begun, self.holds.begin(reason, id)
        if begun == self.holds.begun:
            log.warning("the reason of hold %s: %s", id, reason)
            return id
        log.warning("held by an operator (%s)%s", id, "" if reason == NO_REASON else f": {reason}")
        for session in self.sessions.values():
            session.forget()  # a robot that was stopped does not go on with what it was sent
        for job in list(self._jobs):  # also what is being computed: a robot is told at once
            self.scheduler.cancel(job, self._held())
        return id

    def release(self, id: str | None = None, *, every: bool = False) -> None:
        """End a hold, see `Holds.end`; robots are held while one is left. Raises: RequestError."""
        if id is not None or self.holds.reasons:
            ended = ", ".join(f"{id} ({reason})" for id, reason in self.holds.end(id, every=every).items())
            log.warning("ended: %s; robots are %s", ended, "free" if self.held is None else f"held: {self.held}")

    def unless_held(self, begun: int) -> None:
        """Raises: RequestError `held` when a hold was begun after the first `begun` ones."""
        if begun != self.holds.begun:
            raise self._held()

    def _held(self) -> RequestError:
        reason = self.held or "released meanwhile"
        return RequestError(
            "held",
            f"an operator holds every robot: {reason}",
            fix="keep the robot where it is, and ask again",
            retry_after_ms=HELD_RETRY_MS,
            reason=reason,
        )

    def _admit(self) -> None:
        if self.held is not None:  # also by a server that stops: else its robots go on to the end of their chunks
            raise self._held()
        if self.stopping:
            raise RequestError("stopping", "the server is stopping")

    # Requests

    async def infer(self, observation: dict[str, Any], session: Session) -> dict[str, Any]:
        """The reply to an observation: `actions` float32 (H, A), `policy_timing`, `server_timing` in ms, and the
        observation's `step` and `sent_at`.

        Raises: RequestError.
        """
        arrived = time.monotonic()
        self.requests["infer"] += 1
        session.requests += 1
        quiet_s, session.asked_at = arrived - session.asked_at, arrived
        self._admit()
        turn, observation = take_turn(observation)
        checked, embodiment = check_observation(observation, self.contract, self.rules)
        session.serves(embodiment.name, self.contract)
        memory = session.memory
        quiet_steps = quiet_s * embodiment.rate_hz
        if turn.step is None and quiet_steps > self.contract.horizon:
            session.forget()  # all that was sent is executed: what this robot did since nobody knows
        if turn.step is None and quiet_steps > 2 * max(self.contract.horizon, self.contract.history):
            session.history.forget()  # nor is this what it saw just before
        session.standing |= turn.reset
        step = memory.begin(turn)
        if turn.reset:
            session.history.forget(episode=True)
        checked = session.history.fill(checked, step, passed=max(1, round(quiet_steps)))
        mode = "plain" if turn.chunking == "plain" else self.chunking.mode
        if mode == "realtime" and step is not None and "action_prefix" not in checked:
            delay = math.ceil(self.delays.usual * embodiment.rate_hz) if turn.delay is None else turn.delay
            prefix = memory.prefix(step, delay)
            if prefix is not None:
                checked["action_prefix"] = prefix
        place = step if turn.executed is None else turn.executed
        if place is not None:
            checked["step"] = place
        job = make_job(self.policy, "infer", (checked,), arrived, turn.deadline_ms)
        result = await self._run(job, session)
        if "actions" not in result:
            raise broken("infer", TypeError(f"no 'actions' in {sorted(result)}"))
        actions, prefix = result["actions"], checked.get("action_prefix")
        # a client that splices chunks itself limits from what its robot did: what it was sent says nothing of that
        before = memory.before(step) if step is not None and turn.chunking != "plain" else None
        stood = before is None and turn.chunking != "plain" and (session.standing or step is not None)
        if stood:
            before = self.gate.observed(_latest(checked.get(STATE)), embodiment)
        first: dict[str, Any] = {}
        if mode == "ensemble" and step is not None:
            # only what passed by itself is averaged: one outlier would pull the mean for a whole horizon
            chunk, first = self.gate.check(actions, embodiment, horizon=self.contract.horizon)
            actions = memory.ensemble(step, chunk, self.gate.rules(embodiment).grippers)
        reply = dict(result)
        reply["actions"], safety = self.gate.check(
            actions, embodiment, horizon=self.contract.horizon, prefix=prefix, before=before, stood=stood
        )
        if mode == "ensemble" and step is not None:
            self.gate.counted_twice(clamped=bool(first and safety))
        took = time.monotonic() - arrived
        self.gate.stale(1000 * took)
        memory.remember(step, reply["actions"])
        session.history.remember(step, reply["actions"])
        session.standing = False
        self.delays.add(took)
        if safety or first:
            reply["safety"] = safety or first
        timing = self._timing(job)
        reply.setdefault("policy_timing", {"infer_ms": timing["infer_ms"]})
        reply["server_timing"] = timing
        if turn.step is not None:
            reply["step"] = turn.step
        if turn.sent_at is not None:
            reply["sent_at"] = turn.sent_at
        return reply

    async def predict(self, body: dict[str, Any]) -> tuple[dict[str, Any], float]:
        """`{"arrow": text, "observation": map}` -> `{"prediction": {stream: value}, "server_timing": {...}}`, and the
        rate of its steps in Hz.

        Predicted actions go through the safety gate like those of `infer`. Raises: RequestError.
        """
        arrived = time.monotonic()
        self.requests["predict"] += 1
        self._admit()
        arrow, observation = body.get("arrow"), body.get("observation")
        if not isinstance(arrow, str) or not isinstance(observation, dict) or set(body) != {"arrow", "observation"}:
            raise RequestError(
                "malformed", f"expected arrow (text) and observation (map), got {sorted(map(str, body))[:8]}"
            )
        if len(arrow) > MAX_ARROW:
            raise RequestError(
                "too_large", f"the arrow has {len(arrow)} characters, at most {MAX_ARROW} are read", key="arrow"
            )
        if not all(isinstance(key, str) for key in observation):
            raise RequestError("malformed", "the keys of an observation are text", key="observation")
        checked, embodiment = check_given(observation, self.contract, self.rules, arrow)
        job = make_job(self.policy, "predict", (arrow, checked), arrived)
        prediction = self._gate_prediction(dict(await self._run(job, None)), embodiment)
        return {"prediction": prediction, "server_timing": self._timing(job)}, embodiment.rate_hz

    def _gate_prediction(self, prediction: dict[str, Any], embodiment: Embodiment) -> dict[str, Any]:
        for key, value in prediction.items():
            if key.partition("@")[0] in ("action", "actions"):
                prediction[key], _ = self.gate.check(value, embodiment, horizon=None)
        return prediction

    async def _run(self, job: Job, session: Session | None) -> dict[str, Any]:
        begun = self.holds.begun
        self.scheduler.submit(job)
        self._jobs.add(job)
        if session is not None:
            session.job = job
        self.in_flight += 1
        try:
            result = await job.future
        except asyncio.CancelledError:
            self.scheduler.cancel(job)  # not its future alone: the queue counts those that wait
            raise
        finally:
            self.in_flight -= 1
            self._jobs.discard(job)
            if session is not None:
                session.job = None
        self.unless_held(begun)
        if self.on_reply is not None:
            self.on_reply(time.monotonic() - job.arrived, job.ended - job.begun, job.batch)
        return result

    @staticmethod
    def _timing(job: Job) -> dict[str, float]:
        queue_ms, infer_ms = 1000 * (job.begun - job.arrived), 1000 * (job.ended - job.begun)
        return {"infer_ms": infer_ms, "queue_ms": queue_ms, "batch": job.batch}

    # Its life

    def start(self) -> None:
        self.scheduler.start(self._warm_up)

    def _warm_up(self) -> None:
        try:
            prepare(self.policy)
            self.warm = True
            log.info("ready after %.1f s", time.monotonic() - self.started_at)
        except Exception as error:
            log.exception("the policy failed to warm up")
            self.cold, self.broken = f"the policy failed to warm up: {error}", True

    def turned_away(self, peer: str, error: RequestError) -> None:
        """Log why nobody served a peer, now and then for a machine: others try again and again."""
        if self._told.is_news(peer.rpartition(":")[0], time.monotonic()):
            log.warning("refused %s: %s: %s", peer, error.code, error)

    def refused(self, error: Exception) -> RequestError:
        """Count an error on its way to a client; one that is a bug of ours is logged and told as `internal`."""
        if not isinstance(error, RequestError):
            log.error("a request failed", exc_info=error)
            error = RequestError(
                "internal", f"the server failed with {type(error).__name__}", fix="see the server's log"
            )
        self.errors[error.code] += 1
        return error

    def replace(self, policy: Policy) -> None:
        """Serve `policy` from the next batch on; sessions stay. Raises: ServeError unless its contract is the same."""
        contract = Contract.from_policy(policy).chunked(self.chunking)
        differing = self.contract.differences(contract)
        if differing:
            raise ServeError(
                f"the new policy has another contract: {'; '.join(differing)}", fix="start a second server for it"
            )
        self.policy, self.warm, self.broken, self.contract = policy, True, False, contract
        self.reloads += 1
        log.info("loaded again: %s, checkpoint %s", contract.name, contract.checkpoint)

    def not_ready(self, stuck_s: float) -> str | None:
        """Why no request should be sent here; None when this server is ready."""
        if self.stopping:
            return "stopping"
        if not self.warm:
            return self.cold
        if self.scheduler.busy_s > stuck_s:
            return f"the model has been busy for {self.scheduler.busy_s:.0f} s"
        return None

    def status(self) -> dict[str, Any]:
        return {
            "uptime_s": round(time.monotonic() - self.started_at, 1),
            "held": self.held,
            "holds": self.holds.listed(),
            "in_flight": self.in_flight,
            "waiting": self.scheduler.waiting,
            "requests": dict(self.requests),
            "errors": dict(self.errors),
            "batches": {str(size): count for size, count in sorted(self.scheduler.stats.sizes.items())},
            "sessions": [session.status() for session in list(self.sessions.values())[:256]],
            "reloads": self.reloads,
            "safety": self.gate.status(),
        }

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests and wait for those under way; tell robots of a hold that is in force."""
        self.stopping = True
        log.info("stopping: %d requests under way get %.0f s, %d robots", self.in_flight, timeout_s, len(self.sessions))
        deadline = time.monotonic() + timeout_s
        while self.in_flight and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        if self.held is not None:  # a robot that has not asked since must not take this for a broken connection
            reason = f"held: {self.held}".encode()[:120].decode("utf-8", "ignore")
            told = [s.hang_up(HELD_CLOSE, reason) for s in self.sessions.values() if s.hang_up is not None]
            with suppress(TimeoutError):
                await asyncio.wait_for(asyncio.gather(*told, return_exceptions=True), HANG_UP_S)


def _latest(state: Any) -> Any:
    """The state of now, where the last ones are stacked."""
    return state[-1] if getattr(state, "ndim", 1) == 2 else state
