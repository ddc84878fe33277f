"""Result: one measured number beside its baseline, where it was measured, and the small statistics that go with it."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mmseq.errors import DataError

BETTER = ("higher", "lower")


@dataclass(frozen=True, kw_only=True)
class Result:
    """A number, what it is compared with, and where it comes from.

    name: `<task>.<measure>`, such as `forward_dynamics.psnr`. unit: of both values. n: how many samples
    were measured. seed: of the choice of samples.
    """

    name: str
    value: float
    unit: str
    better: str
    baseline_name: str
    baseline_value: float
    n: int
    seed: int

    def __post_init__(self):
        if self.better not in BETTER:
            raise DataError(f"result {self.name!r}: better is {self.better!r}", fix=f"use one of {BETTER}")
        for field in ("value", "baseline_value"):
            number = float(getattr(self, field))
            if not math.isfinite(number):
                raise DataError(f"result {self.name!r}: {field} is {number}")
            object.__setattr__(self, field, number)
        object.__setattr__(self, "n", int(self.n))
        object.__setattr__(self, "seed", int(self.seed))

    @property
    def gain(self) -> float:
        """How much better than the baseline, in the unit; negative when it is worse."""
        difference = self.value - self.baseline_value
        return difference if self.better == "higher" else -difference


def write_results(path: str | Path, results: Iterable[Result]) -> None:
    """Write a JSON list, one row per result."""
    rows = [json.dumps(asdict(result), ensure_ascii=False) for result in results]
    Path(path).write_text("[\n" + ",\n".join(f"  {row}" for row in rows) + "\n]\n" if rows else "[]\n")


def command() -> str:
    """What the shell was told, where that was `mmseq`."""
    arguments = sys.argv[1:] if Path(sys.argv[0]).stem in ("mmseq", "__main__") else []
    return shlex.join(["mmseq", *arguments])


def machine() -> str:
    """Cores, memory, GPU and torch, in words."""
    import torch

    try:
        model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        model = None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    return f"{cores} cores of {model[1].strip() if model else platform.machine()}{gpu}, torch {torch.__version__}"


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927); (0, 1) when nothing was tried."""
    from scipy.stats import norm

    if not 0 <= successes <= n:
        raise DataError(f"{successes} successes in {n} trials")
    if n == 0:
        return 0.0, 1.0
    z = float(norm.ppf(0.5 + confidence / 2))
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


def rank_correlation(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    """Spearman's rank correlation; 0 when either side is constant, for it then orders nothing."""
    from scipy.stats import spearmanr

    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(spearmanr(a, b)[0])  # type: ignore[arg-type]


def bootstrap(
    values: Sequence[float] | np.ndarray, groups: Sequence[object], *, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float] | None:
    """Interval of the mean of `values` when whole groups (episodes) are drawn again; None below 3 groups.

    Samples of one episode resemble each other, so drawing samples alone would look too certain.
    """
    values = np.asarray(values, dtype=np.float64)
    _, index = np.unique([str(g) for g in groups], return_inverse=True)
    count = np.bincount(index).astype(np.float64)
    if len(count) < 3:
        return None
    total = np.bincount(index, weights=values)
    draws = np.random.default_rng(seed).integers(len(count), size=(1000, len(count)))
    means = total[draws].sum(1) / count[draws].sum(1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
