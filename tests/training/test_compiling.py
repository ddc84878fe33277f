"""Compiled layers learn what eager ones learn, and are compiled once, whatever the documents of a batch are."""

import numpy as np
import pytest
import torch
from safetensors import safe_open

from mmseq.packing import collate
from mmseq.tasks import Task
from mmseq.testing import tiny
from mmseq.tokenization.bundle import EpisodeTokens
from mmseq.training.compiling import compile_layers
from mmseq.training.config import DeepSpeedConfig, LoraConfig, TrainConfig
from mmseq.training.lora import add_adapters
from support.ranks import wait_for

ARROWS = ["text, image, proprio -> action[4]", "image, action[4] -> image@+4", "text, image -> progress", "-> text"]
SAME = ["steps=6", "deepspeed.dtype=fp32", "validate_every=3", "validation_samples=4"]


def test_zero_3_is_refused():
    config = TrainConfig(out="out", compile=True, deepspeed=DeepSpeedConfig(zero_stage=3))
    (problem,) = [p for p in config.problems(1) if "compile" in str(p)]
    assert "compile=true needs the weights of a whole layer at once, ZeRO 3" in str(problem)
    assert "Set compile=false or deepspeed.zero_stage=2" in str(problem)


def batch(bundle, seed: int):
    """A few documents of random tasks, every other batch padded to one size."""
    rng, builder = np.random.default_rng(seed), bundle.builder()
    chosen = rng.integers(0, len(ARROWS), rng.integers(3, 9))
    sources = [(EpisodeTokens(tiny.episode(int(rng.integers(5))), bundle), int(rng.integers(10))) for _ in chosen]
    sequences = [builder.build(Task.parse(ARROWS[i]), *source) for i, source in zip(chosen, sources)]
    return collate(sequences, bundle.vocabulary, pad_to=1000 if seed % 2 else None)


def loss_and_gradient(model, data):
    model.zero_grad()
    loss = sum(total for _, total, _ in model.losses(data).values())
    loss.backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return loss.item(), torch.cat(gradients)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"activation_checkpointing": True}, {"nope_every": 2, "qk_norm": False}, "lora"]
)
def test_losses_and_gradients_are_equal_and_nothing_is_compiled_again(changes):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    bundle = tiny.tokenizers()
    eager, compiled = (tiny.model(bundle, **(changes if isinstance(changes, dict) else {})).train() for _ in range(2))
    if changes == "lora":
        for model in (eager, compiled):
            torch.manual_seed(0)
            add_adapters(model, LoraConfig(rank=2))
    names = list(compiled.state_dict())
    compile_layers(compiled.transformer, torch.device("cpu"))
    assert list(compiled.state_dict()) == names
    graphs = []
    for seed in range(8):
        data = batch(bundle, seed)
        expected, found = (loss_and_gradient(m, data) for m in (eager, compiled))
        assert found[0] == pytest.approx(expected[0], rel=1e-5)
        torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5 * float(expected[1].abs().max()))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [graphs[0]] * 8
    compiled.eval()
    with torch.no_grad():
        for seed in range(4):
            compiled.losses(batch(bundle, seed))
            graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[8:] == [graphs[8]] * 4


def finish(trainer, out, ranks, *more):
    """Train to the end; compiling may take longer than other runs of tests do."""
    settings = [*SAME, f"data.mix={trainer.root}/holdout.yaml", *more]
    processes, output = trainer.start(out, ranks, *settings, environment={"TORCHINDUCTOR_COMPILE_THREADS": "1"})
    done = wait_for(processes, output, timeout_s=500)
    assert set(done.codes) == {0}, done.output[-3000:]
    return done.output


@pytest.fixture(scope="module")
def eager(trainer, tmp_path_factory):
    out = tmp_path_factory.mktemp("eager") / "run"
    finish(trainer, out, 1, "deepspeed.zero_stage=0")
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "more"),
    [
        (1, ["deepspeed.zero_stage=0"]),
        (2, ["deepspeed.zero_stage=1", "model.activation_checkpointing=true"]),
        (2, ["deepspeed.zero_stage=2"]),
        (2, ["deepspeed.zero_stage=1", "deepspeed.sequence_parallel=2"]),
    ],
)
def test_runs_lose_the_same(trainer, losses, metrics, eager, tmp_path, ranks, more):
    out = tmp_path / "run"
    assert ", compiled" in finish(trainer, out, ranks, "compile=true", *more)
    assert list(losses(out).values()) == pytest.approx(list(losses(eager).values()), rel=1e-5)
    bits = [[row["bits_per_token"] for row in metrics(run, "validation")] for run in (eager, out)]
    for a, b in zip(*bits, strict=True):
        assert b == pytest.approx(a, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1])
def test_bf16_loses_nearly_the_same(trainer, losses, eager, tmp_path, stage):
    finish(trainer, tmp_path / "run", 1, "compile=true", "deepspeed.dtype=bf16", f"deepspeed.zero_stage={stage}")
    found = list(losses(tmp_path / "run").values())
    assert found == pytest.approx(list(losses(eager).values()), rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["true", "false"])
def test_a_run_goes_on_with_the_option_changed(trainer, losses, eager, tmp_path, first):
    out, other = tmp_path / "run", {"true": "false", "false": "true"}[first]
    finish(trainer, out, 1, "deepspeed.zero_stage=0", f"compile={first}", "stop_after=3")
    for path in out.glob("checkpoints/*/*.safetensors"):
        with safe_open(path, "pt") as stored:
            assert not [k for k in stored.keys() if "_orig_mod" in k]  # noqa: SIM118
    assert "resumed at step 3" in finish(trainer, out, 1, "deepspeed.zero_stage=0", f"compile={other}")
    assert list(losses(out).values()) == pytest.approx(list(losses(eager).values()), rel=1e-5)
    with safe_open(out / "checkpoint/model.safetensors", "pt") as stored:
        names = set(stored.keys())
    with safe_open(eager / "checkpoint/model.safetensors", "pt") as stored:
        assert set(stored.keys()) == names


@pytest.mark.slow
def test_a_machine_without_a_compiler_says_so(trainer, tmp_path):
    environment = {"CXX": str(tmp_path / "no-such-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = trainer.run(tmp_path / "run", 1, "compile=true", "deepspeed.zero_stage=0", environment=environment)
    assert done.codes == [2], done.output[-3000:]
    assert "compile=true does not work on this machine" in done.output
    assert "or set compile=false" in done.output
    assert "Traceback" not in done.output
