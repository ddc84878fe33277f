"""Continuous values as tokens: scaled by the range in the embodiment (`low` to `high`), then uniform bins.

The first bin's value is the low end itself and the last bin's the high one, so a saturated command (a gripper fully
closed) survives exactly, and every value in between comes back within half a bin. What lies beyond goes to the end
bins. Tokens of a chunk are laid out in time order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import numpy as np

from mmseq.embodiment import Axes
from mmseq.errors import ConfigError


class _Bins:
    """What tokenizers of evenly spaced values have in common: nothing but their number."""

    def __init__(self, bins: int):
        if not 2 <= bins <= 65536:
            raise ConfigError(f"bins must be between 2 and 65536, got {bins}")
        self.bins = self.size = bins

    @property
    def fingerprint(self) -> str:
        return f"bins-{self.bins}"

    def code_features(self) -> np.ndarray:
        return value_features(self.bins)

    def save(self, directory: str | Path) -> dict[str, Any]:
        return {"bins": self.bins}

    @classmethod
    def load(cls, directory: str | Path, settings: dict[str, Any], *, device: Any = "cpu") -> Self:
        return cls(int(settings["bins"]))


class BinTokenizer(_Bins):
    """`bins` values per axis. Works for any robot: the axes come with each call."""

    kind, readout = "bins", "median"

    def __init__(self, bins: int = 64):
        super().__init__(bins)

    def encode(self, values: np.ndarray, axes: Axes) -> np.ndarray:
        """float (steps, axes) -> int64 codes (steps, axes); beyond low and high goes to the end bins."""
        low, span = _scale(axes)
        share = (np.asarray(values, dtype=np.float64) - low) / span
        return np.clip(np.rint(share * (self.bins - 1)), 0, self.bins - 1).astype(np.int64)

    def decode(self, codes: np.ndarray, axes: Axes) -> np.ndarray:
        """Codes (steps, axes) -> float32 values in the units of the axes."""
        codes = np.asarray(codes)
        if codes.size and (codes.min() < 0 or codes.max() >= self.bins):
            raise ConfigError(f"bin {int(codes.max())} is outside 0..{self.bins - 1}")
        low, span = _scale(axes)
        return (low + codes / (self.bins - 1) * span).astype(np.float32)

    def error(self, values: np.ndarray, axes: Axes) -> np.ndarray:
        """Mean absolute round-trip error per axis, in the units of the axis."""
        return np.abs(self.decode(self.encode(values, axes), axes) - values).mean(0)


def value_features(count: int) -> np.ndarray:
    """What every one of `count` evenly spaced values is made of: itself and a few waves (count, F), unit rows."""
    x = np.linspace(0, 1, count, dtype=np.float32)[:, None]
    waves = np.pi * np.array([1, 2, 4, 8], dtype=np.float32)
    features = np.concatenate([2 * x - 1, np.sin(x * waves), np.cos(x * waves)], 1)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def _scale(axes: Axes) -> tuple[np.ndarray, np.ndarray]:
    low = np.asarray(axes.low, dtype=np.float64)
    span = np.asarray(axes.high, dtype=np.float64) - low
    return low, np.where(span > 1e-8, span, 1.0)  # an axis that never moves keeps its one value


class ScalarTokenizer(_Bins):
    """Values in 0..1 (progress, or success as yes and no) as `bins` uniform tokens."""

    kind, readout = "scalar", "mean"

    def __init__(self, bins: int = 32):
        super().__init__(bins)

    def encode(self, value: float) -> int:
        return int(np.clip(round(value * (self.bins - 1)), 0, self.bins - 1))

    def decode(self, code: float) -> float:
        return float(code) / (self.bins - 1)
