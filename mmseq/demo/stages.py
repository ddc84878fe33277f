"""What the demo says while it works: how long it will take here, what is being done, and how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

from mmseq.progress import progress

TRIAL_S = 2.0
TRIALS_PER_S = 100.0  # of the two quiet cores on which a demo takes its minutes


class Stages:
    """Prints each stage with a rate and a time left, and keeps how long it took."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)
        self.seconds: dict[str, float] = {}

    def say(self, line: str) -> None:
        self.console.print(line, soft_wrap=True, markup=False)

    @contextmanager
    def stage(self, name: str, counted: str = "steps") -> Iterator[Callable[..., None]]:
        """counted: what progress is counted in, in the plural."""
        began = time.perf_counter()
        self.console.print(f"[bold]{name}[/bold]")
        with progress(f"   {name.split()[0].lower()}", counted) as update:
            yield update
        self.seconds[name] = time.perf_counter() - began
        self.console.print(f"   {self.seconds[name]:.0f} s")


def speed_here() -> float:
    """How fast this machine computes what the demo does most, as a multiple of the one that its minutes are of."""
    import torch
    from torch import nn

    device = "cuda" if torch.cuda.is_available() else "cpu"
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(128, 384), nn.SiLU(), nn.Linear(384, 128)) for _ in range(4)))
    layers.to(device)
    x = torch.randn(2048, 128, device=device)

    def trial() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = layers(x).square().mean()
        loss.backward()
        float(loss.detach())  # waits for a GPU

    trial()
    began, trials = time.perf_counter(), 0
    while time.perf_counter() - began < TRIAL_S:
        trial()
        trials += 1
    return trials / (time.perf_counter() - began) / TRIALS_PER_S
