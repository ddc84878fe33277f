"""What a server keeps of a session for policies that look back."""

import numpy as np

from mmseq.serving.history import History

STATE = "observation.state"


def state(value: float) -> dict:
    return {STATE: np.full(2, value, np.float32)}


def seen(history: History, step: int | None, value: float, passed: int = 1) -> list[float]:
    return history.fill(state(value), step, passed)[STATE][:, 0].tolist()


def test_each_step_has_what_was_seen_last_before_it():
    history = History(4)
    assert seen(history, 0, 0.0) == [0]
    assert seen(history, 2, 2.0) == [0, 0, 2]
    assert seen(history, 3, 3.0) == [0, 0, 2, 3]
    assert seen(history, 9, 9.0) == [3, 3, 3, 9]


def test_a_client_that_says_no_step_is_placed_by_the_clock(caplog):
    history = History(4)
    assert seen(history, None, 0.0) == [0]
    assert seen(history, None, 2.0, passed=2) == [0, 0, 2]
    assert seen(history, None, 3.0) == [0, 0, 2, 3]
    assert caplog.text.count("does not say its 'step'") == 1


def test_a_step_that_is_asked_for_again_is_kept_once():
    history = History(4)
    for _ in range(1000):
        history.fill(state(0.0), 0)
        history.remember(0, np.zeros((8, 2), np.float32))
    assert len(history._did) == len(history._seen) == 1


def test_what_a_client_says_that_its_robot_did_counts():
    history = History(4)
    history.fill(state(0.0), 0)
    history.remember(0, np.ones((8, 2), np.float32))
    assert history.fill(state(1.0), 1)["past_actions"].tolist() == [[1, 1]]
    own = np.zeros((2, 2), np.float32)
    assert history.fill({**state(2.0), "past_actions": own}, 2)["past_actions"] is own
