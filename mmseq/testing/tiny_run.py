"""A tiny real training run for tests: its data, its command, and what it lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from mmseq.data.tokens import write_token_shards
from mmseq.testing import tiny

MIX = """
name: tiny
sources: {robot: {path: robot}, human: {path: human, weight: 0.5}}
tasks:
  - {task: "text, image, proprio -> action[4]", weight: 3}
  - {task: "image, action[4] -> image@+4"}
  - {task: "text, image -> progress"}
  - {task: "video[4] -> text"}
"""
RECIPE = """
name: tiny
data: {row_tokens: 256, rows_per_step: 4, rows_per_pass: 1}
model: {width: 32, layers: 2, heads: 4, kv_heads: 2, head_size: 8, mlp: 64}
optimizer: {learning_rate: 0.003}
deepspeed: {zero_stage: 1, dtype: fp32}
steps: 4
log_every: 1
save_every: 100
"""


def write_data(root: Path, *, episodes: int = 8) -> Path:
    """Tokenizers, token shards, `mix.yaml`, `holdout.yaml` and `recipe.yaml` in `root`."""
    bundle = tiny.tokenizers()
    bundle.save(root / "tokenizers")
    write_token_shards([tiny.episode(i) for i in range(episodes)], root / "tokens/robot", bundle, name="robot")
    write_token_shards([tiny.video(i) for i in range(episodes)], root / "tokens/human", bundle, name="human")
    (root / "mix.yaml").write_text(MIX)
    (root / "holdout.yaml").write_text(MIX + "holdout: 0.4\n")
    data = {"mix": "mix.yaml", "tokens": "tokens", "tokenizers": "tokenizers"}
    paths = ", ".join(f"{key}: {root / name}" for key, name in data.items())
    (root / "recipe.yaml").write_text(RECIPE.replace("data: {", f"data: {{{paths}, "))
    return root


def command(data: Path, out: Path, *more: str) -> list[str]:
    """`mmseq train` as it stands behind a launcher that starts modules."""
    return ["mmseq", "train", str(data / "recipe.yaml"), f"out={out}", *more]


def torchrun(ranks: int, *options: str) -> list[str]:
    rendezvous = options or ("--standalone",)
    return [sys.executable, "-m", "torch.distributed.run", *rendezvous, f"--nproc-per-node={ranks}", "-m"]


def environment(**more: str) -> dict[str, str]:
    """This process's, on the CPU, without what a launcher around the tests may have set."""
    launchers = ("SLURM_", "TORCHELASTIC_", "OMPI_", "PMI_")
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "JOB_COMPLETION_INDEX")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(launchers) and k not in ranks}
    return kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | more


def run(arguments: list[str], **more: str) -> subprocess.CompletedProcess:
    return subprocess.run(arguments, env=environment(**more), capture_output=True, text=True, timeout=300)


def train(data: Path, out: Path, ranks: int, *more: str) -> subprocess.CompletedProcess:
    """Train to the end in one process, or in several under torchrun; raises what it says when it fails."""
    launcher = torchrun(ranks) if ranks > 1 else [sys.executable, "-m"]
    done = run([*launcher, *command(data, out, *more)])
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def metrics(out: Path, kind: str = "train") -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def losses(out: Path) -> list[float]:
    """Of every logged step, in nats per token."""
    return [row["loss"] for row in metrics(out)]
