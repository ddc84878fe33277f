"""Measures and baselines on cases worked out by hand."""

import numpy as np
import pytest

from mmseq.episode import TextSpan
from mmseq.evaluation.measures import Phrasings, action_error, mean_action, median_action, normalise
from mmseq.testing import tiny
from mmseq.tokenization.pictures import psnr


def test_psnr_of_pictures_that_differ_by_a_constant():
    black = np.zeros((3, 8, 8, 3), np.uint8)
    other = np.stack([np.full((8, 8, 3), v, np.uint8) for v in (1, 16, 255)])
    expected = [20 * np.log10(255 / v) for v in (1, 16, 255)]
    assert psnr(black, other) == pytest.approx(expected)
    assert psnr(black, black) == pytest.approx([60.0] * 3)


def test_action_error_is_a_share_of_the_range():
    axes = tiny.axes("xy", limit=2.0)  # a range of 4
    true = np.zeros((1, 2, 2), np.float32)
    assert action_error(true, true + np.array([1.0, 3.0]), axes) == pytest.approx([(0.25 + 0.75) / 2])


def test_constant_actions_are_those_of_one_robot():
    episodes = [tiny.episode(0), tiny.episode(1), tiny.video(2), tiny.episode(3, robot=tiny.embodiment("other"))]
    steps = np.concatenate([episodes[0]["action"], episodes[1]["action"]])
    assert mean_action(episodes, "arm") == pytest.approx(steps.mean(0), abs=1e-6)
    assert median_action(episodes, "arm") == pytest.approx(np.median(steps, axis=0), abs=1e-6)
    assert mean_action(episodes, "unknown") is None


def test_normalise():
    assert normalise("  Open the DOOR, now! ") == "open the door now"


def named(seed, texts, plans=()):
    episode = tiny.episode(seed, 4)
    episode.texts, episode.plans = list(texts), list(plans)
    return episode


def test_phrasings_of_one_task_are_joined_across_episodes():
    first = named(0, ["open the door", "pull the door open"], ["reach, then pull"])
    second = named(1, ["Pull the door open."], ["grip the handle"])
    third = named(2, ["close the drawer"], ["push it"])
    phrasings = Phrasings([first, second, third])
    assert phrasings.accepts(second, "open the door")
    assert phrasings.accepts(first, "OPEN the door!")
    assert not phrasings.accepts(first, "close the drawer")
    assert not phrasings.accepts(first, "open the window")
    assert phrasings.task(first) == phrasings.task(second) != phrasings.task(third)
    plans = Phrasings([first, second, third], "plan")
    assert plans.accepts(first, "grip the handle")
    assert not plans.accepts(first, "push it")


def test_the_own_text_of_an_episode_that_was_not_there_before_is_accepted():
    known, new = named(0, ["open the door"], ["reach"]), named(1, ["stir the soup"], ["lift the spoon"])
    assert Phrasings([known]).accepts(new, "Stir the soup.")
    assert not Phrasings([known]).accepts(new, "open the door")
    assert Phrasings([known], "plan").accepts(new, "lift the spoon")
    assert not Phrasings([known], "plan").accepts(new, "reach")


def test_answers_of_one_task_are_not_shared():
    """They depend on the question, which the texts of the task do not say."""
    first, second = named(0, ["open the door"]), named(1, ["open the door"])
    first.spans = [TextSpan("answer", 0, 4, ("yes",))]
    second.spans = [TextSpan("answer", 0, 4, ("no",))]
    answers = Phrasings([first, second], "answer")
    assert answers.accepts(first, "Yes")
    assert not answers.accepts(first, "no")


def test_texts_that_change_on_the_way_belong_to_their_steps():
    both = named(0, [])
    both.spans = [
        TextSpan("text", 0, 2, ("open the door", "pull it")),
        TextSpan("text", 2, 4, ("close the drawer",)),
        TextSpan("plan", 0, 2, ("reach",)),
        TextSpan("plan", 3, 4, ("push",)),
    ]
    drawer = named(1, ["close the drawer"], ["lean on it"])
    phrasings, plans = Phrasings([both, drawer]), Phrasings([both, drawer], "plan")
    assert phrasings.accepts(both, "pull it", 1)
    assert not phrasings.accepts(both, "pull it", 2)
    assert phrasings.task(both, 0) != phrasings.task(both, 3) == phrasings.task(drawer)
    assert [plans.accepts(both, "reach", step) for step in range(4)] == [True, True, False, False]
    assert plans.accepts(both, "lean on it", 3)
    assert phrasings.majority([both, drawer]) == "close the drawer"  # once in each, however often a plan cuts it


def test_the_majority_text_names_the_most_frequent_task():
    doors = [named(i, [text, "open the door"]) for i, text in enumerate(["open it", "pull it", "swing it"])]
    drawers = [named(i, ["close the drawer"]) for i in range(3, 5)]
    phrasings = Phrasings([*doors, *drawers])
    usual = phrasings.majority([*drawers, *doors])
    assert all(phrasings.accepts(e, usual) for e in doors)
    assert not any(phrasings.accepts(e, usual) for e in drawers)
    assert phrasings.majority([named(9, [])]) is None
