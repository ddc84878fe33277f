"""Stability: which steps may change the weights.

A loss or gradient that is not finite never does. A spike is a loss 6 standard deviations above the mean of
the last 128 (the rule that OLMo 2 counts its spikes by); it is logged, and left out when the recipe says so.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmseq.training.checkpoint import RunState

WINDOW = 128
SIGMA = 6.0


def why_skip(loss: float, state: RunState) -> str | None:
    """What is wrong with the loss of a step, before it is applied: `loss`, `spike`, or None."""
    if not math.isfinite(loss):
        return "loss"
    recent = state.recent_losses
    if len(recent) == WINDOW:
        mean = math.fsum(recent) / WINDOW
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in recent) / WINDOW)
        if loss > mean + SIGMA * deviation:
            return "spike"
    return None


def record(loss: float, state: RunState, *, applied: bool) -> None:
    """Count a step, and remember its loss for the next ones."""
    if applied:
        state.updates += 1
        state.skipped_in_a_row = 0
    else:
        state.skipped += 1
        state.skipped_in_a_row += 1
    if math.isfinite(loss):  # skipped spikes too: when the loss stays high, it is no spike
        state.recent_losses = [*state.recent_losses, loss][-WINDOW:]


def clip_gradients(gradients: list[Tensor], limit: float) -> float:
    """Scale gradients so that their norm is at most `limit` (0: any); returns the norm before."""
    if not gradients:
        return 0.0
    norm = torch.nn.utils.get_total_norm(gradients)
    if limit and torch.isfinite(norm):
        torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
    return float(norm)
