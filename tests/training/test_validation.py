"""Validation says how far off held-out answers are in real units, the same whatever the ranks."""

import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmseq import SequenceModel
from mmseq.data.mixture import Mixture, load_mix
from mmseq.inference.decoding import Decoder, Request
from mmseq.packing import collate
from mmseq.tasks import Task
from mmseq.testing import tiny
from mmseq.tokenization.bundle import EpisodeTokens, Tokenizers
from mmseq.tokenization.values import Span, axis_groups, values_of
from mmseq.training.config import TrainConfig
from mmseq.training.engine import Objective
from mmseq.training.validation import PICTURES, held_out_batches, spans

FP32 = ["deepspeed.dtype=fp32", "validate_every=5", "validation_samples=6"]
MEASURES = {
    "policy": {"action_error.arm.unitless", "action_error.arm.gripper_unitless"},
    "forward_dynamics": {"psnr_db"},
    "value": {"progress_error"},
    "caption": {"text_bits_per_token", "text_exact_match"},
}


def span(stream: str, true, predicted, nats=0.0) -> Span:
    true, predicted = np.asarray(true), np.asarray(predicted)
    return Span(
        stream=stream, embodiment="arm", true=true, predicted=predicted, nats=np.full(len(true), nats, np.float32)
    )


def measure(span, bundle):
    return values_of(span.stream).measure(span, bundle)


def picture(span, bundle):
    return values_of(span.stream).draw(span, bundle)


@pytest.fixture(scope="module")
def bundle():
    return tiny.tokenizers()


def test_actions_are_measured_in_the_units_of_their_axes(bundle):
    robot = bundle.embodiment("arm")
    axes = robot.action
    assert axis_groups(axes, robot) == {"unitless": [0, 1, 2], "gripper_unitless": [3]}
    true = bundle["action"].encode(np.array([[0.0, 0.5, -0.5, 1.0], [0.2, 0.0, 0.0, -1.0]]), axes)
    off = true.copy()
    off[0, 1] += 3
    off[1, 3] += 4
    found = measure(span("action", true.ravel(), off.ravel()), bundle)
    bin_ = 2.0 / (bundle["action"].size - 1)
    assert found["action_error.arm.unitless"] == (pytest.approx(3 * bin_), 6)
    assert found["action_error.arm.gripper_unitless"] == (pytest.approx(4 * bin_), 2)


def test_pictures_are_compared_as_pixels_and_drawn_true_above_predicted():
    bundle = tiny.tokenizers()
    with torch.no_grad():  # untrained, it draws every code alike
        bundle.vision._network.decoder_out.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    codes = np.random.default_rng(0).integers(0, bundle.vision.size, (2, bundle.layout.frame_tokens))
    other = codes.copy()
    other[1] = codes[0]
    found = span("video", codes.ravel(), other.ravel())
    total, count = measure(found, bundle)["psnr_db"]
    frames = bundle.vision.decode(codes).astype(float)
    mse = ((frames[0] - frames[1]) ** 2).mean()
    assert count == 2
    assert total == pytest.approx(60 + 10 * math.log10(255**2 / mse))
    drawn = picture(found, bundle)
    assert drawn is not None
    assert (drawn[:32, 32:] == frames[1].repeat(2, 0).repeat(2, 1)).all()
    assert (drawn[-32:, 32:] == frames[0].repeat(2, 0).repeat(2, 1)).all()


def test_words_and_scalars(bundle):
    codes = bundle.text.encode("open the window")
    assert measure(span("plan", codes, codes, math.log(2)), bundle) == {
        "plan_bits_per_token": (pytest.approx(len(codes)), len(codes)),
        "plan_exact_match": (1.0, 1),
    }
    wrong = codes.copy()
    wrong[0] += 1
    assert measure(span("text", codes, wrong), bundle)["text_exact_match"] == (0.0, 1)
    last = bundle["progress"].size - 1
    assert measure(span("progress", [last], [last / 2]), bundle) == {"progress_error": (pytest.approx(0.5), 1)}
    assert measure(span("success", [1], [0.4]), bundle) == {"success_accuracy": (0.0, 1)}
    assert picture(span("progress", [1], [1.0]), bundle) is None


def test_answers_to_the_true_prefix_are_those_of_decoding(bundle):
    """The first code that decoding writes has nothing predicted before it, so both must agree."""
    model, builder = tiny.model(bundle), bundle.builder()
    arrows = ["text, image, proprio -> action[1]", "image, action[4] -> image@+4", "text, image -> progress"]
    for arrow, range_name in zip(arrows, ("action", "vision", "progress")):
        for i in range(4):
            tokens, task = EpisodeTokens(tiny.episode(i), bundle), Task.parse(arrow)
            batch = collate([builder.build(task, tokens, 3)], bundle.vocabulary)
            nats, codes, _ = model.teacher_forced(batch)[range_name]
            (decoded,) = Decoder(model).decode(task, [Request(tokens, 3)])[0]
            if decoded.expectation is not None:
                assert float(codes[0]) == pytest.approx(decoded.expectation, rel=1e-4)
            else:
                assert int(codes[0]) == decoded.codes.ravel()[0]
            torch.testing.assert_close(nats, model.losses(batch)[range_name][0])


def held_out(trainer, bundle) -> Mixture:
    mix = load_mix(trainer.root / "holdout.yaml")
    return Mixture(mix, trainer.root / "tokens", bundle, row_tokens=256, seed=0, split="holdout")


def test_every_answer_belongs_to_its_segment(trainer):
    """Of a model that is certain of the truth, every segment's true codes come back as the answer."""
    held = held_out(trainer, Tokenizers.load(trainer.root / "tokenizers"))
    config = TrainConfig(validation_samples=5)
    whole = held_out_batches(config, held)
    shares = [held_out_batches(config, held, part=i, parts=3) for i in range(3)]
    numbers = [n for h in whole for n in h.numbers]
    assert numbers == list(range(len(numbers)))
    assert sorted(n for share in shares for h in share for n in h.numbers) == numbers
    tasks = {n: s.task for h in whole for n, s in zip(h.numbers, h.samples)}
    shown = [tasks[n] for h in whole for n in h.shown]
    assert {t: shown.count(t) for t in set(tasks.values())} == dict.fromkeys(set(tasks.values()), PICTURES)
    for h in whole:
        answers = {n: (np.ones(len(codes)), codes.numpy()) for n, (_, codes, _) in h.batch.targets.items()}
        for _, _, found, _ in spans(h, answers, held):
            assert (found.true == found.predicted).all()
            assert len(found.nats) == len(found.true) > 0


@pytest.fixture(scope="module")
def alone(trainer, tmp_path_factory):
    more = [*FP32, "deepspeed.zero_stage=0", "loggers=[tensorboard]", f"data.mix={trainer.root}/holdout.yaml"]
    out = tmp_path_factory.mktemp("alone") / "run"
    done = trainer.run(out, 1, *more)
    assert done.codes == [0], done.output[-2000:]
    return out, done.output


def test_a_run_measures_writes_and_draws(alone, metrics):
    out, output = alone
    rows = metrics(out, "validation")
    assert [row["step"] for row in rows] == [0, 5, 10]
    for row in rows:
        assert {task: set(found) for task, found in row["teacher_forced"].items()} == MEASURES
        bits = row["teacher_forced"]["caption"]["text_bits_per_token"]
        assert bits == pytest.approx(row["bits_per_token"]["caption"], rel=1e-5)  # it predicts nothing else
        drawn = sorted((out / "validation" / f"step_{row['step']:08d}").glob("*.png"))
        assert len(drawn) == PICTURES
        assert all(p.name.startswith("forward_dynamics_") for p in drawn)
        assert np.asarray(Image.open(drawn[0])).shape == (2 * 32 + 4, 32, 3)
    first, last = rows[0]["teacher_forced"], rows[2]["teacher_forced"]
    assert first["policy"] != last["policy"]
    assert first["forward_dynamics"]["psnr_db"] < last["forward_dynamics"]["psnr_db"] < 60
    names = [sorted(p.name for p in (out / "validation" / s).iterdir()) for s in ("step_00000000", "step_00000010")]
    assert names[0] == names[1]
    assert "step 10, held out:\n  policy  " in output
    assert " bits/token  action_error.arm.gripper_unitless " in output
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    number = drawn[0].stem.removeprefix("forward_dynamics_")
    assert len(events.Images(f"validation/pictures/forward_dynamics/{number}")) == 3
    seen = [e.value for e in events.Scalars("validation/teacher_forced/forward_dynamics/psnr_db")]
    assert seen == pytest.approx([row["teacher_forced"]["forward_dynamics"]["psnr_db"] for row in rows])


@pytest.mark.parametrize(("ranks", "stage"), [(2, 1), pytest.param(2, 3), pytest.param(3, 3, marks=pytest.mark.slow)])
def test_ranks_share_the_held_out_samples(trainer, alone, metrics, tmp_path, ranks, stage):
    """Three ranks of a number of batches that three does not divide: one of them passes with nothing."""
    settings = tmp_path / "settings.json"
    settings.write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}' if stage == 3 else "{}")
    more = [f"deepspeed.zero_stage={stage}", f"deepspeed.settings={settings}", f"data.mix={trainer.root}/holdout.yaml"]
    more += ["data.rows_per_step=6", "data.rows_per_pass=1", "stop_after=1"] if ranks == 3 else ["stop_after=5"]
    run = trainer.done(tmp_path / "run", ranks, *FP32, *more)
    expected, found = (metrics(out, "validation") for out in (alone[0], run))
    count = 1 if ranks == 3 else 2
    assert len(found) >= count
    for a, b in zip(expected[:count], found):
        assert b["bits_per_token"] == pytest.approx(a["bits_per_token"], rel=1e-5)
        assert {t: set(m) for t, m in b["teacher_forced"].items()} == MEASURES
        for task, measures in a["teacher_forced"].items():
            assert b["teacher_forced"][task] == pytest.approx(measures, rel=0.02, abs=1e-6)  # a code may tip over
    first = [{p.name: p.read_bytes() for p in (out / "validation/step_00000000").iterdir()} for out in (alone[0], run)]
    assert first[0] == first[1]


def test_a_held_out_sample_that_cannot_be_read_ends_all_ranks(trainer, tmp_path):
    tokens = tmp_path / "tokens"
    shutil.copytree(trainer.root / "tokens", tokens)
    (shard,) = (tokens / "human").glob("*.tar")
    shard.write_bytes(bytes(shard.stat().st_size))
    more = [f"data.tokens={tokens}", f"data.mix={trainer.root}/holdout.yaml", "deepspeed.zero_stage=1"]
    done = trainer.run(tmp_path / "run", 2, *FP32, *more)
    assert done.codes == [2, 2]
    assert "Traceback" not in done.output


def test_the_finished_model_answers_as_it_was_measured(trainer, alone, metrics):
    out, _ = alone
    model = SequenceModel.from_pretrained(out / "checkpoint")
    held = held_out(trainer, model.tokenizers)
    objective = Objective(model, len(held.task_names), {}, autocast=False)
    config = TrainConfig(validation_samples=6)
    sums: dict[str, np.ndarray] = {}
    for h in held_out_batches(config, held):
        answers = {n: tuple(x.numpy() for x in pair) for n, pair in objective(h.batch, teacher_forced=True)[2].items()}
        for _, sample, found, _ in spans(h, answers, held):
            if held.task_names[sample.task] == "policy":
                for name, value in measure(found, model.tokenizers).items():
                    sums[name] = sums.get(name, np.zeros(2)) + value
    expected = metrics(out, "validation")[-1]["teacher_forced"]["policy"]
    assert {k: v[0] / v[1] for k, v in sums.items()} == pytest.approx(expected, rel=0.01)
