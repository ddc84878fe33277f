"""Stopping and going on gives the losses of the uninterrupted run, bit for bit, on one and two ranks."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest

import mmseq
from mmseq import SequenceModel
from mmseq.data.mixture import Mixture, load_mix
from mmseq.training.config import TrainConfig
from mmseq.training.engine import Objective
from mmseq.training.validation import held_out_batches

SINGLE = ["deepspeed.dtype=fp32", "deepspeed.zero_stage=0", "optimizer.kind=muon"]

# What the ten steps of one rank in fp32 lose, in nats per token. A change here is a change of the data
# order, the sequences, the initialisation, the loss or the optimizer: say which in the commit.
GOLDEN = [4.00263, 4.03214, 3.99017, 3.9814, 3.9703, 4.05742, 3.7004, 3.23024, 4.02308, 3.59596]


@pytest.fixture(scope="module")
def single(trainer, tmp_path_factory) -> Path:
    """Ten uninterrupted steps of one process."""
    return trainer.done(tmp_path_factory.mktemp("single") / "run", 1, *SINGLE)


def test_golden_losses(single, losses):
    assert list(losses(single).values()) == pytest.approx(GOLDEN, rel=1e-4)


def test_the_run_and_its_model_say_which_code_made_them(single):
    code = json.loads((single / "code.json").read_text())
    assert code["version"] == mmseq.__version__
    assert json.loads((single / "checkpoint/code.json").read_text()) == code


@pytest.mark.parametrize(
    ("ranks", "more"),
    [
        (1, SINGLE),
        (2, ["deepspeed.dtype=fp32", "deepspeed.zero_stage=0", "optimizer.kind=muon", "optimizer.average_decay=0.9"]),
        (2, ["deepspeed.dtype=fp32", "deepspeed.zero_stage=1"]),
        (2, ["deepspeed.dtype=fp32", "deepspeed.zero_stage=3", "optimizer.average_decay=0.9"]),
    ],
)
def test_resume_is_exact(trainer, losses, single, tmp_path, ranks, more):
    parts = tmp_path / "parts"
    whole = single if more == SINGLE else trainer.done(tmp_path / "whole", ranks, *more)
    for stop in ("4", "0"):
        trainer.done(parts, ranks, *more, f"stop_after={stop}")
    assert losses(whole) == losses(parts)
    assert len(losses(whole)) == 10
    weights = [(out / "checkpoint/model.safetensors").read_bytes() for out in (whole, parts)]
    assert weights[0] == weights[1]


def settings_without_persistence(path: Path) -> str:
    """DeepSpeed keeps small weights whole on every rank, and all of a tiny model's are small: partition them."""
    stage3 = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 1000}
    path.write_text(json.dumps({"zero_optimization": stage3}))
    return f"deepspeed.settings={path}"


@pytest.mark.parametrize("tied", ["true", "false"])
@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3])
def test_every_zero_stage_learns_the_same(trainer, losses, tmp_path, stage, tied):
    """Two ranks hold different tasks in a step, so what they gather and reduce must not depend on the batch."""
    same = ["deepspeed.dtype=fp32", f"model.tie_embeddings={tied}", "model.activation_checkpointing=true"]
    same += ["validate_every=5", f"data.mix={trainer.root}/holdout.yaml"]
    more = [f"deepspeed.zero_stage={stage}"]
    more += [settings_without_persistence(tmp_path / "settings.json")] if stage == 3 else []
    sizes = []
    for name, ranks, settings in (("alone", 1, ["deepspeed.zero_stage=0"]), ("ranks", 2, more)):
        done = trainer.run(tmp_path / name, ranks, *same, *settings)
        assert set(done.codes) == {0}, done.output[-2000:]
        sizes.append(re.search(r"[\d.]+ M parameters", done.output)[0])  # type: ignore[index]
    assert sizes[0] == sizes[1]
    alone, ranks = losses(tmp_path / "alone"), losses(tmp_path / "ranks")
    assert list(ranks.values()) == pytest.approx(list(alone.values()), rel=1e-5)
    assert len(ranks) == 10
    assert validation(tmp_path / "ranks") == pytest.approx(validation(tmp_path / "alone"), rel=1e-4)
    assert exported_bits(trainer.root, tmp_path / "ranks") == pytest.approx(validation(tmp_path / "ranks"), rel=1e-4)


@pytest.mark.parametrize(("ranks", "stage"), [(1, 1), pytest.param(2, 2, marks=pytest.mark.slow), (2, 3)])
def test_bf16_weights_learn_nearly_the_same(trainer, losses, single_adamw, tmp_path, ranks, stage):
    more = [settings_without_persistence(tmp_path / "settings.json")] if stage == 3 else []
    trainer.done(tmp_path / "run", ranks, "deepspeed.dtype=bf16", f"deepspeed.zero_stage={stage}", *more)
    found = list(losses(tmp_path / "run").values())
    assert found == pytest.approx(list(losses(single_adamw).values()), rel=0.01)


@pytest.fixture(scope="module")
def single_adamw(trainer, tmp_path_factory) -> Path:
    return trainer.done(tmp_path_factory.mktemp("adamw") / "run", 1, "deepspeed.dtype=fp32", "deepspeed.zero_stage=0")


def validation(out: Path) -> dict[str, float]:
    """The last held-out bits per token by task."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["bits_per_token"] for row in rows if row["kind"] == "validation"][-1]


def exported_bits(data: Path, out: Path) -> dict[str, float]:
    """The same of the finished model, as it lies on disk."""
    model = SequenceModel.from_pretrained(out / "checkpoint")
    mix = load_mix(data / "holdout.yaml")
    held = Mixture(mix, data / "tokens", model.tokenizers, row_tokens=256, seed=0, split="holdout")
    batches = [h.batch for h in held_out_batches(TrainConfig(), held)]
    objective = Objective(model, len(held.task_names), {}, autocast=False)
    nats, counts = sum(objective(batch)[1] for batch in batches).tolist()
    return {name: nats[i] / counts[i] / math.log(2) for i, name in enumerate(held.task_names) if counts[i]}


def test_a_refused_or_damaged_resume_changes_nothing(trainer, single, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(single, out)
    kept = {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != ".lock"}
    for change, message in (
        (["seed=7"], "belongs to another run (seed: 0 there, 7 here)"),
        (["steps=5"], "is at step 10, beyond steps=5"),
    ):
        done = trainer.run(out, 1, *SINGLE, *change)
        assert done.codes == [2]
        assert message in done.output
        assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != ".lock"} == kept
    for path in out.glob("checkpoints/*/rank_*"):
        path.write_bytes(path.read_bytes()[:1000])
    done = trainer.run(out, 1, *SINGLE, "steps=12")
    assert done.codes == [2]
    assert "step_00000010 is damaged: rank_00000.safetensors" in done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    "change",
    ["optimizer.beta1=2", "optimizer.gradient_clip=-1", "range_weights.vision=.nan", "seed=-1", "validation_samples=0"],
)
def test_a_value_that_cannot_be_is_refused_by_name(trainer, tmp_path, change):
    done = trainer.run(tmp_path / "run", 1, change)
    assert done.codes == [2]
    assert change.split("=")[0] in done.output
    assert not (tmp_path / "run").exists()


def test_a_wrong_recipe_is_refused_before_training(trainer, tmp_path):
    done = trainer.run(tmp_path / "run", 1, "modle.width=3")
    assert done.codes == [2]
    assert "unknown key 'modle'" in done.output
    assert "did you mean 'model'?" in done.output
    assert not (tmp_path / "run").exists()
