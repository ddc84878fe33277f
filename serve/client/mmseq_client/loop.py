"""The control loop of a robot: asks ahead of time, executes, splices, holds when nothing valid is left.

    with Client("127.0.0.1", 8000) as client:
        ControlLoop(client, robot, Chunking("realtime"), prompt="pick up the cup").run(seconds=60)

A background thread waits for the server; the loop itself never does.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable

import numpy as np

from mmseq_client.chunking import Ask, ChunkBuffer, Chunking
from mmseq_client.client import Client
from mmseq_client.contract import holds_position, reads_prompt, rest_action
from mmseq_client.errors import (
    ClientError,
    ContractError,
    NoObservationError,
    RefusedError,
    UnsafeActionError,
    require_seconds,
)
from mmseq_client.gate import ActionGate
from mmseq_client.past import Past
from mmseq_client.repeats import Repeats
from mmseq_client.robot import Backoff, Pace, Robot, Steps, Tick, ended_by_sigterm
from mmseq_client.stance import Stance

log = logging.getLogger("mmseq_client")

_FIRST_TIMEOUT_S = 10.0
_NOT_YET = "no chunk yet"
_STOP_CODES = ("held", "fingerprint")  # an operator's hold, another contract: what is planned counts no more
_LATE_CODES = ("late",)


class ControlLoop:
    """Drives one robot from one server.

    chunking: default what the server is configured for, else plain. prompt: sent with each observation that has
    none. max_age_s: actions of an older observation are not executed; default, and at most, the horizon.
    timeout_s: the longest wait for a reply before the connection is opened anew; the first one, which may find a
    server that still compiles, gets at least `_FIRST_TIMEOUT_S`. out_of_range, max_step: see `ActionGate`.
    shown: sent with the first observation of an episode, which the server keeps: a demonstration's frames, a goal.
    on_event(kind, detail): told of what also goes to the log: hold, resume, discarded, refused, withheld, blind,
    broke, contract, connected, clock, slow; they are counted in `counts`. clock, sleep, executor: of a simulation.

    The robot's contract is compared with the server's here, before any motion, and after each reconnection.
    Raises: ContractError that names the fields that differ, ClientError for chunking that the server cannot give;
    the first control step ClientError, before any motion, when the policy reads an instruction and there is none, or
    is to be shown something that is neither in `shown` nor observed.
    """

    def __init__(
        self,
        client: Client,
        robot: Robot,
        chunking: Chunking | None = None,
        prompt: str | None = None,
        max_age_s: float | None = None,
        timeout_s: float = 1.0,
        out_of_range: str = "clamp",
        max_step: Any = None,
        on_event: Callable[[str, str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        executor: Any = None,
        seed: int | None = None,
        shown: dict[str, Any] | None = None,
    ):
        require_seconds("timeout_s", timeout_s)
        require_seconds("max_age_s", 0 if max_age_s is None else max_age_s)
        embodiment = client.check_contract(robot.contract())
        metadata = client.metadata
        told = metadata.get("chunking")
        self._extended = told is not None  # a server that knows step, sent_at, delay, deadline_ms
        if chunking is None:
            chunking = Chunking(**{key: told[key] for key in ("mode", "execute", "decay") if key in (told or {})})
        self.client, self.robot, self.prompt, self.timeout_s = client, robot, prompt, timeout_s
        self._embodiment = embodiment
        self.gate = ActionGate(embodiment, out_of_range, max_step)
        self.rate_hz = float(embodiment["rate_hz"])
        max_age = None if max_age_s is None else int(max_age_s * self.rate_hz + 1e-6)
        prefix = bool(metadata.get("prefix"))
        self.buffer = ChunkBuffer(chunking, client.horizon, max_age, prefix, self.gate.rules.grippers)
        self._past, self._shown = Past(int(metadata.get("history", 1))), dict(shown or {})
        self._reads_text = reads_prompt(metadata)
        of_robot = lambda key: (metadata.get(key) or {}).get(embodiment.get("name"), ())
        self._kept = tuple(of_robot("kept_keys"))  # what is shown once: a demonstration, a goal
        cameras = [f"observation.images.{camera['name']}" for camera in embodiment.get("cameras", ())]
        self._known = {"observation.state", "prompt", *cameras, *of_robot("required_keys")}
        self._holds_position = holds_position(embodiment)
        self.counts: Counter[str] = Counter()
        self._on_event, self._sleep = on_event, sleep
        self._executor = executor or ThreadPoolExecutor(1, thread_name_prefix="mmseq_client")
        self._backoff = Backoff(seed)
        self._job: Any = None
        self._ask: Ask | None = None  # that the job is for; None: it connects
        self._connected, self._retry_at = True, 0.0
        self._last: np.ndarray | None = None  # commanded
        self._stance = Stance(self.gate)
        self._stands: np.ndarray | None = None  # where it was while it rested
        self._rests = True  # stopped by an operator, or not begun: somebody may move it by hand
        self._holding, self._stopping, self._reset, self._answered = False, False, True, False
        self._steps = Steps(self.rate_hz, clock)
        self._pace = Pace(self.rate_hz)
        self._said = Repeats()  # such as each try during a hold
        self.why = _NOT_YET  # nothing valid is left: the last thing that went wrong

    def run(self, seconds: float | None = None) -> None:
        """Control steps at the robot's rate until the time is over or `end` is called; the robot stops after it.

        On the main thread also on SIGTERM, which ends the process after that, unless a handler is installed.
        Raises: whatever the robot raises.
        """
        self._stopping = False
        with ended_by_sigterm(self.end):
            self._steps.due()
            began, failed = self._steps.now, True
            try:
                while not self._stopping and (seconds is None or self._steps.clock() - began < seconds):
                    self.tick()
                    self._sleep(
                        min(1 / self.rate_hz, max(0.0, self._steps.left_s()))
                    )  # a clock that jumps must not make it wait
                failed = False
            finally:
                self._forget()  # whoever runs on later begins anew: the arm may be elsewhere then
                try:
                    self.robot.stop()
                except Exception:
                    log.exception("the robot failed to stop")
                    if not failed:  # else what went wrong first is raised
                        raise

    def close(self) -> None:
        """End the background thread; a wait for a reply ends with the connection."""
        self.client.close()
        self._executor.shutdown()
        self.client.close()  # what it opened meanwhile

    def end(self) -> None:
        """Let `run` return after the control step under way; from any thread."""
        self._stopping = True

    def reset(self) -> None:
        """A new episode: no action of the old one is executed any more, and what moves by itself is stopped."""
        if self._last is not None and not self._holds_position:
            self._command(self._rest(self._last))
        self._forget()
        self.why = "a new episode"

    def _forget(self) -> None:
        self.buffer.restart()
        self._past.clear()
        self._last = self._stands = None
        self._reset, self._rests, self._holding = True, True, False

    def _rest(self, last: np.ndarray) -> np.ndarray:
        """`rest_action`; `max_step` does not delay it."""
        return self.gate.check_chunk(rest_action(self._embodiment, last)[None], 1, clamp=True)[0]

    @property
    def _before(self) -> np.ndarray | None:
        """What the next action is limited from, (axes,)."""
        return self._stands if self._rests else self._last

    def _command(self, action: np.ndarray) -> None:
        self._last = action
        self._past.commanded(self._steps.step, action[np.newaxis])
        self.robot.act(action.copy())  # what a robot does to its own is not what was commanded

    def tick(self) -> Tick:
        """One control step, now."""
        step = self._advance()
        self._collect(step)
        asked = self._request(step)
        if asked:
            step = self._after_observing()
            self._collect(step)  # in a simulation the answer may be there at once
        elif self._past.steps > 1:  # a policy that looks back
            with contextlib.suppress(NoObservationError):
                self._observe(step)
            step = self._after_observing()
        planned = self.buffer.action(step)
        action = None
        if planned is not None:
            try:
                action = self.gate.check_action(
                    planned.action,
                    self._before,
                    age_steps=planned.age_steps,
                    max_age=planned.max_age,
                    clamp=self._rests,
                )
            except UnsafeActionError as error:
                self.buffer.reset()
                self._event("withheld", str(error))
        self.counts["ticks"] += 1
        if planned is None or action is None:
            return self._hold(step, asked)
        if self._holding:
            self._holding = False
            self._event("resume", f"step {step}")
        self._rests = False
        self._command(action)
        self.buffer.commanded(step)
        return Tick(step, action.copy(), False, asked, planned.sequence, planned.age_steps)

    def _observe(self, step: int) -> dict[str, Any]:
        """What the robot sees now; from its state also whether it follows its commands."""
        observation = dict(self.robot.observe())
        self._past.add(step, observation)
        if self._rests:
            self._stands = self._stance.stands(observation, self._last)
        elif self._last is not None:
            self._stance.moves(observation, self._last)
        return observation

    def _after_observing(self) -> int:
        """The control step that it is once the robot has observed: a camera that blocked has used up some."""
        passed = self._steps.catch_up()
        if passed:
            self._skip(passed)
        return self._steps.step

    def _advance(self) -> int:
        """The number of the control step that the clock says it is, always after the one before."""
        skipped, back_s = self._steps.advance()
        if back_s:  # nobody knows how long ago the last observation was
            self._retry_at, self._pace = self._steps.now, Pace(self.rate_hz)
            self.buffer.reset()
            self._event("clock", f"it went back by {back_s:.3f} s")
        if skipped:
            self._skip(skipped)
        return self._steps.step

    def _skip(self, steps: int) -> None:
        """Count control steps without a command, and say so where they are more than a few."""
        self.counts["skipped"] += steps
        slow = self._pace.skipped(self._steps.now, steps)
        if slow:
            self._event("slow", slow)

    def _request(self, step: int) -> bool:
        """Ask for the next chunk, or for a connection, when it is time. Returns: whether something was asked."""
        if self._job is not None or self._steps.now < self._retry_at:
            return False
        if not self._connected:
            self._ask = None
            self._job = self._executor.submit(self._reconnect)
            return True
        self._ask = self.buffer.ask(step)
        if self._ask is None:
            return False
        try:
            observation = self._observe(step)
        except NoObservationError as error:
            self._give_up(self._ask, step, self._backoff.pause_s())
            self._ask = None
            self._event("blind", str(error))
            return False
        if self.prompt is not None:
            observation.setdefault("prompt", self.prompt)
        if self._reads_text and not str(observation.get("prompt") or "").strip():
            raise ClientError(
                "the policy reads an instruction, and there is none: give ControlLoop(prompt=...), or the robot's "
                "observe() a 'prompt'"
            )
        if not self.counts["requests"]:
            self._require_shown(observation)
        if len(self._ask.prefix):
            observation["action_prefix"] = self._ask.prefix
        if self._extended:
            use = self._ask.delay if len(self._ask.prefix) else max(self.buffer.delay, self.buffer.max_age)
            observation.update(
                step=step,
                executed=self._ask.executed,
                sent_at=self._steps.now,
                delay=self._ask.delay,
                deadline_ms=1000.0 * max(1, use) / self.rate_hz,
                chunking="plain",  # the chunking is done here
            )
            if self._reset:
                observation.update(self._shown, reset=True)
        timeout_s = self.timeout_s if self._answered else max(self.timeout_s, _FIRST_TIMEOUT_S)
        observation = self._past.stacked(step, observation)
        self._job = self._executor.submit(self.client.infer, observation, timeout_s, False)
        self.counts["requests"] += 1
        return True

    def _require_shown(self, observation: dict[str, Any]) -> None:
        """Raises: ClientError when the policy is to be shown what nobody shows. A key that only the server knows, by
        its aliases, may be just that: then the server decides."""
        missing = [key for key in self._kept if key not in observation and key not in self._shown]
        if missing and self._extended and self._known.issuperset(observation):
            what = "frames (n, H, W, 3)" if missing[0].startswith("demo.") else "a frame (H, W, 3)"
            raise ClientError(
                f"the policy is to be shown {', '.join(missing)}, and nobody shows it: give "
                f"ControlLoop(shown={{{missing[0]!r}: ...}}), {what}, or let the robot's observe() have it"
            )

    def _reconnect(self) -> None:
        self.client.close()
        self.client.connect(0.0)

    def _collect(self, step: int) -> None:
        """Take what the background has brought, if it has."""
        if self._job is None or not self._job.done():
            return
        job, ask = self._job, self._ask
        self._job = self._ask = None
        try:
            reply = job.result()
        except RefusedError as error:
            self._refused(error, ask, step)
        except Exception as error:  # whatever a server sent, the loop goes on and holds
            self._connected = False
            if isinstance(error, ContractError):
                self.buffer.reset()
            self._give_up(ask, step, self._backoff.pause_s())
            what = str(error) if isinstance(error, ClientError) else repr(error)
            self._event("contract" if isinstance(error, ContractError) else "broke", what)
        else:
            self._answered |= ask is not None
            if ask is None:
                self._connected, self._retry_at, self._reset = True, self._steps.now, True
                self._event("connected", f"{self.client.metadata.get('name')}")
            else:
                self._accept(reply, ask, step)

    def _accept(self, reply: dict[str, Any], ask: Ask, step: int) -> None:
        try:
            actions = self.gate.check_chunk(reply.get("actions"), self.buffer.horizon)
            of = reply.get("step", ask.step) if self._extended else ask.step
            if not isinstance(of, int) or of != ask.step:
                raise UnsafeActionError(f"the reply is for control step {of!r:.40}, asked was {ask.step}")
            previous, clamp = self._before, self._rests
            discarded = self.buffer.accept(
                ask.sequence, actions, step, lambda rows: self.gate.limit_steps(rows, previous, clamp)
            )
        except UnsafeActionError as error:
            self._give_up(ask, step, self._backoff.pause_s())
            self._event("withheld", str(error))
            return
        self._retry_at = self._steps.now
        self._backoff.over()
        self._reset &= discarded == "out of order"  # the answer to a request from before the reset
        if discarded is not None:
            self._event("discarded", discarded)
        elif self.buffer.delay >= self.buffer.horizon:
            self.why = f"an answer takes {self.buffer.delay} control steps, a chunk has {self.buffer.horizon}"

    def _refused(self, error: RefusedError, ask: Ask | None, step: int) -> None:
        if error.code in _STOP_CODES:
            self.buffer.reset()
            self._rests, self._stands = True, self._last
        if ask is None or error.closed:
            self._connected = False
        pause = self._backoff.pause_s(error.retry_after_ms)
        self._give_up(ask, step, pause, late=error.code in _LATE_CODES)
        self._event("refused", str(error))

    def _give_up(self, ask: Ask | None, step: int, pause: float, late: bool = False) -> None:
        if ask is not None:
            self.buffer.lost(ask.sequence, step, late)
        self._retry_at = self._steps.now + pause

    def _hold(self, step: int, asked: bool) -> Tick:
        self.counts["held"] += 1
        if self._last is None:
            self.counts["waited"] += 1
        if not self._holding:
            self._holding = True
            self._event("hold", f"step {step}: {self.why}")
        if self._last is None:
            return Tick(step, None, True, asked)  # nothing was commanded yet, so there is nothing to take back
        action = self._rest(self._last)
        self._command(action)
        return Tick(step, action.copy(), True, asked)

    def _event(self, kind: str, detail: str) -> None:
        self.counts[kind] += 1
        quiet = kind in ("resume", "connected", "discarded") or (kind == "hold" and self.why == _NOT_YET)
        if kind not in ("hold", "resume", "connected", "slow"):
            self.why = f"{kind}: {detail}"
        if self._said.is_news(kind, self._steps.now, detail):
            log.log(logging.INFO if quiet else logging.WARNING, "%s: %s", kind, detail)
        if self._on_event is not None:
            self._on_event(kind, detail)
