"""Statistics of a dataset's vectors: the range that its bins cover and its limits follow, and what is no motion.

Bins reach from the least to the greatest value, so that what is rare (a gripper that opens in one step of 200) comes
back as what it was; on real robots this makes them 0 to 40 % wider than 1 % and 99 % quantiles would be. Only a
*wild* value does not count: one that comes and goes within a step, in at most a hundredth of them, and that lies
further from all the others of its axis than these lie apart (10000 among -2 to 2). An axis that else never moves
has no such measure, so whatever it does counts. Both are said: `remarks` names axis, step and
episode.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

WILD = 1.0  # of the range of all other values: a lone step further out than that is no motion
RARE = 0.25  # likewise: what sets a limit from that far out is said
LEAST_STEPS = 20  # of fewer nothing can be said


@dataclass(frozen=True)
class Extent:
    """Of one axis: its range without wild values, which steps are wild, and which few set a limit of the range."""

    low: float
    high: float
    wild: np.ndarray
    rare: np.ndarray


def extent(values: np.ndarray) -> Extent:
    """The range of one axis, float (steps,). Values that are not finite make it so, too."""
    count = len(values)
    none = np.zeros(0, dtype=np.int64)
    if not np.isfinite(values).all():
        return Extent(float(values.min()), float(values.max()), none, none)
    few = 0 if count < LEAST_STEPS else max(1, count // 100)
    order = np.argpartition(values, [few, count - 1 - few]) if few else np.argsort(values)
    below, above = order[: few + 1], order[count - 1 - few :]
    below, above = below[np.argsort(-values[below])], above[np.argsort(values[above])]  # each outward from the middle
    low, high = float(values[below[0]]), float(values[above[0]])
    wild: list[np.ndarray] = [none]
    rare: list[np.ndarray] = [none]
    moves = high > low
    for side in (below, above) if few else ():
        at = 1
        while at < len(side) and not (moves and abs(values[side[at]] - values[side[at - 1]]) > WILD * (high - low)):
            low, high = min(low, float(values[side[at]])), max(high, float(values[side[at]]))
            at += 1
        alone = np.sort(side[at:])
        if len(alone) and (np.diff(alone) > 1).all():
            wild.append(alone)
        else:  # it stays for some steps, so it is a motion
            low, high = min(low, float(values[side].min())), max(high, float(values[side].max()))
            at = len(side)
        steps = np.abs(np.diff(values[side[:at]]))
        if count >= 5 * LEAST_STEPS and len(steps) and steps.max() > RARE * (high - low - steps.max()):
            rare.append(np.sort(side[int(steps.argmax()) + 1 : at]))
    if not few:
        low, high = float(values.min()), float(values.max())
    return Extent(low, high, np.concatenate(wild), np.concatenate(rare))


def remarks(episodes: Sequence[tuple[str, np.ndarray]], names: Sequence[str], what: str) -> Iterator[str]:
    """What the statistics of a stream leave out or lean on, for people.

    episodes: of each, what to call it and its values, float (steps, axes). what: the name of the stream.
    """
    ends = np.cumsum([len(values) for _, values in episodes])
    values = np.concatenate([values for _, values in episodes])

    def first(at: np.ndarray, axis: int) -> str:
        episode = int(np.searchsorted(ends, at[0], side="right"))
        where, own = episodes[episode]
        return f"{values[at[0], axis]:.5g} at step {at[0] - ends[episode] + len(own)} of {where}"

    for axis, name in enumerate(names):
        found = extent(values[:, axis])
        if len(found.wild):
            yield (
                f"{what} {name} is {first(found.wild, axis)}{_more(found.wild)}, all else lies in {found.low:.5g}.."
                f"{found.high:.5g}: taken for a fault, bins and limits follow the rest"
            )
        if len(found.rare):
            rest = np.delete(values[:, axis], np.concatenate([found.rare, found.wild]))
            yield (
                f"{what} {name} is {first(found.rare, axis)}{_more(found.rare)}, all else lies in {rest.min():.5g}.."
                f"{rest.max():.5g}: bins and limits reach that far"
            )


def _more(at: np.ndarray) -> str:
    return f" (and {len(at) - 1} more)" if len(at) > 1 else ""
