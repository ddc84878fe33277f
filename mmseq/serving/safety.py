"""The last check before actions leave for a robot: shape, finite, within the embodiment's limits."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from mmseq.embodiment import Embodiment
from mmseq.serving.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """out_of_range: `clamp` limits an axis to its minimum..maximum, `refuse` answers with an error instead.

    tolerance: how far outside, as a share of the axis' range, still counts as rounding and is only limited.
    """

    out_of_range: Literal["clamp", "refuse"] = "clamp"
    tolerance: float = 1e-4


@dataclass
class GateCounts:
    """What the gate has seen since the start. values: numbers of a chunk, steps x axes."""

    chunks: int = 0
    chunks_clamped: int = 0
    chunks_refused: int = 0
    values_clamped: int = 0


class SafetyGate:
    """Checks every chunk; nothing that is not finite or outside of the limits passes in any configuration."""

    def __init__(self, config: GateConfig):
        self.config = config
        self.counts = GateCounts()

    def check(
        self, actions: Any, embodiment: Embodiment, *, horizon: int | None, prefix: np.ndarray | None = None
    ) -> tuple[np.ndarray, int]:
        """The chunk as float32 (horizon, axes) within the limits, and how many of its values were clamped.

        prefix: float32 (n, axes), committed already; the chunk begins with exactly these.
        Raises: RequestError `unsafe_action`.
        """
        self.counts.chunks += 1
        axes = embodiment.action
        assert axes is not None
        if not isinstance(actions, np.ndarray) or actions.dtype.kind not in "iuf":
            self._refuse(f"actions are {type(actions).__name__}, expected a float32 array")
        wanted = (horizon if horizon is not None else "n", len(axes))
        if actions.ndim != 2 or actions.shape[1] != len(axes) or (horizon is not None and len(actions) != horizon):
            self._refuse(f"actions are {actions.shape}, expected {wanted} for axes {list(axes.names)}")
        with np.errstate(over="ignore"):
            actions = actions.astype(np.float32)  # a copy: the policy may keep its own
        if prefix is not None:
            actions[: len(prefix)] = prefix
        bad = ~np.isfinite(actions)
        if bad.any():
            step, axis = np.argwhere(bad)[0]
            self._refuse(f"action axis {axes.names[axis]!r} is {actions[step, axis]} at step {step}")
        low, high = np.asarray(axes.minimum, np.float32), np.asarray(axes.maximum, np.float32)
        slack = self.config.tolerance * np.maximum(high - low, 1e-6)
        outside = (actions < low - slack) | (actions > high + slack)
        clamped = int(outside.sum())
        if clamped and self.config.out_of_range == "refuse":
            step, axis = np.argwhere(outside)[0]
            self._refuse(
                f"action axis {axes.names[axis]!r} is {actions[step, axis]:.5g} at step {step}, outside "
                f"{axes.minimum[axis]:.5g}..{axes.maximum[axis]:.5g} {axes.units[axis]}"
            )
        self.counts.values_clamped += clamped
        self.counts.chunks_clamped += clamped > 0
        actions = np.clip(actions, low, high)
        if prefix is not None:
            actions[: len(prefix)] = prefix
        return actions, clamped

    def _refuse(self, what: str) -> None:
        self.counts.chunks_refused += 1
        raise RequestError("unsafe_action", f"the safety gate withheld a chunk: {what}")

    def status(self) -> dict[str, Any]:
        return {"out_of_range": self.config.out_of_range, **asdict(self.counts)}
