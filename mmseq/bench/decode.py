"""Decode: a chunk of 16 x 7 actions, against what transformers' `generate` takes for it with the same weights.

    mmseq bench decode width=256 layers=4 vocabulary=50000 seconds=60

Three sides take turns in one process: chunks in a few forward passes, chunks token by token (`Decoder`, with what
requests begin with kept), and `generate` of the exported checkpoint over its
key/value cache, greedy, bound to the action range as its user would. All see the same tokens; the model has neither
slots nor merged vision, so that the export computes the same numbers, which is checked. What guessing and checking
takes depends on what a policy has learned: `mmseq bench chunks` measures a trained one.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
import torch

from mmseq.bench.rows import BenchRow, require_positive, row, take_turns
from mmseq.bench.samples import SIZE, demo_tokenizers, word_tokenizer
from mmseq.bench.worker import milliseconds
from mmseq.embodiment import Embodiment
from mmseq.episode import Episode
from mmseq.errors import ConfigError, MMSeqError, require
from mmseq.inference.decoding import Decoder, Request
from mmseq.inference.prefixes import Prefixes
from mmseq.model.config import ModelConfig
from mmseq.model.device import default_device
from mmseq.model.export import export_hf
from mmseq.model.sequence_model import SequenceModel
from mmseq.packing import collate
from mmseq.tasks import Task
from mmseq.testing import tiny
from mmseq.tokenization.bundle import EpisodeTokens
from mmseq.training.flops import gpu_called

ARROW = "text, image, proprio -> action[{horizon}]"
NOWS = 8  # control steps that take turns
AGREE = 1e-3  # of the logits: fp32 on both sides


@dataclass(kw_only=True)
class Config:
    """What `mmseq bench decode` measures."""

    width: int = 256  # of the model
    layers: int = 4  # of the model
    vocabulary: int = 50_000  # of its text
    horizon: int = 16  # control steps of the chunk
    axes: int = 7  # of an action
    passes: int = 4  # of the first side
    seconds: float = 60.0  # of all turns together
    seed: int = 0  # of what is drawn

    def check(self) -> None:
        """Raises: ConfigError naming the option."""
        require_positive(self, "layers", "vocabulary", "horizon", "axes", "passes", "seconds")
        if self.axes > len(ascii_lowercase):
            raise ConfigError(f"axes must be at most {len(ascii_lowercase)}, got {self.axes}")
        if self.width < 64 or self.width % 64:
            raise ConfigError(f"width must be a multiple of 64, the size of a head, got {self.width}")


def bench(config: Config) -> tuple[list[BenchRow], list[str]]:
    """Rows, and what else there is to say. Raises: ConfigError, DependencyError."""
    config.check()
    require("transformers", "hf")
    device = default_device()
    ours = Ours(config, device)
    theirs = Theirs(ours, device)
    apart = float(np.abs(theirs.logits() - ours.logits()).max())
    if apart > AGREE:
        raise MMSeqError(f"the exported weights give logits that differ by {apart:.2g}", fix="report this")
    runs = {"passes": ours.in_passes, "tokens": ours.by_tokens, "transformers": theirs.generate}
    counted = {name: run() for name, run in runs.items()}  # warm
    timed = take_turns({name: lambda run=run: milliseconds(run) for name, run in runs.items()}, seconds=config.seconds)
    rows = [
        row(
            f"decode.{name}",
            "ms/chunk",
            timed[name],
            "transformers generate",
            timed["transformers"],
            better="lower",
            seed=config.seed,
        )
        for name in ("passes", "tokens")
    ]
    rows.append(
        row(
            "decode.passes_against_tokens",
            "ms/chunk",
            timed["passes"],
            "token by token",
            timed["tokens"],
            better="lower",
            seed=config.seed,
        )
    )
    notes = [f"{name}: {timed[name]} ms, {counted[name]} forward passes a chunk" for name in runs]
    size = ours.model.parameters_count
    notes.append(
        f"{size / 1e6:.1f} M parameters in fp32, chunk of {config.horizon} x {config.axes} after {len(ours.prompt)} "
        f"positions, {torch.get_num_threads()} thread(s), logits agree to {apart:.1g}"
    )
    if device == "cuda" and (limit := _bandwidth_ms(ours.model)) is not None:
        notes.append(f"reading the weights once takes {limit:.3g} ms at the memory's data-sheet rate, for each pass")
    return rows, notes


def _bandwidth_ms(model: SequenceModel) -> float | None:
    gpu = gpu_called(torch.cuda.get_device_name())
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return None if gpu is None else 1000 * size / (gpu.gb_per_s * 1e9)


def _episode(robot: Embodiment, config: Config) -> Episode:
    random = np.random.default_rng(config.seed)
    steps = NOWS + config.horizon
    vectors = random.uniform(-1, 1, (2, steps, config.axes)).astype(np.float32)
    frames = random.integers(0, 256, (steps, SIZE, SIZE, 3), dtype=np.uint8)
    streams = {"image.front": frames, "proprio": vectors[0], "action": vectors[1]}
    return Episode.from_arrays("bench", robot.rate_hz, streams, texts=tiny.TEXTS[:1], embodiment=robot.name)


class Ours:
    """The control step of a policy: the same robot and text, an image and a state of now."""

    def __init__(self, config: Config, device: str):
        self.config = config
        base, axes = tiny.embodiment(size=SIZE), tiny.axes(ascii_lowercase[: config.axes])
        robot = replace(base, proprio=axes, action=axes, grippers=())
        tokenizers = demo_tokenizers(word_tokenizer(config.vocabulary), [robot], merge=1)
        heads = config.width // 64
        shape = ModelConfig(
            width=config.width,
            layers=config.layers,
            heads=heads,
            kv_heads=heads,
            head_size=64,
            mlp=3 * config.width,
            slot_embeddings=False,
            copying=False,
        )
        self.model = SequenceModel.new(shape, tokenizers, seed=config.seed).to(device).eval()
        self.source = EpisodeTokens(_episode(robot, config), tokenizers)
        self.task, self.prefixes = Task.parse(ARROW.format(horizon=config.horizon)), Prefixes()
        self.now = 0
        self.sequence = tokenizers.builder().build(self.task, self.source, 0, 0)
        self.chunk = self.sequence.segments[-1]
        self.prompt = self.sequence.ids[: self.chunk.start]

    @torch.inference_mode()
    def logits(self) -> np.ndarray:
        """Of each action of the true chunk over the action range, given those before it."""
        model, ids = self.model, self.model.vocabulary.ranges["action"]
        hidden = model.hidden(collate([self.sequence], model.vocabulary).to(model.device))
        rows = model.transformer.output_rows(ids.start, ids.stop, model.transformer.code_vectors())
        return (hidden[self.chunk.start - 1 : self.chunk.stop - 1] @ rows.t()).float().cpu().numpy()

    def in_passes(self) -> int:
        return self._decode(self.config.passes)

    def by_tokens(self) -> int:
        return self._decode(None)

    def _decode(self, passes: int | None) -> int:
        decoder = Decoder(self.model, passes=passes, prefixes=self.prefixes)
        self.now = (self.now + 1) % NOWS
        decoder.decode(self.task, [Request(self.source, self.now)])
        return decoder.stats.passes


class Theirs:
    """The same weights in transformers."""

    def __init__(self, ours: Ours, device: str):
        from transformers import AutoModelForCausalLM, LogitsProcessor

        with tempfile.TemporaryDirectory() as folder:
            ours.model.save_pretrained(Path(folder, "checkpoint"))
            export_hf(Path(folder, "checkpoint"), Path(folder, "hf"))
            model: Any = AutoModelForCausalLM.from_pretrained(Path(folder, "hf"), dtype=torch.float32)
            self.model = model.to(device).eval()
        self.ours, self.prompt = ours, torch.tensor(ours.prompt, device=device)[None]
        actions = ours.model.vocabulary.ranges["action"]
        self.actions, self.count = slice(actions.start, actions.stop), ours.config.horizon * ours.config.axes

        class OnlyActions(LogitsProcessor):
            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                allowed = torch.full_like(scores, -torch.inf)
                allowed[:, actions.start : actions.stop] = scores[:, actions.start : actions.stop]
                return allowed

        self.bound = OnlyActions()

    @torch.inference_mode()
    def generate(self) -> int:
        self.model.generate(
            self.prompt,
            attention_mask=torch.ones_like(self.prompt),
            max_new_tokens=self.count,
            min_new_tokens=self.count,
            do_sample=False,
            use_cache=True,
            logits_processor=[self.bound],
            pad_token_id=0,
        )
        return self.count

    @torch.inference_mode()
    def logits(self) -> np.ndarray:
        """As those of `Ours`."""
        ids = torch.from_numpy(self.ours.sequence.ids).to(self.prompt.device)[None]
        chunk = self.ours.chunk
        return self.model(ids).logits[0, chunk.start - 1 : chunk.stop - 1, self.actions].float().cpu().numpy()
