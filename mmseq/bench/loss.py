"""Loss: the range loss against full fp32 logits and cross entropy, over one range as large as a language model's.

    mmseq bench loss --json loss.json

Both take the same hidden states, output matrix and targets, forward and backward, in turns, each in a process of its
own. Memory is the most that torch holds at once beyond these and their gradients, which both sides need. The
defaults need 15 GB, nearly all of it for the full logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mmseq.bench.rows import BenchRow, Spread, require_positive, row, take_turns
from mmseq.bench.worker import Worker, peak_allocated, synchronised_clock
from mmseq.model.device import default_device
from mmseq.model.range_loss import range_loss

SIDES = ("range_loss", "full_logits")


@dataclass(kw_only=True)
class Config:
    """What `mmseq bench loss` measures."""

    positions: int = 8192  # hidden states
    width: int = 64  # of each
    vocabulary: int = 150_000  # rows of the output matrix
    turns: int = 2  # at least, within `seconds`
    seconds: float = 1.0  # of all turns together
    seed: int = 0  # of what is drawn

    def check(self) -> None:
        """Raises: ConfigError naming the option."""
        require_positive(self, "positions", "width", "vocabulary", "turns", "seconds")


def bench(config: Config) -> tuple[list[BenchRow], list[str]]:
    """Rows, and what else there is to say. Raises: ConfigError."""
    config.check()
    workers: dict[str, Worker] = {}
    try:
        for side in SIDES:
            workers[side] = Worker(Side, config, side)
        memory = {side: Spread((worker("memory") / 2**20,)) for side, worker in workers.items()}
        nats = {side: worker("value") for side, worker in workers.items()}
        runs: dict[str, Callable[[], float]] = {s: lambda w=w: w("turn") for s, w in workers.items()}
        times = take_turns(runs, seconds=config.seconds, at_least=config.turns)
    finally:
        for worker in workers.values():
            worker.close()
    logits = Spread((config.positions * config.vocabulary * 4 / 2**20,))
    full, seed = "full fp32 logits + cross entropy", config.seed
    rows = [
        row("loss.peak_memory", "MiB", memory["range_loss"], full, memory["full_logits"], better="lower", seed=seed),
        row("loss.peak_memory_of_logits", "MiB", memory["range_loss"], "full fp32 logits", logits, better="lower"),
        row("loss.time", "s", times["range_loss"], full, times["full_logits"], better="lower", seed=seed),
    ]
    notes = [f"{side}: {times[side]} s, {nats[side]:.6f} nats per position" for side in SIDES]
    notes.append(f"{config.positions:,} positions, width {config.width}, {config.vocabulary:,} codes, fp32")
    return rows, notes


class Side:
    """One of the two, in a process of its own."""

    def __init__(self, config: Config, side: str):
        generator = torch.Generator().manual_seed(config.seed)
        device = default_device()
        self.side = side
        self.hidden_ND = torch.randn(config.positions, config.width, generator=generator).to(device).requires_grad_()
        self.weight_VD = torch.randn(config.vocabulary, config.width, generator=generator).to(device).requires_grad_()
        self.target_N = torch.randint(config.vocabulary, (config.positions,), generator=generator).to(device)
        small = self.hidden_ND[:8].detach().requires_grad_()  # what the libraries allocate once
        self._loss(small, self.weight_VD, self.target_N[:8]).backward()
        self.weight_VD.grad = None
        peak = peak_allocated(self._both)
        self.nats = self._both()
        gradients = self.hidden_ND.grad.nbytes + self.weight_VD.grad.nbytes  # type: ignore[union-attr]
        self.peak = peak - gradients

    def _loss(self, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
        if self.side == "range_loss":
            return range_loss(hidden_ND, weight_VD, target_N)[1]
        return torch.nn.functional.cross_entropy(hidden_ND @ weight_VD.t(), target_N, reduction="sum")

    def _both(self) -> float:
        self.hidden_ND.grad = self.weight_VD.grad = None
        total = self._loss(self.hidden_ND, self.weight_VD, self.target_N)
        total.backward()
        return float(total.detach()) / len(self.target_N)

    def memory(self) -> int:
        return self.peak

    def value(self) -> float:
        return self.nats

    def turn(self) -> float:
        """Seconds of forward and backward."""
        began = synchronised_clock()
        self._both()
        return synchronised_clock() - began
