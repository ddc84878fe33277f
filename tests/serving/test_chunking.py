"""What a session remembers of its chunks, and how the next one is spliced to them."""

import numpy as np
import pytest

from mmseq.errors import ConfigError
from mmseq.serving.chunking import Chunking, ChunkMemory, Turn, take_turn
from mmseq.serving.errors import RequestError

H = 8


def rows(start: float) -> np.ndarray:
    """(8, 2): row i is start + i."""
    return (start + np.arange(H, dtype=np.float32))[:, None].repeat(2, 1)


def memory(mode, **options) -> ChunkMemory:
    return ChunkMemory(Chunking(mode=mode, **options).resolve(H, prefix=True), H)


def test_the_prefix_is_what_the_robot_executes_until_the_answer_arrives():
    m = memory("realtime", execute=4)
    assert m.begin(Turn(step=10)) == 10
    assert m.prefix(10, 3) is None
    m.remember(10, rows(0))
    assert m.begin(Turn(step=14)) == 14
    np.testing.assert_array_equal(m.prefix(14, 3)[:, 0], [4, 5, 6])
    np.testing.assert_array_equal(m.prefix(14, 99)[:, 0], [4, 5, 6, 7])  # what is left of it
    assert m.prefix(14, 0) is None
    assert m.prefix(18, 3) is None  # it is over
    np.testing.assert_array_equal(m.prefix(10, 99)[:, 0], range(7))  # never the whole chunk


def test_a_client_without_steps_has_executed_what_the_server_was_told():
    m = memory("realtime")
    assert m.begin(Turn()) == 0
    m.remember(0, rows(0))
    assert m.begin(Turn()) == 4
    assert memory("ensemble").chunking.execute == 1
    plain = memory("plain")
    assert plain.begin(Turn()) is None  # nobody knows
    plain.remember(None, rows(0))
    assert plain.before(5) is None


def test_steps_grow_until_a_reset():
    m = memory("plain")
    m.begin(Turn(step=5))
    m.remember(5, rows(0))
    m.begin(Turn(step=5))
    with pytest.raises(RequestError, match=r"was at 5 already\. Send reset") as caught:
        m.begin(Turn(step=4))
    assert caught.value.key == "step"
    assert m.begin(Turn(step=0, reset=True)) == 0
    assert m.before(9) is None


def test_the_action_before_a_chunk():
    m = memory("plain")
    m.remember(10, rows(0))
    assert [m.before(step)[0] for step in (11, 14, 18)] == [0, 3, 7]
    assert m.before(19) is None  # the robot has held since: nobody knows where it is
    assert m.before(10) is None


def test_the_ensemble_is_that_of_act():
    m = memory("ensemble", decay=0.3)
    chunks = [np.random.default_rng(i).normal(size=(H, 2)).astype(np.float32) for i in range(6)]
    for step, chunk in enumerate(chunks):
        averaged = m.ensemble(2 * step, chunk)
    step = 10
    for row in range(H):  # as in ACT's own loop: all predictions of one step, oldest first
        said = [chunk[step + row - 2 * i] for i, chunk in enumerate(chunks) if step + row - 2 * i < H]
        weights = np.exp(-0.3 * np.arange(len(said)))
        np.testing.assert_allclose(averaged[row], (weights / weights.sum()) @ np.array(said), atol=1e-6)


def test_what_says_nothing_of_a_step_any_more_is_forgotten():
    m = memory("ensemble")
    for step, kept in ((0, 1), (7, 2), (8, 2), (15, 2), (30, 1)):
        m.ensemble(step, rows(step))
        assert len(m._predicted) == kept, step


def test_forgetting_the_ensemble():
    m = memory("ensemble")
    m.ensemble(0, rows(0))
    m.forget()
    np.testing.assert_array_equal(m.ensemble(1, rows(50)), rows(50))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "rtc"}, "use one of|Use one of"),
        ({"execute": 0}, "execute is 0"),
        ({"execute": 9}, "1 to 8"),
        ({"decay": -1}, "decay is -1"),
        ({"decay": float("nan")}, "decay is nan"),
        ({"mode": "realtime"}, "takes no action_prefix"),
    ],
)
def test_what_cannot_be_configured(options, message):
    with pytest.raises(ConfigError, match=message):
        Chunking(**options).resolve(H, prefix=False)


def test_a_turn_is_taken_out_of_an_observation():
    turn, rest = take_turn(
        {"prompt": "go", "step": np.int64(3), "sent_at": 1.5, "delay": 2, "deadline_ms": np.float32(9)}
    )
    assert (turn, rest) == (Turn(step=3, sent_at=1.5, delay=2, deadline_ms=9.0), {"prompt": "go"})
    assert take_turn({"prompt": "go"}) == (Turn(), {"prompt": "go"})
    ends = {"step": (1 << 53) - 1, "executed": 0, "deadline_ms": 86_400_000, "delay": np.array(0), "chunking": "plain"}
    assert take_turn(ends)[0] == Turn(**{**ends, "delay": 0})
    assert take_turn({"step": 0, "reset": np.bool_(True)})[0] == Turn(step=0, reset=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", -1),
        ("step", 1.5),
        ("step", True),
        ("step", 1 << 53),
        ("step", np.zeros(2)),
        ("sent_at", float("nan")),
        ("sent_at", "now"),
        ("deadline_ms", 0),
        ("deadline_ms", float("inf")),
        ("deadline_ms", 86_400_001),
        ("delay", -1),
        ("delay", [1]),
        ("reset", 1),
        ("chunking", "realtime"),
        ("chunking", b"plain"),
        ("chunking", np.zeros(0)),
    ],
)
def test_turns_that_cannot_be(key, value):
    with pytest.raises(RequestError, match=f"'{key}' is") as caught:
        take_turn({key: value})
    assert (caught.value.code, caught.value.key) == ("out_of_range", key)


def test_a_step_that_is_asked_twice_counts_once():
    m = memory("ensemble")
    for _ in range(100):
        m.ensemble(5, rows(0))
    assert len(m._predicted) == 1
    m.remember(5, rows(0))
    m.remember(7, rows(50))
    assert m.before(7)[0] == 1  # of the chunk before, not of the answer that is being replaced


def test_what_opens_and_closes_is_the_newest_chunks_alone():
    m = memory("ensemble")
    m.ensemble(0, rows(0))
    mean = m.ensemble(1, rows(11), [1])
    np.testing.assert_allclose(mean[:7, 0], np.arange(1, 8) + 10 * np.exp(-0.01) / (1 + np.exp(-0.01)), rtol=1e-6)
    np.testing.assert_array_equal(mean[:, 1], rows(11)[:, 1])
    assert mean[7, 0] == 18  # of which only the newest speaks


def test_an_ensemble_may_weigh_all_chunks_alike():
    assert Chunking(mode="ensemble", decay=0.0).decay == 0
