"""Lock-step: the same outcomes for any number of workers, each robot asked for its own task, failures told."""

import time

import numpy as np
import pytest

pytest.importorskip("metaworld")

from mmseq.errors import ConfigError, MMSeqError
from mmseq.evaluation.lockstep import Layout, drive
from mmseq.simulation.experts import run_expert, task_language
from mmseq.simulation.metaworld import MetaWorldEnv

LAYOUTS = [Layout(task, seed) for task in ("handle-press", "coffee-button") for seed in range(3)]


class Replay:
    """What the expert did in each layout, `chunk` steps at a time; still where `idle` says so."""

    def __init__(self, chunk: int = 1, idle: tuple[int, ...] = ()):
        self.chunk, self.idle, self.asked, self.known = chunk, idle, [], {}
        for task in {layout.task for layout in LAYOUTS}:
            env = MetaWorldEnv(task)
            for layout in (one for one in LAYOUTS if one.task == task):
                self.known[layout] = run_expert(env, layout.seed)
            env.close()

    def act(self, seen):
        self.asked.append([(one.layout, one.step, one.text) for one in seen])
        return [
            np.zeros((1, 4)) if one.layout.seed in self.idle else self.known[one.layout][one.step :][: self.chunk]
            for one in seen
        ]


@pytest.fixture(scope="module")
def replay():
    return Replay()


@pytest.mark.parametrize("workers", [1, 2])
def test_what_the_expert_did_succeeds_in_its_own_layout(replay, workers):
    replay.asked.clear()
    told = []
    found = drive(replay, LAYOUTS, workers=workers, on_progress=lambda *p: told.append(p))
    assert [o.layout for o in found] == LAYOUTS
    assert all(o.success for o in found)
    assert [o.steps for o in found] == [len(replay.known[layout]) for layout in LAYOUTS]
    assert told[-1] == (6, 6)
    words = {layout.task: text for asked in replay.asked for layout, _, text in asked}
    assert words == {task: task_language(task).instructions[0] for task in words}
    assert max(map(len, replay.asked)) == 6 // workers


def test_chunks_are_executed_whole_and_end_with_success(replay):
    chunks = Replay(chunk=4)
    found = drive(chunks, LAYOUTS, workers=1)
    assert [o.steps for o in found] == [len(replay.known[layout]) for layout in LAYOUTS]
    assert {step % 4 for asked in chunks.asked for _, step, _ in asked} == {0}


def test_whoever_stands_still_has_failed_after_the_last_step():
    found = drive(Replay(idle=(1,)), LAYOUTS, workers=1, max_steps=30)
    assert [o.success for o in found] == [True, False, True] * 2
    assert {o.steps for o in found if not o.success} == {30}


def test_more_episodes_than_simulators_and_options(replay):
    many = [Layout("coffee-button", seed % 3, (("spread", 1.0),)) for seed in range(11)]
    replay.known |= {layout: replay.known[Layout("coffee-button", layout.seed)] for layout in many}
    assert all(o.success for o in drive(replay, many, workers=1))


def test_words_can_be_chosen(replay):
    replay.asked.clear()
    drive(replay, LAYOUTS[:1], workers=1, texts=lambda layout, instructions: instructions[-1], max_steps=2)
    assert replay.asked[0][0][2] == task_language("handle-press").instructions[-1]


def test_a_simulator_that_fails_while_others_are_decided_for_says_why(replay):
    """Its process is gone when it is told what to do next."""

    class Slow(Replay):
        def act(self, seen):
            if len(seen) < 8:  # one has ended, and the next of its simulator's cannot be made
                time.sleep(1.5)
            return super().act(seen)

    with pytest.raises(MMSeqError, match="no Meta-World task 'zero'"):
        drive(Slow(), [*LAYOUTS, *LAYOUTS[:2], Layout("zero", 0)], workers=1)


def test_what_goes_wrong_is_told(replay):
    class Idle:
        def act(self, seen):
            return [np.zeros((0, 4)) for _ in seen]

    with pytest.raises(MMSeqError, match="decided for no step"):
        drive(Idle(), LAYOUTS[:1])
    with pytest.raises(ConfigError, match="workers is 0"):
        drive(replay, LAYOUTS, workers=0)
    with pytest.raises(ConfigError, match="no episode"):
        drive(replay, [])
    with pytest.raises(MMSeqError, match="no Meta-World task 'handle-pres'"):
        drive(replay, [Layout("handle-pres", 0)], workers=1)
    with pytest.raises(MMSeqError, match="shift"):
        drive(replay, [Layout("handle-press", 0, (("shift", "x"),))], workers=1)
