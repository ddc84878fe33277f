"""Numbers as bins: the ends are exact, what lies between comes back within half a bin, what lies beyond is clipped."""

import numpy as np
import pytest

from mmseq.embodiment import Axes
from mmseq.errors import ConfigError, TaskError
from mmseq.testing import tiny
from mmseq.tokenization.bundle import Tokenizers
from mmseq.tokenization.continuous import BinTokenizer, ScalarTokenizer, value_features

AXES = Axes.from_values(np.array([[-1.0, 0.0, 5.0], [1.0, 10.0, 5.0]]))


def test_the_ends_of_the_range_are_the_first_and_the_last_bin():
    tokens = BinTokenizer(5)
    values = np.array([[-1.0, 0.0, 5.0], [1.0, 10.0, 5.0], [0.0, 5.0, 5.0]])
    codes = tokens.encode(values, AXES)
    assert codes.tolist() == [[0, 0, 0], [4, 4, 0], [2, 2, 0]]
    assert codes.dtype == np.int64
    decoded = tokens.decode(codes, AXES)
    assert decoded.dtype == np.float32
    np.testing.assert_array_equal(decoded, values)


def test_beyond_the_range_is_clipped_and_the_nearest_bin_is_taken():
    tokens = BinTokenizer(5)
    assert tokens.encode(np.array([[-9.0, 99.0, 4.0]]), AXES).tolist() == [[0, 4, 0]]
    assert tokens.encode(np.array([[-0.76, 1.24, 5.0], [-0.74, 1.26, 5.0]]), AXES).tolist() == [[0, 0, 0], [1, 1, 0]]


@pytest.mark.parametrize("bins", [2, 33, 64, 65536])
def test_every_value_in_range_comes_back_within_half_a_bin(bins):
    values = np.stack([np.linspace(-1, 1, 999), np.linspace(0, 10, 999), np.full(999, 5.0)], 1)
    tokens = BinTokenizer(bins)
    off = np.abs(tokens.decode(tokens.encode(values, AXES), AXES) - values)
    assert (off.max(0) <= np.array([1.0, 5.0, 0.0]) / (bins - 1) + 1e-6).all()
    np.testing.assert_allclose(tokens.error(values, AXES), off.mean(0))


@pytest.mark.parametrize("bins", [-1, 0, 1, 65537])
def test_a_number_of_bins_that_makes_no_sense(bins):
    with pytest.raises(ConfigError, match=f"got {bins}"):
        BinTokenizer(bins)


@pytest.mark.parametrize("code", [-1, 5])
def test_a_code_outside_the_bins(code):
    with pytest.raises(ConfigError, match=r"outside 0\.\.4"):
        BinTokenizer(5).decode(np.array([[code, 0, 0]]), AXES)
    assert BinTokenizer(5).decode(np.zeros((0, 3), int), AXES).shape == (0, 3)


def test_progress_in_bins():
    progress = ScalarTokenizer(5)
    assert [progress.encode(v) for v in (-1, 0, 0.124, 0.126, 0.5, 1, 2)] == [0, 0, 0, 1, 2, 4, 4]
    assert [progress.decode(c) for c in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert ScalarTokenizer(2).bins == 2
    with pytest.raises(ConfigError, match="got 1"):
        ScalarTokenizer(1)


def test_neighbouring_values_have_similar_features():
    features = value_features(33)
    assert features.shape == (33, 9)
    assert features.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)
    alike = features @ features.T
    assert alike[16, 17] > alike[16, 18] > alike[16, 20] > 0
    x = np.linspace(0, 1, 33)
    raw = np.concatenate(
        [[2 * x - 1], np.sin(np.outer([1, 2, 4, 8], np.pi * x)), np.cos(np.outer([1, 2, 4, 8], np.pi * x))]
    )
    np.testing.assert_allclose(features, (raw / np.linalg.norm(raw, axis=0)).T, atol=1e-5)


@pytest.mark.parametrize(
    ("codes", "says"),
    [
        (lambda n: np.full((n, 3), -5), r"gives codes -5\.\.-5, expected 0\.\.31"),
        (lambda n: np.full((n, 3), 32), r"expected 0\.\.31"),
        (lambda n: np.zeros((n, 6), np.int64), r"expected whole numbers \(2, 3\)"),
        (lambda n: np.zeros((n, 3)), "gives float64"),
    ],
)
def test_what_a_persons_own_tokenizer_gives_is_checked(codes, says):
    class Own(BinTokenizer):
        def encode(self, values, axes):
            return codes(len(values))

    bundle = Tokenizers({**tiny.tokenizers(), "proprio": Own(32)}, embodiments=(tiny.embodiment(),))
    with pytest.raises(TaskError, match=says):
        bundle.encode_vector("proprio", "arm", np.zeros((2, 3), np.float32))
