"""One evaluation of a tiny model, shared by the tests of this folder."""

from __future__ import annotations

import pytest
import torch

from mmseq.evaluation.generation import evaluate_generation
from mmseq.grammar import ALIASES
from mmseq.testing import tiny


def short(arrow: str) -> str:
    return arrow.replace("16", "4").replace("[8]", "[4]").replace("* 8", "* 3")


@pytest.fixture(scope="session")
def evaluated():
    """(results by name, media, robot episodes, videos, training episodes) of every built-in task."""
    torch.set_num_threads(1)
    model = tiny.model()
    episodes = [tiny.episode(seed, 14) for seed in (0, 1, 5)]
    videos = [tiny.video(seed, 14) for seed in (2, 3)]
    train = [tiny.episode(seed, 14) for seed in (6, 7, 11)] + [tiny.video(8, 14)]
    arrows = {name: short(arrow) for name, arrow in ALIASES.items()}
    results, media = evaluate_generation(model, episodes, videos, arrows, train_episodes=train, samples=6)
    return {r.name: r for r in results}, media, episodes, videos, train
