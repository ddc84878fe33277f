"""The settings in train/deepspeed/ are merged into a recipe, and DeepSpeed trains with them."""

from pathlib import Path

import pytest

from mmseq.errors import ConfigError
from mmseq.training.config import TrainConfig
from mmseq.training.engine import deepspeed_settings

FILES = sorted((Path(__file__).parents[2] / "train" / "deepspeed").glob("*.json"))


def stage_of(path: Path) -> int:
    return int(path.stem[4])


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_two_ranks_learn_with_it_what_one_learns(trainer, losses, tmp_path, path):
    same = ["steps=2", "deepspeed.dtype=fp32"]
    alone = trainer.done(tmp_path / "alone", 1, *same, "deepspeed.zero_stage=0")
    run = trainer.done(
        tmp_path / "run", 2, *same, f"deepspeed.settings={path}", f"deepspeed.zero_stage={stage_of(path)}"
    )
    assert list(losses(run).values()) == pytest.approx(list(losses(alone).values()), rel=1e-5)
    assert len(losses(run)) == 2


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_it_says_which_stage_it_is_for(path):
    config = TrainConfig()
    config.deepspeed.settings = str(path)
    config.deepspeed.zero_stage = stage_of(path)
    assert deepspeed_settings(config, 2)["zero_optimization"]["stage"] == stage_of(path)
    config.deepspeed.zero_stage = (stage_of(path) + 1) % 4
    with pytest.raises(ConfigError, match=rf"sets zero_optimization.stage={stage_of(path)}, the recipe"):
        deepspeed_settings(config, 2)


def test_there_is_one_for_each_stage_and_one_that_offloads():
    assert [p.stem for p in FILES] == ["zero0", "zero1", "zero2", "zero3", "zero3_offload"]
