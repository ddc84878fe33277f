import numpy as np
import pytest
from mmseq_client import ChunkBuffer, Chunking, ClientError
from mmseq_client.chunking import Delays, ensemble

H = 16


def chunk(step: int, horizon: int = H) -> np.ndarray:
    """(H, 2): the step of its observation, and the control step that each row is for."""
    return np.stack([np.full(horizon, step), step + np.arange(horizon)], 1).astype(np.float32)


def play(buffer: ChunkBuffer, steps: int, delay: int, *, model=chunk, first: int = 0) -> list:
    """The plan of every control step with answers that take `delay` steps; a forced prefix is kept."""
    flight, plans = None, []
    for step in range(first, first + steps):

        def answer(now: int) -> None:
            nonlocal flight
            if flight and now >= flight.step + delay:
                actions = model(flight.step)
                actions[: len(flight.prefix)] = flight.prefix.reshape(-1, actions.shape[1])
                buffer.accept(flight.sequence, actions, now)
                flight = None

        answer(step)
        ask = buffer.ask(step)
        flight = ask or flight
        answer(step)
        plans.append(buffer.action(step))
    return plans


@pytest.mark.parametrize("mode", ["plain", "realtime"])
@pytest.mark.parametrize("execute", [1, 4, 8, 16])
def test_without_delay_a_chunk_is_executed_from_its_beginning_and_replaced_after_execute_steps(mode, execute):
    plans = play(ChunkBuffer(Chunking(mode, execute), H), 40, 0)
    found = np.stack([plan.action for plan in plans])
    np.testing.assert_array_equal(found[:, 1], np.arange(40))
    np.testing.assert_array_equal(found[:, 0], np.arange(40) // execute * execute)


@pytest.mark.parametrize("delay", [1, 3, 5, 8])
@pytest.mark.parametrize("mode", ["plain", "realtime", "ensemble"])
def test_with_delay_only_the_beginning_holds_and_each_step_gets_its_own_row(mode, delay):
    plans = play(ChunkBuffer(Chunking(mode, 8), H), 100, delay)
    assert [plan is None for plan in plans] == [True] * delay + [False] * (100 - delay)
    first_round = next(i for i, plan in enumerate(plans) if plan and plan.sequence > 1)
    for step in range(first_round, 100):
        row = plans[step].action[1]
        assert row == pytest.approx(step, abs=delay if mode != "plain" else 0)  # the first chunk began late
        assert plans[step].age_steps < H


def test_a_first_chunk_begins_at_its_first_row_because_the_robot_stood_still():
    plans = play(ChunkBuffer(Chunking("plain", 8), H), 10, 4)
    np.testing.assert_array_equal([plan.action[1] for plan in plans[4:]], np.arange(6))


def test_realtime_commits_what_is_executed_and_continues_exactly_there():
    """Chunks disagree by a constant of their own; in realtime only rows after the committed ones show it."""
    random = np.random.default_rng(0)
    model = lambda step: random.normal(size=(H, 2)).astype(np.float32)
    buffer = ChunkBuffer(Chunking("realtime", 6), H)
    asks, accepted = [], []
    ask, accept = buffer.ask, buffer.accept
    buffer.ask = lambda step: (asks.append(ask(step)), asks[-1])[1]
    buffer.accept = lambda *a: (accepted.append((a, accept(*a))), accepted[-1][1])[1]
    plans = play(buffer, 200, 4, model=model)
    asks = {a.sequence: a for a in asks if a}
    assert all(reason is None for _, reason in accepted)
    assert all(len(a.prefix) == 4 == a.delay for a in list(asks.values())[1:])
    splices = 0
    for (sequence, actions, now), _ in accepted[1:]:
        begin = asks[sequence].step
        executed = np.stack([plan.action for plan in plans[begin:now]])
        np.testing.assert_array_equal(executed, actions[: now - begin])
        splices += 1
    assert splices > 25


def test_an_answer_later_than_committed_is_discarded_and_the_old_chunk_goes_on():
    buffer = ChunkBuffer(Chunking("realtime", 4), H)
    play(buffer, 1, 0)
    [buffer.action(step) for step in range(1, 4)]
    [buffer._delays.add(2) for _ in range(52)]
    ask = buffer.ask(4)
    assert len(ask.prefix) == 2
    [buffer.action(step) for step in range(4, 8)]  # four, two more than committed
    late = chunk(4) + 100
    late[:2] = ask.prefix
    assert buffer.accept(ask.sequence, late, 8) == "late"
    assert buffer.action(8).sequence == 1
    assert buffer.due(9)
    assert buffer.delay == 2
    buffer._delays = Delays()
    buffer.lost(buffer.ask(9).sequence, 12, late=True)
    assert buffer.delay == 3


def test_what_was_executed_must_be_in_the_answer_on_every_axis():
    buffer = ChunkBuffer(Chunking("realtime", 4), H)
    play(buffer, 1, 0)
    [buffer.action(step) for step in range(1, 4)]
    [buffer._delays.add(2) for _ in range(52)]
    ask, other = buffer.ask(4), chunk(4)
    executed = [buffer.action(step).action for step in range(4, 8)]
    other[:4] = executed
    other[3, 1] += 1  # another command than that which went to one axis
    assert buffer.accept(ask.sequence, other, 8) == "late"


def test_a_prefix_is_never_the_whole_chunk():
    """Or nothing would be left to predict, however long an answer takes."""
    buffer = ChunkBuffer(Chunking("realtime"), 4)
    [buffer._delays.add(9) for _ in range(52)]
    assert buffer.accept(buffer.ask(0).sequence, chunk(0, 4), 0) is None
    assert buffer.left(0) == 4
    assert len(buffer.ask(0).prefix) == 3


def test_only_the_answer_that_is_awaited_can_be_lost_and_one_that_is_late_takes_longer_than_usual():
    buffer = ChunkBuffer(Chunking("plain", 4), H)
    [buffer._delays.add(2) for _ in range(52)]
    ask = buffer.ask(0)
    buffer.lost(ask.sequence + 1, 9, late=True)
    assert buffer.ask(1) is None  # it is still awaited
    buffer._delays = Delays()
    [buffer._delays.add(2) for _ in range(2)]
    buffer.lost(ask.sequence, 0, late=True)  # refused at once, as it would have been late
    assert buffer.delay == 3
    buffer.lost(ask.sequence, 5, late=True)
    assert buffer.delay == 3
    assert buffer.ask(1) is not None


def test_what_is_left_is_what_the_newest_chunk_has():
    buffer = ChunkBuffer(Chunking("ensemble", 4), H)
    assert buffer.left(0) == 0
    for step in (0, 4):
        buffer.accept(buffer.ask(step).sequence, chunk(step), step)
    assert [buffer.left(step) for step in (4, 5, 20)] == [16, 15, 0]


def test_a_robot_that_moved_until_then_does_not_stand_still():
    """An answer that takes as long as usual, and longer than a chunk, was made for another place."""
    buffer = ChunkBuffer(Chunking("plain"), 4)
    [buffer._delays.add(5) for _ in range(52)]
    buffer.accept(buffer.ask(0).sequence, chunk(0, 4), 0)
    ask = buffer.ask(3)
    assert buffer.action(3) is not None
    assert [buffer.action(step) for step in range(4, 8)] == [None] * 4
    assert buffer.accept(ask.sequence, chunk(3, 4), 8).startswith("stale: it took 5 control steps")


def test_with_a_maximal_age_the_next_chunk_is_asked_for_in_time():
    plans = play(ChunkBuffer(Chunking("plain", 16), H, 8), 100, 3)
    assert [plan is None for plan in plans] == [True] * 3 + [False] * 97


def test_a_chunk_whose_prefix_was_not_kept_is_discarded():
    buffer = ChunkBuffer(Chunking("realtime", 4), H)
    play(buffer, 4, 0)
    [buffer._delays.add(2) for _ in range(52)]
    ask = buffer.ask(4)
    assert buffer.accept(ask.sequence, chunk(4) + 1, 5) == "without its prefix"
    assert buffer.action(5).sequence == 1


def test_out_of_order_duplicated_and_stale_answers_are_discarded():
    buffer = ChunkBuffer(Chunking("plain", 4), H)
    ask = buffer.ask(0)
    assert buffer.ask(1) is None  # one at a time
    assert buffer.accept(99, chunk(0), 1) == "out of order"
    assert buffer.accept(ask.sequence, chunk(0), 1) is None
    assert buffer.accept(ask.sequence, chunk(0), 2) == "out of order"
    buffer.reset()
    old = buffer.ask(20)
    buffer.reset()
    assert buffer.accept(old.sequence, chunk(20), 21) == "out of order"
    ask = buffer.ask(30)
    assert buffer.accept(ask.sequence, chunk(30), 30 + H).startswith("stale: it took 16 control steps, at most 15")
    assert buffer.action(30 + H) is None


def test_nothing_is_left_after_the_horizon_or_the_maximal_age():
    for max_age, last in ((None, 15), (5, 4)):
        buffer = ChunkBuffer(Chunking("plain", 16), H, max_age)
        buffer.accept(buffer.ask(0).sequence, chunk(0), 0)
        plans = [buffer.action(step) for step in range(20)]
        assert [plan is not None for plan in plans] == [True] * (last + 1) + [False] * (19 - last)


@pytest.mark.parametrize("mode", ["plain", "realtime", "ensemble"])
@pytest.mark.parametrize(("horizon", "delay"), [(1, 1), (1, 5), (2, 2), (8, 8), (8, 10)])
def test_a_robot_that_stands_still_executes_row_0_of_answers_that_always_come_late(mode, horizon, delay):
    """A row for each round trip after the first, of which nobody knows yet whether it is the usual one."""
    plans = play(ChunkBuffer(Chunking(mode), horizon), 200, delay, model=lambda step: chunk(step, horizon))
    moved = {step: plan for step, plan in enumerate(plans) if plan is not None}
    assert len(moved) >= 200 // (delay + 1) - 2
    for step, plan in moved.items():
        assert plan.action[1] == plan.action[0] == step - delay  # row 0
        assert plan.age_steps == delay < plan.max_age


def test_a_maximal_age_that_is_given_holds_for_a_robot_that_stands_still_too():
    for max_age, moves in ((4, False), (5, False), (6, True)):
        buffer = ChunkBuffer(Chunking("plain"), 8, max_age)
        assert any(play(buffer, 60, 5, model=lambda step: chunk(step, 8))) == moves
    buffer = ChunkBuffer(Chunking("plain"), 8, 4)
    ask = buffer.ask(0)
    buffer.action(0)
    assert "took 5 control steps, at most 3 are allowed (horizon 8, max_age 4)" in buffer.accept(
        ask.sequence, chunk(0, 8), 5
    )


def test_an_answer_later_than_usual_is_not_executed_by_a_robot_that_stands_still():
    buffer = ChunkBuffer(Chunking("plain"), 4)
    for step, took, taken in ((0, 50, False), (100, 5, True), (200, 5, True), (300, 60, False), (400, 5, True)):
        ask = buffer.ask(step)
        buffer.action(step)
        assert (buffer.accept(ask.sequence, chunk(step, 4), step + took) is None) == taken, step
        buffer.reset()


def test_the_distance_of_requests_stays_between_the_delay_and_what_a_chunk_leaves():
    for delay, execute, expected in ((6, 2, 6), (6, 16, 10), (0, 16, 16), (3, 5, 5)):
        buffer = ChunkBuffer(Chunking("plain", execute), H)
        asks = []
        ask = buffer.ask
        buffer.ask = lambda step, asks=asks, ask=ask: (asks.append(ask(step)), asks[-1])[1]
        play(buffer, 200, delay)
        steps = [a.step for a in asks if a]
        assert set(np.diff(steps[-5:])) == {expected}, (delay, execute)


def test_ensemble_weighs_rows_of_the_same_step_as_act_does():
    buffer = ChunkBuffer(Chunking("ensemble", 1, decay=0.5), 4)
    plans = play(buffer, 6, 0, model=lambda step: np.full((4, 2), step, np.float32))
    weights = np.exp(-0.5 * np.arange(4))
    np.testing.assert_allclose(plans[5].action[0], weights @ [2, 3, 4, 5] / weights.sum(), rtol=1e-6)
    np.testing.assert_allclose(plans[1].action[0], weights[:2] @ [0, 1] / weights[:2].sum(), rtol=1e-6)


def test_the_delay_is_a_high_quantile_of_the_last_replies_without_the_first_one():
    buffer = ChunkBuffer(Chunking("plain", 4), H)
    delays = []
    step = 0
    for delay in [14, 2, 2, 3, *[2] * 60, *[5] * 3]:
        ask = buffer.ask(step)
        buffer.accept(ask.sequence, chunk(step), step + delay)
        delays.append(buffer.delay)
        step += H
    assert delays[:4] == [14, 2, 2, 3]
    assert delays[30:-3] == [2] * (len(delays) - 33)
    assert delays[-3:] == [2, 2, 5]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Chunking("rtc"), "use one of plain, ensemble, realtime"),
        (lambda: Chunking("plain", 0), "from 1 on"),
        (lambda: Chunking("plain", 1.5), "from 1 on"),
        (lambda: Chunking("ensemble", decay=float("inf")), "use 0 or more"),
        (lambda: Chunking("ensemble", decay=-1), "use 0 or more"),
        (lambda: ChunkBuffer(Chunking("plain", 17), H), "expected 1..16"),
        (lambda: ChunkBuffer(Chunking("realtime"), H, prefix=False), "use plain or ensemble"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(make, words):
    with pytest.raises(ClientError, match=words):
        make()


def test_how_much_of_the_episode_was_executed():
    """By the rows that were commanded: not while it stands, nor what is withheld, skipped rows of a plan included."""
    buffer, chunk = ChunkBuffer(Chunking("plain", 4), 8), np.zeros((8, 2), np.float32)

    def run(step: int) -> int:
        if buffer.action(step) is not None:
            buffer.commanded(step)
        return buffer.executed(step + 1)

    ask = buffer.ask(10)
    assert ask.executed == 0
    buffer.accept(ask.sequence, chunk, 11)  # its loop was busy for a step: row 0 is for now
    assert [run(step) for step in (11, 12, 13)] == [1, 2, 3]
    assert run(16) == 6  # two were skipped
    ask = buffer.ask(17)
    assert ask.executed == 6
    assert run(17) == 7
    assert [run(step) for step in (18, 21)] == [7, 7]  # the end of the chunk, and no answer
    buffer.accept(ask.sequence, chunk, 22)
    assert run(22) == 8
    assert buffer.action(23) is not None  # withheld by the gate: nothing is executed
    buffer.reset()
    assert buffer.executed(24) == 8
    buffer.restart()
    assert buffer.executed(24) == 0


def test_delays_are_a_high_quantile_of_the_last_ones():
    delays = Delays()
    assert delays.usual == 0
    delays.add(9)
    assert delays.usual == 9  # the first one, which says nothing of the next
    for delay in [1] * 19 + [5]:
        delays.add(delay)
    assert delays.usual == 1  # 19 of 20 are at most that
    delays.add(5)
    assert delays.usual == 5
    for _ in range(48):
        delays.add(2)
    assert delays.usual == 2
    for _ in range(50):
        delays.add(3)
    assert delays.usual == 3


def test_chunks_say_together_what_each_says_of_a_step():
    old, new = np.arange(8, dtype=np.float32).reshape(4, 2), np.full((4, 2), 10, np.float32)
    mean = ensemble([(3, old), (5, new)], 5, 0.5, [1])
    weight = np.exp(-0.5)
    np.testing.assert_allclose(mean[:, 0], [(4 + 10 * weight) / (1 + weight), (6 + 10 * weight) / (1 + weight), 10, 10])
    np.testing.assert_array_equal(mean[:, 1], 10)
    np.testing.assert_array_equal(ensemble([(3, old)], 4, 0.5), old[1:])
    assert mean.dtype == np.float32


def test_unless_told_half_a_chunk_is_executed_and_of_an_ensemble_one_step():
    assert [Chunking(mode).steps(16) for mode in ("plain", "realtime", "ensemble")] == [8, 8, 1]
    assert [Chunking(mode).steps(1) for mode in ("plain", "realtime", "ensemble")] == [1, 1, 1]
    assert Chunking("plain", 16).steps(16) == 16
    assert Chunking("ensemble", decay=0.0).decay == 0  # all weigh the same


@pytest.mark.parametrize(("off", "says"), [(0.5e-5, None), (2e-5, "without its prefix")])
def test_a_prefix_may_differ_by_rounding_only(off, says):
    buffer = ChunkBuffer(Chunking("realtime", 4), H)
    play(buffer, 4, 0)
    [buffer._delays.add(2) for _ in range(52)]
    ask, actions = buffer.ask(4), chunk(4)
    actions[: len(ask.prefix)] = ask.prefix
    actions[len(ask.prefix) - 1, 0] += off
    assert len(ask.prefix) == 2
    assert buffer.accept(ask.sequence, actions, 5) == says
