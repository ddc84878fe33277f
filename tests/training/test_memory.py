"""The arithmetic of memory, held to what autograd and DeepSpeed really keep."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from mmseq.config import load_config
from mmseq.inputs import ModelInput
from mmseq.model.attention import documents_of
from mmseq.model.config import ModelConfig
from mmseq.model.transformer import Transformer
from mmseq.training.config import TrainConfig
from mmseq.training.dry_run import dry_run
from mmseq.training.memory import layer_activations

TOKENS = 256
SHAPES = [
    {"width": 96, "heads": 6, "kv_heads": 3, "head_size": 24, "mlp": 160},
    {"width": 128, "heads": 4, "kv_heads": 4, "head_size": 32, "mlp": 384},
]


def kept(layers: int, **shape) -> int:
    """Bytes that autograd keeps of one document for the way back, without weights."""
    model = Transformer(ModelConfig(layers=layers, vocabulary=64, merge=2, slots=8, **shape)).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen, alive = {}, []

    def keep(x: torch.Tensor) -> torch.Tensor:
        seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        alive.append(x)  # an address is not used again while it lives
        return x

    line = ModelInput.of_ids(np.arange(TOKENS) % 64, np.zeros((TOKENS, 2), np.int64), merge=2).tensors()
    inputs = (line, None, documents_of([TOKENS], "cpu"), "document")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(*inputs)
    return sum(size for address, size in seen.items() if address not in weights)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_layer_keeps_what_the_formula_says(shape):
    per_layer = (kept(4, **shape) - kept(2, **shape)) / 2 / TOKENS / 4
    assert layer_activations(ModelConfig(**shape), TOKENS, cpu=True)[0] == pytest.approx(per_layer, rel=0.03)


SMALL = "width=32 layers=2 heads=2 kv_heads=1 head_size=16 mlp=64"
LARGE = "width=768 layers=6 heads=12 kv_heads=12 head_size=64 mlp=2304"
MIX = 'sources: {robot: {path: robot}}\ntasks: [{task: "text, image -> video[20]"}]\n'  # one document fills a row


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_process_grows_by_what_the_plan_says(trainer, tmp_path, stage):
    """Peak resident memory of a model of 50 M parameters, less that of a tiny one, which holds the libraries."""
    (tmp_path / "mix.yaml").write_text(MIX)
    settings = [f"deepspeed.zero_stage={stage}", "deepspeed.dtype=fp32", "steps=3", "data.row_tokens=384"]
    settings += ["data.rows_per_step=1", f"data.mix={tmp_path}/mix.yaml"]
    peaks, planned = [], []
    for name, shape in (("small", SMALL), ("large", LARGE)):
        command = trainer.command(tmp_path / name, *settings, *[f"model.{field}" for field in shape.split()])
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([sys.executable, "-m", "mmseq", *command], env=environment)
        _, status, used = os.wait4(process.pid, 0)
        assert status == 0
        peaks.append(used.ru_maxrss * 1024)
        plan = dry_run(load_config(TrainConfig, command[1], command[2:]), gpus=1)
        # of the bucket only what gradients fill becomes resident on a CPU
        planned.append(sum(4 * plan.parameters if "bucket" in p.name else p.size for p in plan.memory))
    assert planned[1] - planned[0] == pytest.approx(peaks[1] - peaks[0], rel=0.2)
