"""A dry run says what a recipe costs and everything that is wrong with it, and reads no data."""

import json

import pytest

from mmseq.cli import main
from mmseq.config import load_config
from mmseq.errors import ConfigError
from mmseq.training.config import TrainConfig
from mmseq.training.dry_run import dry_run

GIVEN = ["out=x", "data.mix=absent", "data.tokens=absent", "data.tokenizers=absent", "model.vocabulary=1000"]


def plan(*more: str, **options):
    return dry_run(load_config(TrainConfig, None, [*GIVEN, *more]), **{"gpus": 4, "gpu": "h100", **options})


def parts(found) -> dict[str, float]:
    return {p.name: p.size for p in found.memory}


def test_the_bytes_of_each_stage():
    """The table of the ZeRO paper (Rajbhandari et al. 2020), in bf16 on 4 ranks."""
    expected = {1: (2, 2, 4), 2: (2, 0.5, 4), 3: (0.5, 0.5, 4)}
    for stage, (weights, gradients, optimizer) in expected.items():
        found = plan(f"deepspeed.zero_stage={stage}")
        per_parameter = {name: size / found.parameters for name, size in parts(found).items()}
        assert per_parameter["weights"] == weights
        assert per_parameter["gradients"] == gradients
        assert per_parameter["optimizer"] == optimizer


def test_what_saves_activations():
    base = parts(plan("model.layers=16"))["activations"]
    assert parts(plan("model.layers=16", "deepspeed.sequence_parallel=2", "data.rows_per_pass=2"))[
        "activations"
    ] == pytest.approx(base / 2)
    assert parts(plan("model.layers=16", "model.activation_checkpointing=true"))["activations"] < base / 5


def test_offloaded_parts_are_the_hosts(tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}))
    found = plan("deepspeed.zero_stage=3", f"deepspeed.settings={tmp_path}/ds.json")
    assert {p.name for p in found.memory if p.on_host} == {"gradients", "optimizer"}


def test_days_are_arithmetic():
    found = plan("steps=1000", mfu=0.5)
    flops = found.flops_per_token * 1000 * found.tokens_per_step
    assert found.days == pytest.approx(flops / (4 * 989e12 * 0.5) / 86400)
    assert plan(gpu=None).days is None
    with pytest.raises(ConfigError, match="h100"):
        plan(gpu="h10")


def test_every_problem_is_named(tmp_path, capsys):
    wrong = ["steps=0", "model.heads=3", "model.kv_heads=2", "data.rows_per_step=6", "optimizer.beta1=2"]
    wrong += ["deepspeed.zero_stage=7", "model.attention=flsh", "deepspeed.settings=absent.json"]
    assert main(["train", "train/tiny.yaml", *GIVEN, *wrong, "--dry-run", "--gpus", "4"]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) >= 8
    for name in ("steps", "model.heads", "rows_per_step", "beta1", "zero_stage", "'flash'", "absent.json"):
        assert name in said


def test_every_unknown_key_is_named(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_config(TrainConfig, None, ["modle.width=3", "data.mixx=2", "out=x"])
    assert "'modle'" in str(caught.value)
    assert "'data.mixx'" in str(caught.value)


def test_files_that_exist_are_read(trainer, capsys):
    command = trainer.command(trainer.root / "never", "range_weights.visoin=2")
    assert main([*command, "--dry-run"]) == 2
    said = capsys.readouterr()
    assert "visoin" in said.err
    assert "'vision'" in said.err
    assert "note" not in said.out
    assert main([*trainer.command(trainer.root / "never"), "--dry-run"]) == 0
    assert "activations" in capsys.readouterr().out
    assert not (trainer.root / "never").exists()
