"""Results on disk, and the statistics beside them."""

import json

import numpy as np
import pytest

from mmseq.errors import DataError
from mmseq.evaluation.results import Result, bootstrap, rank_correlation, wilson, write_results

ROW = {
    "name": "forward_dynamics.psnr",
    "value": 22.5,
    "unit": "dB",
    "better": "higher",
    "baseline_name": "repeat_last_frame",
    "baseline_value": 21.25,
    "n": 48,
    "seed": 0,
}


def test_results_survive_the_disk(tmp_path):
    results = [
        Result(**ROW),
        Result(**(ROW | {"name": "caption.accuracy", "value": np.float64(0.5), "n": np.int64(3)})),
    ]
    write_results(tmp_path / "results.json", results)
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [Result(**row) for row in rows] == results
    assert [list(row) for row in rows] == [list(ROW)] * 2
    write_results(tmp_path / "none.json", [])
    assert json.loads((tmp_path / "none.json").read_text()) == []


def test_gain_is_positive_when_better():
    assert Result(**ROW).gain == 1.25
    assert Result(**(ROW | {"better": "lower"})).gain == -1.25


@pytest.mark.parametrize("change", [{"better": "more"}, {"value": float("nan")}, {"baseline_value": float("inf")}])
def test_a_result_that_says_nothing_is_refused(change):
    with pytest.raises(DataError, match=r"forward_dynamics\.psnr"):
        Result(**(ROW | change))


# R: binom::binom.wilson
@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(8, 10, 0.49016, 0.94331), (0, 10, 0.0, 0.27753), (10, 10, 0.72247, 1.0), (50, 100, 0.40383, 0.59617)],
)
def test_wilson_has_the_known_values(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=1e-5)


def test_wilson_at_its_ends():
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(DataError, match="3 successes in 2 trials"):
        wilson(3, 2)


def test_rank_correlation():
    assert rank_correlation([1, 2, 3, 4], [10, 20, 25, 100]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 1, 2]) == pytest.approx(-0.5)
    assert rank_correlation([1, 2, 3], [5, 5, 5]) == 0


def test_the_bootstrap_draws_episodes_not_samples():
    values, groups = [0.0] * 50 + [1.0] * 50, ["a"] * 50 + ["b"] * 50
    assert bootstrap(values, groups) is None  # a hundred samples, but of two episodes
    alone = bootstrap(values, range(100))
    assert alone is not None
    assert 0.38 < alone[0] < 0.45
    assert 0.55 < alone[1] < 0.62
    few = bootstrap(values, [i // 25 for i in range(100)])
    assert few is not None
    assert few[1] - few[0] > 2 * (alone[1] - alone[0])
