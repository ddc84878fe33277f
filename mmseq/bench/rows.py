"""Rows of a bench: what took turns, medians and ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmseq.errors import ConfigError
from mmseq.evaluation.results import Result, command, machine, write_results
from mmseq.progress import progress


@dataclass(frozen=True, kw_only=True)
class BenchRow(Result):
    """A result with `ratio`, how many times better than its baseline (the median over turns), and its origin.

    n: how often each side was measured. command: that gives it. machine: it ran on.
    """

    ratio: float
    command: str
    machine: str


def require_positive(config: object, *names: str) -> None:
    """Raises: ConfigError for the first option of a bench that is 0 or less."""
    for name in names:
        if not getattr(config, name) > 0:
            raise ConfigError(f"{name} must be positive, got {getattr(config, name)}")


@dataclass(frozen=True)
class Spread:
    """The median of a few measurements, and the lowest and highest of them."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        return f"{self.median:,.4g} ({min(self.values):,.4g} to {max(self.values):,.4g})"


def take_turns(runs: Mapping[str, Callable[[], float]], *, seconds: float, at_least: int = 3) -> dict[str, Spread]:
    """Call each of `runs` in turn until `seconds` are over, so that what else the machine does meets all of them.

    A run returns what it measured. Every second turn goes backwards.
    """
    found: dict[str, list[float]] = {name: [] for name in runs}
    started, turn = time.perf_counter(), 0
    with progress("taking turns", "turns") as update:
        while turn < at_least or time.perf_counter() - started < seconds:
            for name in list(runs) if turn % 2 == 0 else reversed(list(runs)):
                found[name].append(runs[name]())
            turn += 1
            each = (time.perf_counter() - started) / turn
            update(turn, max(at_least, turn, round(seconds / max(each, 1e-9))))
    return {name: Spread(tuple(values)) for name, values in found.items()}


def row(
    name: str,
    unit: str,
    value: Spread,
    baseline_name: str,
    baseline: Spread,
    *,
    better: str = "higher",
    seed: int = 0,
) -> BenchRow:
    """A row of two sides that took turns: medians, and the median of the ratios turn by turn."""
    higher = better == "higher"
    pairs = zip(value.values, baseline.values, strict=True)
    return BenchRow(
        name=name,
        value=value.median,
        unit=unit,
        better=better,
        baseline_name=baseline_name,
        baseline_value=baseline.median,
        n=len(value.values),
        seed=seed,
        ratio=statistics.median(1.0 if a == b else a / b if higher else b / a for a, b in pairs),
        command=command(),
        machine=machine(),
    )


def report(rows: Sequence[BenchRow], path: str | Path | None, notes: Sequence[str] = ()) -> None:
    """Print rows as a table, the notes below it, and write the rows to `path`."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("what", "here", "unit", "baseline", "", "ratio"):
        right = title in ("here", "baseline", "ratio")
        table.add_column(title, justify="right" if right else "left", no_wrap=True)
    for r in rows:
        table.add_row(r.name, f"{r.value:,.4g}", r.unit, f"{r.baseline_value:,.4g}", r.baseline_name, f"{r.ratio:.2f}x")
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, 140)
    console.print(table)
    for note in [*notes, f"machine: {machine()}"]:
        console.print(note, markup=False)
    if path:
        write_results(path, rows)
