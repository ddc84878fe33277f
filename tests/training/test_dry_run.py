"""A dry run says what a recipe costs and everything that is wrong with it, and reads no data."""

import json
from dataclasses import replace

import pytest

from mmseq.cli import main
from mmseq.config import load_config
from mmseq.errors import ConfigError
from mmseq.testing import tiny
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
    assert "note: no " not in said.out
    assert main([*trainer.command(trainer.root / "never"), "--dry-run"]) == 0
    assert "activations" in capsys.readouterr().out
    assert not (trainer.root / "never").exists()


def test_what_the_start_would_refuse(trainer, tmp_path, capsys):
    """Files that are there but do not fit each other, and a place that cannot be written."""

    def said(*settings: str) -> str:
        assert main([*trainer.command(tmp_path / "never", *settings), "--dry-run"]) == 2
        return capsys.readouterr().err

    assert "data.row_tokens=16. Raise that to at least " in said("data.row_tokens=16")
    other = tiny.tokenizers()
    other.with_embodiments([replace(tiny.embodiment(), rate_hz=7.0)]).save(tmp_path / "others")
    assert "other tokenizers" in said(f"data.tokenizers={tmp_path}/others")
    tiny.language_model(tmp_path / "lm", "llama")
    assert "text tokenizer of their own" in said(f"init_from={tmp_path}/lm")
    (tmp_path / "file").write_text("")
    assert "cannot be written" in said(f"out={tmp_path}/file/run")


def test_what_will_not_happen_is_noted(trainer, tmp_path, capsys):
    (tmp_path / "all.yaml").write_text((trainer.root / "mix.yaml").read_text() + "holdout: 0\n")
    settings = ["optimizer.warmup_steps=50", "steps=100", "validate_every=5", f"data.mix={tmp_path}/all.yaml"]
    assert main([*trainer.command(tmp_path / "never", *settings), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "shortened to a tenth of 100 steps" in said
    assert "validate_every does nothing" in said


def test_a_folder_of_a_run_is_compared_with_the_recipe(trainer, tmp_path, capsys):
    out = trainer.done(tmp_path / "run", 1, "deepspeed.dtype=fp32", "stop_after=4")
    dry = [*trainer.command(out, "deepspeed.dtype=fp32"), "--dry-run"]
    assert main(dry) == 0
    assert f"goes on from {out}/checkpoints/step_00000004, step 4 of 10" in capsys.readouterr().out
    assert main([*dry, "model.width=64"]) == 2
    assert "belongs to another run (the model differs)" in capsys.readouterr().err
    done = trainer.run(out, 1, "deepspeed.dtype=fp32", "optimizer.learning_rate=0.001")
    assert "started last: stop_after 4 -> 0, optimizer.learning_rate 0.003 -> 0.001" in done.output
