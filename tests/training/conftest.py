"""What the tests of training share: tiny token shards, and real ranks that train on them."""

import json
import os
from pathlib import Path

import pytest
import torch

from mmseq.data.tokens import write_token_shards
from mmseq.testing import tiny
from support.ranks import Finished, run_ranks, start_ranks

MIX = """
name: tiny
sources: {robot: {path: robot}, human: {path: human, weight: 0.5}}
tasks:
  - {task: "text, image, proprio -> action[4]", weight: 3}
  - {task: "image, action[4] -> image@+4"}
  - {task: "text, image -> progress"}
  - {task: "video[4] -> text"}
"""
SETTINGS = [
    "model.width=32 model.layers=2 model.heads=2 model.kv_heads=1 model.head_size=16 model.mlp=64",
    "data.row_tokens=256 data.rows_per_step=4 data.rows_per_pass=1 steps=10 log_every=1 save_every=100",
    "optimizer.learning_rate=0.003",
]


class Trainer:
    """`mmseq train` on tiny data, in ranks of this machine."""

    def __init__(self, root: Path):
        self.root = root

    def command(self, out: Path, *more: str) -> list[str]:
        recipe = self.root / "recipe.yaml"
        settings = [f"data.mix={self.root}/mix.yaml", f"data.tokens={self.root}/tokens"]
        settings += [f"data.tokenizers={self.root}/tokenizers", f"out={out}"]
        settings += [item for line in SETTINGS for item in line.split()]
        given = {m.split("=")[0] for m in more}
        return ["train", str(recipe), *[s for s in settings if s.split("=")[0] not in given], *more]

    def run(self, out: Path, ranks: int, *more: str, **options) -> Finished:
        """Train to the end, on CPU."""
        return run_ranks(self.command(out, *more), ranks, self._output(out), **self._options(options))

    def start(self, out: Path, ranks: int, *more: str, **options) -> tuple[list, Path]:
        output = self._output(out)
        return start_ranks(self.command(out, *more), ranks, output, **self._options(options)), output

    def done(self, out: Path, ranks: int, *more: str) -> Path:
        """Train to the end and be sure that it ended well."""
        finished = self.run(out, ranks, *more)
        assert set(finished.codes) == {0}, finished.output[-3000:]
        return out

    @staticmethod
    def _output(out: Path) -> Path:
        out.parent.mkdir(parents=True, exist_ok=True)
        path = out.with_name(out.name + ".log")
        path.unlink(missing_ok=True)
        return path

    @staticmethod
    def _options(options: dict) -> dict:
        return {**options, "environment": {"CUDA_VISIBLE_DEVICES": "", **options.get("environment", {})}}


@pytest.fixture(scope="session")
def trainer(tmp_path_factory) -> Trainer:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    root = tmp_path_factory.mktemp("data")
    bundle = tiny.tokenizers()
    with torch.no_grad():  # untrained it draws every code alike, and every prediction would look right
        bundle.vision._network.decoder_out.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    bundle.save(root / "tokenizers")
    write_token_shards([tiny.episode(i) for i in range(8)], root / "tokens/robot", bundle, name="robot")
    write_token_shards([tiny.video(i) for i in range(8)], root / "tokens/human", bundle, name="human")
    (root / "mix.yaml").write_text(MIX)
    (root / "holdout.yaml").write_text(MIX + "holdout: 0.4\n")
    (root / "recipe.yaml").write_text("name: tiny\n")
    return Trainer(root)


def records(out: Path, kind: str = "train") -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


@pytest.fixture(scope="session")
def losses():
    """losses(out): the loss of every step."""
    return lambda out: {row["step"]: row["loss"] for row in records(out)}


@pytest.fixture(scope="session")
def metrics():
    """metrics(out, kind): the lines of metrics.jsonl of one kind."""
    return records
