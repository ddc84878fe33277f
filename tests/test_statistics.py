"""What the bins and limits of a robot follow: every value that is real, and no fault of a sensor."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmseq.embodiment import Axes
from mmseq.statistics import extent, remarks
from mmseq.tokenization.continuous import BinTokenizer


def wave(steps=1000, size=2.0):
    return size * np.sin(0.3 * np.arange(steps))


def put(values, value, *at):
    values = values.copy()
    values[list(at)] = value
    return values


@pytest.mark.parametrize("steps", [2, 19, 20, 100, 1000, 5000])
@pytest.mark.parametrize(
    "make", [wave, lambda n: np.linspace(-1, 1, n), lambda n: np.random.default_rng(n).normal(size=n)]
)
def test_ordinary_values_reach_from_the_least_to_the_greatest(make, steps):
    values = make(steps)
    found = extent(values)
    assert (found.low, found.high) == (values.min(), values.max())
    assert len(found.wild) == 0


@pytest.mark.parametrize(
    ("values", "wild"),
    [
        (put(wave(), 1e4, 50), [50]),
        (put(wave(), -1e4, 999), [999]),
        (put(wave(), 1e4, 0), [0]),
        (put(put(wave(), 1e4, 50), -1e6, 51), [51, 50]),  # one on either side, one after the other
        (put(wave(), 1e4, 10, 200, 700), [10, 200, 700]),
        (put(put(wave(), 1e4, 10), 1e6, 200), [10, 200]),
        (put(wave(20), 100.0, 3), [3]),
        (put(wave(100), 6.1, 40), [40]),  # beyond by more than the range of -2 .. 2
    ],
)
def test_a_lone_value_far_from_all_others_does_not_count(values, wild):
    found = extent(values)
    rest = np.delete(values, wild)
    assert (found.low, found.high) == (rest.min(), rest.max())
    assert sorted(found.wild.tolist()) == sorted(wild)


@pytest.mark.parametrize(
    "values",
    [
        put(np.zeros(1000), 1.0, *range(0, 1000, 200)),  # a gripper that opens in one step of 200, and nothing else
        put(np.zeros(1000), 1.0, 500),
        put(np.random.default_rng(0).normal(0, 1e-3, 1000), 1.0, *range(500, 505)),  # it stays open for five steps
        put(wave(), 1e4, 50, 51),  # what stays is a motion, however far it goes
        put(wave(100), 5.9, 40),  # not as far as the range of the rest
        put(wave(), 1e4, *range(0, 1000, 90)),  # more than one step of a hundred
        put(wave(19), 1e4, 3),  # too few to say
    ],
)
def test_what_is_rare_but_real_counts(values):
    found = extent(values)
    assert (found.low, found.high) == (values.min(), values.max())
    assert len(found.wild) == 0


def test_rare_values_come_back_from_their_tokens():
    gripper = put(np.ones(1000), 0.0, *range(300, 305))
    values = np.stack([gripper, wave()], 1)
    axes = Axes.from_values(values)
    for bins in (2, 33, 64, 256):
        tokens = BinTokenizer(bins)
        error = np.abs(tokens.decode(tokens.encode(values, axes), axes) - values)
        assert error[:, 0].max() == 0
        assert (error[:, 1] <= 0.5 * 4 / (bins - 1) + 1e-6).all()


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=300))
def test_every_value_in_range_comes_back_within_half_a_bin(numbers):
    values = np.array(numbers)[:, None]
    axes = Axes.from_values(values)
    kept = values[(values >= axes.low) & (values <= axes.high)][:, None]
    assert len(kept) >= 0.99 * len(values) - 2
    tokens = BinTokenizer(64)
    off = np.abs(tokens.decode(tokens.encode(kept, axes), axes) - kept)
    assert (off <= 0.5 * (axes.high[0] - axes.low[0]) / 63 * 1.001 + 1e-8 + 1e-6 * np.abs(kept)).all()


def test_limits_follow_what_counts():
    axes = Axes.from_values(np.stack([put(wave(), 1e4, 50), wave()], 1), ["a", "b"])
    low, high = wave().min(), wave().max()
    np.testing.assert_allclose(axes.maximum, [high + 0.1 * (high - low)] * 2, rtol=1e-6)
    np.testing.assert_allclose(axes.low, [low] * 2, rtol=1e-6)


def test_what_sets_no_limit_and_what_sets_one_from_afar_is_said():
    first, second = wave(600), wave(600)
    second[[50, 300]] = 1e4
    (note,) = remarks([("episode a", first[:, None]), ("episode b", second[:, None])], ["lift"], "action")
    assert note.startswith("action lift is 10000 at step 50 of episode b (and 1 more), all else lies in -2..2")
    assert "fault" in note
    second[[50, 300]] = 0, 4.5
    (note,) = remarks([("episode a", first[:, None]), ("episode b", second[:, None])], ["lift"], "proprio")
    assert (
        note == "proprio lift is 4.5 at step 300 of episode b, all else lies in -2..2: bins and limits reach that far"
    )
    gripper = put(np.zeros((600, 1)), 1.0, 7, 8)
    (note,) = remarks([("episode a", gripper)], ["gripper"], "action")
    assert "gripper is 1 at step 7 of episode a (and 1 more), all else lies in 0..0" in note
    assert list(remarks([("a", first[:, None]), ("b", wave(50)[:, None])], ["lift"], "action")) == []


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_do_not_pass_for_a_range(bad):
    found = extent(put(wave(), bad, 3))
    assert not np.isfinite([found.low, found.high]).all()
