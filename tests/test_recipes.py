"""Every recipe that is shipped loads strictly, and its model can be built (without memory)."""

from pathlib import Path

import pytest

from mmseq.config import load_config
from mmseq.data.mixture import load_mix
from mmseq.inspection import inspect_recipe
from mmseq.testing import tiny
from mmseq.tokenization.recipe import TokenizerConfig
from mmseq.training.config import TrainConfig
from mmseq.training.dry_run import dry_run

ROOT = Path(__file__).parents[1]
GIVEN = ["out=x", "data.mix=m", "data.tokens=t", "data.tokenizers=absent"]
WORLDS = {"tiny": 1, "demo": 2, "125m": 8, "1b": 8, "7b": 64}
SIZES = {"125m": (0.12e9, 0.13e9), "1b": (0.95e9, 1.5e9), "7b": (6.9e9, 9e9)}
relative = lambda path: path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", sorted((ROOT / "train").glob("*.yaml")), ids=relative)
def test_a_training_recipe_fits_its_ranks_and_its_model_can_be_built(path, tmp_path):
    config = load_config(TrainConfig, path, GIVEN)
    config.check(WORLDS.get(path.stem, 1))
    overrides = GIVEN if config.model.vocabulary else [*GIVEN, "model.vocabulary=2048"]
    if config.init_from:
        tiny.language_model(tmp_path)
        overrides = [*overrides, f"init_from={tmp_path}"]
    found = inspect_recipe(path, overrides)["model"]
    low, high = SIZES.get(path.stem, (1, 1e12))
    assert low <= found["parameters"] <= high
    plan = dry_run(load_config(TrainConfig, path, overrides), gpus=WORLDS.get(path.stem, 1), gpu="h100")
    assert [str(p) for p in plan.problems] == []
    assert plan.parameters == found["parameters"]
    assert sum(p.size for p in plan.memory if not p.on_host) < 80 * 2**30, "it does not fit its GPUs"


@pytest.mark.parametrize("path", sorted((ROOT / "train").glob("*.yaml")), ids=relative)
def test_a_training_recipe_begins_with_its_command_hardware_cost_and_number(path):
    head = path.read_text().split("\nname:")[0]
    assert f"train/{path.name}" in head
    for word in ("#   ", "Cost: ", "Expect: "):
        assert word in head


@pytest.mark.parametrize("path", sorted((ROOT / "tokenizers").glob("*/recipe.yaml")), ids=relative)
def test_a_tokenizer_recipe_is_consistent(path):
    load_config(TokenizerConfig, path, ["out=x"]).check()


@pytest.mark.parametrize("path", sorted((ROOT / "data_mixes").glob("*.yaml")), ids=relative)
def test_a_mix_is_consistent(path):
    load_mix(path)
