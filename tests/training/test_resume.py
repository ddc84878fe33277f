"""Stopping and going on gives the losses of the uninterrupted run, bit for bit, on one and two ranks."""

import json
import math
import re
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch

import mmseq
from mmseq import SequenceModel
from mmseq.data.mixture import Mixture, load_mix
from mmseq.errors import CheckpointError
from mmseq.training import checkpoint
from mmseq.training.config import TrainConfig
from mmseq.training.engine import Objective
from mmseq.training.fragments import Fragment
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


RUN = {"step": 4, "steps": 10, "updates": 4, "asked": [10, 0.0], "data": {"block": 0, "row": 7}}


def written_state(folder: Path, step: int = 4, **changes) -> Path:
    """A checkpoint's folder with its state file alone. changes: in `run`, else of the file."""
    stored = {"run": RUN | {"step": step}, "identity": {}, "format": checkpoint.FORMAT}
    for key, value in changes.items():
        (stored if key in stored else stored["run"])[key] = value
    path = folder / f"step_{step:08d}"
    path.mkdir(parents=True)
    (path / checkpoint.STATE_FILE).write_text(json.dumps(stored))
    return path


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        ({"updates": 0, "data": {"block": 0, "row": 0}}, None),
        ({"steps": 2**62 - 1}, None),
        ({"steps": 2**62}, "are .4, 4611686018427387904, 4, 0, 7"),
        ({"updates": -1}, "step, steps, updates, block and row are"),
        ({"updates": 2.0}, "step, steps, updates, block and row are"),
        ({"data": {"block": "0", "row": 7}}, "step, steps, updates, block and row are"),
        ({"identity": []}, "step, steps, updates, block and row are"),
        ({"asked": [1]}, "not enough values"),
        ({"other": 1}, "unexpected keyword"),
        ({"run": RUN | {"step": 5}}, "it says step 5"),
        ({"format": 1}, "written by another version"),
    ],
)
def test_a_state_that_no_run_could_write_is_refused(tmp_path, changes, says):
    path = written_state(tmp_path, **changes)
    if says is None:
        assert checkpoint.read_state(path).asked == (10, 0.0)
    else:
        with pytest.raises(CheckpointError, match=says):
            checkpoint.read_state(path)


def test_what_differs_from_another_run_is_told_in_full_while_it_is_short(tmp_path):
    there = {"seed": 0, "recipe": "a" * 80, "mix": "b" * 81, "model": "short", "same": 1}
    path = written_state(tmp_path, identity=there)
    here = {"seed": 7, "recipe": "c", "mix": "d", "model": "e" * 81, "same": 1}
    with pytest.raises(CheckpointError) as refused:
        checkpoint.require_same(path, here)
    told = f"(seed: 0 there, 7 here; recipe: {'a' * 80} there, c here; the mix differs; the model differs)"
    assert told in str(refused.value)
    assert checkpoint.require_same(path, there).step == 4


def test_only_the_newest_checkpoints_and_milestones_are_kept(tmp_path):
    for step in (5, 10, 15, 20, 25, 30):
        written_state(tmp_path, step)
    (tmp_path / "step_00000007").mkdir()  # its rotation was interrupted
    for other in ("notes", "step_00000035.partial"):
        written_state(tmp_path / "of another").rename(tmp_path / other)
    (tmp_path / "of another").rmdir()
    left = lambda: sorted(p.name for p in tmp_path.iterdir())
    complete = lambda: [int(p.name.removeprefix("step_")) for p in checkpoint.complete_checkpoints(tmp_path)]
    assert complete() == [5, 10, 15, 20, 25, 30]
    checkpoint._rotate(tmp_path, 2, 10)
    assert complete() == [10, 20, 25, 30]
    checkpoint._rotate(tmp_path, 1, 0)
    assert left() == ["notes", "step_00000030", "step_00000035.partial"]
    assert checkpoint.complete_checkpoints(tmp_path / "nowhere") == []


@pytest.fixture
def alone():
    """A group of one process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_checkpoint_that_another_node_wrote_may_appear_late(alone, monkeypatch, tmp_path):
    late, began = tmp_path / "step_00000004", time.monotonic()
    monkeypatch.setattr(checkpoint, "LATE_S", 20)
    monkeypatch.setattr(checkpoint, "complete_checkpoints", lambda folder: [late])  # as rank 0 of another node sees it
    timer = threading.Timer(0.1, written_state, [tmp_path])
    timer.start()
    assert checkpoint.newest(tmp_path) == late
    timer.join()
    assert checkpoint.newest(tmp_path) == late
    assert time.monotonic() - began < 10  # what is there is not waited for
    shutil.rmtree(late)
    monkeypatch.setattr(checkpoint, "LATE_S", 0.1)
    with pytest.raises(CheckpointError, match="not every rank sees"):
        checkpoint.newest(tmp_path)


@pytest.mark.parametrize(("error", "says"), [(OSError("the disk is full"), "the disk is full"), (OSError(), "OSError")])
def test_a_checkpoint_that_cannot_be_written_leaves_nothing_and_says_why(alone, monkeypatch, tmp_path, error, says):
    def broken(*_):
        raise error

    monkeypatch.setattr(checkpoint, "local_fragments", broken)
    state = checkpoint.RunState(step=5)
    for newest in ("there is no earlier checkpoint", "it goes on from .*step_00000004"):
        with pytest.raises(CheckpointError, match=rf"step_00000005 could not be written: {says}\..*{newest}"):
            checkpoint.save(None, torch.nn.Linear(1, 1), state, tmp_path / "run", identity={}, keep=1)
        assert not list((tmp_path / "run").glob("*.partial"))
        if not list((tmp_path / "run").iterdir()):
            written_state(tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["step_00000004"]


@pytest.fixture
def stored(tmp_path) -> Path:
    """A checkpoint of two ranks: a parameter `w` of 2 x 5 elements in pieces of 6 and 4, and its moving average."""
    folder, values = tmp_path / "step_00000004", torch.arange(10.0)
    folder.mkdir()
    for rank, (start, stop) in enumerate(((0, 6), (6, 10))):
        part = {"weight": values[start:stop], "average": values[start:stop] + 100}
        path = folder / f"rank_{rank:05d}.safetensors"
        checkpoint._write_fragments(path, [Fragment("w", start, stop - start, part)])
    paths = sorted(folder.iterdir())
    sums = {path.name: checkpoint._sha256(path) for path in paths}
    index = checkpoint._index(paths, {"w": [2, 5]})
    (folder / checkpoint.STATE_FILE).write_text(json.dumps({"sha256": sums, **index}))
    return folder


def test_any_piece_of_a_parameter_is_read_whatever_ranks_wrote_it(stored):
    tensors, values = checkpoint.StoredTensors(stored), torch.arange(10.0)
    for start in range(10):
        for length in range(10 - start + 1):
            assert torch.equal(tensors.piece("w", "weight", start, length), values[start : start + length])
    assert torch.equal(dict(tensors.weights())["w"], values.view(2, 5))
    assert torch.equal(dict(tensors.weights(averaged=True))["w"], values.view(2, 5) + 100)
    with pytest.raises(CheckpointError, match="w weight has 2 of 3 elements"):
        tensors.piece("w", "weight", 8, 3)
    tensors._fragments["w"] = [[0, 4, 0], [6, 4, 1]]  # a hole
    with pytest.raises(CheckpointError, match="w weight has 4 of 10 elements"):
        tensors.whole("w")


def test_a_file_that_was_changed_is_noticed_by_the_rank_that_is_to_read_it(stored):
    checkpoint.StoredTensors(stored).verify(0, 1)
    path = stored / "rank_00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    tensors = checkpoint.StoredTensors(stored)
    tensors.verify(0, 2)
    for part, parts in ((1, 2), (0, 1)):
        with pytest.raises(CheckpointError, match=r"rank_00001.safetensors is not what was written"):
            tensors.verify(part, parts)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"rank_00001.safetensors is missing or does not have its \d+ bytes"):
        checkpoint.StoredTensors(stored)


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
