"""Many episodes at once, in lock-step: one batched decision for all robots, then one control step of all.

    outcomes = drive(controller, [Layout("window-open", seed) for seed in range(100_000, 100_020)], max_steps=90)

Where `closed_loop` measures a robot with its server, its clock and its delays, this measures a policy alone, as fast as
the machine allows: simulators step in processes of their own while the other half of the robots is decided for.
"""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np

from mmseq.errors import ConfigError, MMSeqError
from mmseq.simulation.workers import start_worker

SIMULATORS = 8  # of a worker; what is decided together are the robots of one worker


@dataclass(frozen=True)
class Layout:
    """An episode to drive: a task of the simulator, the seed of its layout, and how the simulator is made."""

    task: str
    seed: int
    options: tuple[tuple[str, Any], ...] = ()  # of the simulator: spread, shift, camera, ...


@dataclass
class Seen:
    """What one robot may know at a control step: its observation (`Simulator.observe`), and what it is asked for."""

    layout: Layout
    observation: dict[str, np.ndarray]
    text: str
    step: int


@dataclass(frozen=True)
class Outcome:
    """How an episode ended. steps: control steps that it took."""

    layout: Layout
    success: bool
    steps: int


class Controller(Protocol):
    """What decides for several robots at once.

    `act` returns one array (steps, axes) for each, steps >= 1: what is executed until it is asked again.
    """

    def act(self, seen: Sequence[Seen]) -> Sequence[np.ndarray]: ...


@dataclass
class _Worker:
    """A process with simulators, seen from here."""

    process: Any
    pipe: Connection
    waiting: deque[int] = field(default_factory=deque)  # episodes that no simulator has begun


def drive(
    controller: Controller,
    layouts: Sequence[Layout],
    *,
    simulator: str = "metaworld",
    max_steps: int = 90,
    workers: int = 2,
    texts: Callable[[Layout, Sequence[str]], str] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Outcome]:
    """Drive every layout to its success or for `max_steps`; outcomes in the order of `layouts`.

    texts: chooses what a robot is asked for among the simulator's instructions; default: the plainest.
    Raises: ConfigError without layouts; MMSeqError for what goes wrong in a simulator.
    """
    if workers < 1:
        raise ConfigError(f"workers is {workers}", fix="give at least 1")
    if not layouts:
        raise ConfigError("there is no episode to drive", fix="name at least one layout")
    order = sorted(range(len(layouts)), key=lambda i: (repr(layouts[i].options), layouts[i].task))  # making one is slow
    outcomes: dict[int, Outcome] = {}
    context = multiprocessing.get_context("spawn")  # OpenGL does not survive a fork
    started: list[_Worker] = []
    try:
        share = -(-len(order) // workers)
        for first in range(0, len(order), share):
            here, there = context.Pipe()
            process = context.Process(target=_simulate, args=(there, simulator, max_steps), daemon=True)
            process.start()
            there.close()
            worker = _Worker(process, here, deque(order[first : first + share]))
            started.append(worker)
            for slot in range(min(SIMULATORS, len(worker.waiting))):
                _begin(worker, slot, layouts)
            _send(worker, "look")
        busy = deque(started)
        while busy:
            worker = busy.popleft()
            if _turn(worker, controller, layouts, outcomes, texts):
                busy.append(worker)
            if on_progress is not None:
                on_progress(len(outcomes), len(layouts))
    finally:
        for worker in started:
            worker.pipe.close()
            worker.process.terminate()
            worker.process.join()
    return [outcomes[i] for i in range(len(layouts))]


def _begin(worker: _Worker, slot: int, layouts: Sequence[Layout]) -> None:
    number = worker.waiting.popleft() if worker.waiting else None
    _send(worker, "begin", slot, number, None if number is None else layouts[number])


def _send(worker: _Worker, what: str, slot: int | None = None, number: int | None = None, payload: Any = None) -> None:
    with suppress(OSError):  # it ended: why is what is received next
        worker.pipe.send((what, slot, number, payload))


def _turn(
    worker: _Worker,
    controller: Controller,
    layouts: Sequence[Layout],
    outcomes: dict[int, Outcome],
    texts: Callable[[Layout, Sequence[str]], str] | None,
) -> bool:
    """Decide for a worker's robots; they then move while others are decided for. Returns whether any is left."""
    try:
        found = worker.pipe.recv()
    except (EOFError, OSError):
        raise MMSeqError("a simulator's process ended without a word", fix="give the machine more memory") from None
    if isinstance(found, str):
        raise MMSeqError(f"a simulator failed: {found}")
    asking = []
    for slot, number, observation, instructions, step, ended in found:
        layout = layouts[number]
        if ended is not None:
            outcomes[number] = Outcome(layout, *ended)
            _begin(worker, slot, layouts)
        elif observation is not None:
            text = texts(layout, instructions) if texts else instructions[0]
            asking.append((slot, Seen(layout, observation, text, step)))
    if asking:
        chunks = controller.act([seen for _, seen in asking])
        if not all(map(len, chunks)):
            raise MMSeqError("the controller decided for no step", fix="give at least one action each time it is asked")
        _send(worker, "act", payload={slot: chunk for (slot, _), chunk in zip(asking, chunks, strict=True)})
    if found:
        _send(worker, "look")
    return bool(found)


def _simulate(pipe: Connection, simulator: str, max_steps: int) -> None:
    """A worker: simulators in slots, each with the episode that it has and the actions that it was given."""
    start_worker()
    from mmseq.plugins import find

    make, slots = find("simulators", simulator), {}
    try:
        while True:
            what, slot, number, payload = pipe.recv()
            if what == "begin":
                old = slots.pop(slot, None)
                if payload is None:
                    continue
                env = old.env if old is not None and old.made_for(payload) else None
                if old is not None and env is None:
                    old.env.close()
                env = env or make(payload.task, **dict(payload.options))
                env.reset(payload.seed)
                slots[slot] = _Slot(env, payload, number)
            elif what == "act":
                for slot, chunk in payload.items():
                    slots[slot].execute(np.asarray(chunk), max_steps)
            else:
                pipe.send([(slot, *state.report(max_steps)) for slot, state in slots.items()])
    except EOFError:
        pass
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


class _Slot:
    """A simulator and the episode that it is in."""

    def __init__(self, env: Any, layout: Layout, number: int):
        self.env, self.layout, self.number = env, layout, number
        self.steps, self.success = 0, False

    def made_for(self, layout: Layout) -> bool:
        return (layout.task, layout.options) == (self.layout.task, self.layout.options)

    def execute(self, chunk: np.ndarray, max_steps: int) -> None:
        for action in chunk:
            if self.success or self.steps >= max_steps:
                return
            self.success = bool(self.env.act(action))
            self.steps += 1

    def report(self, max_steps: int) -> tuple:
        if self.success or self.steps >= max_steps:
            return self.number, None, (), self.steps, (self.success, self.steps)
        return self.number, self.env.observe(), tuple(self.env.instructions), self.steps, None
