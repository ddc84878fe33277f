"""Throughput: training here against Hugging Face transformers + DeepSpeed, on the same sequences, in turns.

    mmseq bench throughput --json throughput.json

Two runs, each in a process of its own:

    mmseq         sequences packed into rows, no attention across them, range loss where the task predicts
    transformers  Qwen3ForCausalLM of the same size as one would write it: a micro-batch holds sequences of similar
                  length (as `group_by_length` makes them), padded, with an attention mask; full-vocabulary cross
                  entropy, labels -100 where the task predicts nothing

Both have the same sequences (one position per vision code, which the baseline has to have; mmseq trains with given
vision merged, which is not counted here), optimiser steps, DeepSpeed settings, AdamW, dtype, threads, and tokens of a
micro-batch at most. Useful tokens are those of the sequences, without padding. Batches are made before the clock runs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmseq.bench.rows import BenchRow, Spread, require_positive, row, take_turns
from mmseq.bench.samples import make_tokens
from mmseq.bench.worker import PeakMemory, Worker, synchronised_clock
from mmseq.data.mixture import Mixture, load_mix
from mmseq.data.moments import Sample
from mmseq.errors import ConfigError, require
from mmseq.layout import Layout
from mmseq.model.config import ModelConfig
from mmseq.model.device import default_device
from mmseq.model.sequence_model import SequenceModel
from mmseq.packing import collate, pack
from mmseq.sequence import TokenSequence
from mmseq.tokenization.bundle import Tokenizers
from mmseq.training.config import OptimizerConfig
from mmseq.training.distributed import start_deepspeed
from mmseq.training.engine import Objective
from mmseq.training.flops import peak_tflops, training_flops
from mmseq.training.optimizer import build_optimizer
from mmseq.training.ranks import ALONE

RUNS = ("mmseq", "transformers")


@dataclass(kw_only=True)
class Config:
    """What `mmseq bench throughput` measures."""

    width: int = 256  # of the model
    layers: int = 4  # of the model
    vocabulary: int = 50_000  # text tokens of the model, beside 1,920 vision codes
    row_tokens: int = 2048  # length of a packed row
    rows_per_pass: int = 2  # rows of a micro-batch
    steps: int = 2  # optimiser steps of a turn
    samples: int = 96  # of one turn
    seconds: float = 120.0  # of all turns together
    dtype: str = "bf16"  # bf16 or fp32
    zero_stage: int = 1  # of DeepSpeed, both sides
    threads: int = 0  # of each run; 0: torch's choice
    # of the baseline: `sdpa` or `eager`; default: sdpa on a GPU, and eager, which is faster there, on a CPU
    attention: str | None = None
    seed: int = 0  # of what is drawn
    peak_tflops: float | None = None  # of the GPU, where its data sheet is not known here
    mix: str | None = None  # of real data; default: some is made
    tokens: str | None = None  # of that mix
    tokenizers: str | None = None  # of that mix

    def check(self) -> None:
        """Raises: ConfigError naming the option."""
        require_positive(self, "layers", "row_tokens", "rows_per_pass", "steps", "seconds")
        if self.width < 64 or self.width % 64:
            raise ConfigError(f"width must be a multiple of 64, the size of a head, got {self.width}")
        if self.vocabulary < 512:
            raise ConfigError(f"vocabulary must be at least 512, got {self.vocabulary}")
        if self.samples < self.steps:
            raise ConfigError(f"samples={self.samples} do not fill steps={self.steps}", fix="raise samples")
        if self.dtype not in ("bf16", "fp32"):
            raise ConfigError(f"dtype must be bf16 or fp32, got {self.dtype!r}")
        if self.attention not in (None, "sdpa", "eager"):
            raise ConfigError(f"attention must be sdpa or eager, got {self.attention!r}")
        if len({bool(getattr(self, name)) for name in ("mix", "tokens", "tokenizers")}) > 1:
            raise ConfigError("mix, tokens and tokenizers belong together", fix="give all three or none")

    def model(self) -> ModelConfig:
        heads = self.width // 64
        return ModelConfig(
            width=self.width, layers=self.layers, heads=heads, kv_heads=heads, head_size=64, mlp=self.width * 3
        )

    @property
    def pass_tokens(self) -> int:
        return self.row_tokens * self.rows_per_pass


def bench(config: Config) -> tuple[list[BenchRow], list[str]]:
    """Rows, and what else there is to say. Raises: ConfigError."""
    config.check()
    require("deepspeed", "train")
    require("transformers", "hf")
    with tempfile.TemporaryDirectory() as folder:
        if not config.mix:
            make_tokens(Path(folder), vocabulary=config.vocabulary)
            made = {name: str(Path(folder, name)) for name in ("tokens", "tokenizers")}
            config = replace(config, mix=str(Path(folder, "mix.yaml")), **made)
        workers: dict[str, Worker] = {}
        try:
            for name in RUNS:
                workers[name] = Worker(Trainer, config, name)
            about = {name: worker("about") for name, worker in workers.items()}
            used = about["mmseq"]["used"]
            runs: dict[str, Callable[[], float]] = {
                name: lambda worker=worker: used / worker("turn") for name, worker in workers.items()
            }
            rates = take_turns(runs, seconds=config.seconds)
            memory = {name: Spread((worker("memory") / 2**20,)) for name, worker in workers.items()}
        finally:
            for worker in workers.values():
                worker.close()
    rows = [_row("useful_tokens", "tokens/s", rates, config), _row("peak_memory", "MiB", memory, config, "lower")]
    notes = [
        f"{name}: {rates[name]} useful tokens/s, {a['parameters'] / 1e6:.2f} M parameters, {a['slots']:,} slots for "
        f"{a['used']:,} tokens in {a['batches']} micro-batches, loss {a['loss']:.3f} after the first turn"
        for name, a in about.items()
    ]
    peak = about["mmseq"]["peak"]
    if peak:  # of both: the FLOPs that the sequences need, as training counts them
        flops = about["mmseq"]["flops"] / used
        mfu = {name: Spread(tuple(v * flops / peak for v in rate.values)) for name, rate in rates.items()}
        rows.append(_row("mfu", "share", mfu, config))
        notes.append(f"MFU of {peak / 1e12:.0f} TFLOP/s")
    notes.append(
        f"vocabulary {about['mmseq']['vocabulary']:,}, {config.samples} samples in {config.steps} steps, "
        f"{config.dtype}, ZeRO {config.zero_stage}, {about['mmseq']['threads']} thread(s) each, micro-batches of at "
        f"most {config.pass_tokens:,} tokens; memory is above what the process had before it made the model"
    )
    return rows, notes


def _row(name: str, unit: str, found: dict[str, Spread], config: Config, better: str = "higher") -> BenchRow:
    ours, theirs = (found[run] for run in RUNS)
    name, what = f"throughput.{name}", "transformers + DeepSpeed"
    return row(name, unit, ours, what, theirs, better=better, seed=config.seed)


class Trainer:
    """One run: its model, its DeepSpeed engine and the batches of one turn. Lives in a process of its own."""

    def __init__(self, config: Config, run: str):
        if config.threads:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        self.config = config
        deepspeed = start_deepspeed(ALONE)
        self.device = torch.device(default_device())
        assert config.tokenizers is not None
        self.tokenizers = Tokenizers.load(config.tokenizers)
        self.tokenizers.layout = Layout(self.tokenizers.vision.grid, 1)
        samples, sequences = self._sequences()
        self.used, self.flops = sum(map(len, sequences)), 0.0
        self.autocast = config.dtype == "bf16" and config.zero_stage == 0
        import transformers  # noqa: F401  before memory is looked at

        self.memory_of = PeakMemory()
        self.memory_of.start()
        module, self.steps = self._ours(samples, sequences) if run == "mmseq" else self._theirs(sequences)
        self.size = sum(p.numel() for p in module.parameters())
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,  # where a step ends is said by hand: the runs differ in micro-batches
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": config.zero_stage},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": config.dtype == "bf16" and config.zero_stage > 0},
            "steps_per_print": 1 << 40,
        }
        optimizer = build_optimizer(OptimizerConfig(), module)
        self.engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=settings, dist_init_required=False
        )
        self.loss = self._turn()  # what is made at first use

    def _sequences(self) -> tuple[list[Sample], list[TokenSequence]]:
        c = self.config
        assert c.mix is not None
        assert c.tokens is not None
        # its rows only say which samples come; they are packed below, into rows of the bench
        mixture = Mixture(load_mix(c.mix), c.tokens, self.tokenizers, row_tokens=1 << 20, seed=c.seed)
        drawn = [
            moments.sample(k, c.seed)
            for moments, weight in zip(mixture.moments, mixture.weights)
            for k in range(max(1, round(c.samples * weight)))
        ]
        samples = [drawn[i] for i in np.random.default_rng(c.seed).permutation(len(drawn))]
        return samples, [mixture.build(s) for s in samples]

    def _ours(self, samples: list[Sample], sequences: list[TokenSequence]) -> tuple[torch.nn.Module, list[list[Any]]]:
        model = SequenceModel.new(self.config.model(), self.tokenizers, seed=self.config.seed).train().to(self.device)
        objective = Objective(model, 1 + max(s.task for s in samples), {}, autocast=self.autocast)
        rows, vocabulary = pack([len(s) for s in sequences], self.config.row_tokens), self.tokenizers.vocabulary
        rows = [rows[i] for i in np.random.default_rng(self.config.seed).permutation(len(rows))]
        steps, self.slots = [], 0
        for part in np.array_split(np.arange(len(rows)), self.config.steps):
            portions = np.array_split(part, -(-len(part) // self.config.rows_per_pass))
            chosen = [[i for r in some for i in rows[r]] for some in portions]
            batches = [
                collate(
                    [sequences[i] for i in c],
                    vocabulary,
                    tasks=[samples[i].task for i in c],
                    pad_to=len(some) * self.config.row_tokens,
                )
                for c, some in zip(chosen, portions)
            ]
            total = sum(len(at) for b in batches for at, _, _ in b.targets.values())
            self.slots += sum(batch.tokens for batch in batches)
            self.flops += sum(training_flops(batch, model.config, vocabulary) for batch in batches)
            steps.append([(batch.to(self.device), total) for batch in batches])
        return objective, steps

    def _theirs(self, sequences: list[TokenSequence]) -> tuple[torch.nn.Module, list[list[Any]]]:
        from transformers import Qwen3Config, Qwen3ForCausalLM

        c = self.config.model()
        config = Qwen3Config(
            vocab_size=len(self.tokenizers.vocabulary),
            hidden_size=c.width,
            intermediate_size=c.mlp,
            num_hidden_layers=c.layers,
            num_attention_heads=c.heads,
            num_key_value_heads=c.kv_heads,
            head_dim=c.head_size,
            max_position_embeddings=1 << 15,
            tie_word_embeddings=True,
            use_cache=False,
            attn_implementation=self.config.attention or ("sdpa" if self.device.type == "cuda" else "eager"),  # type: ignore[call-arg]
        )
        model = torch.nn.Module.to(Qwen3ForCausalLM(config).train(), self.device)
        pad = self.tokenizers.vocabulary.structure("<pad>")
        groups = [padded(group, pad) for group in by_length(sequences, self.config.pass_tokens)]
        groups = [groups[i] for i in np.random.default_rng(self.config.seed).permutation(len(groups))]
        self.slots, steps = sum(ids.numel() for ids, _, _ in groups), []
        for part in np.array_split(np.arange(len(groups)), self.config.steps):
            batches = [groups[i] for i in part]
            total = sum(int((labels[:, 1:] != -100).sum()) for _, _, labels in batches)
            steps.append([(tuple(x.to(self.device) for x in one), total) for one in batches])
        return model, steps

    def _turn(self) -> float:
        """All steps once; the mean loss per target, nats."""
        loss = torch.zeros((), device=self.device)
        for step in self.steps:
            for i, (batch, total) in enumerate(step):
                self.engine.set_gradient_accumulation_boundary(i == len(step) - 1)
                if isinstance(batch, tuple):
                    ids, mask, labels = batch
                    given = {"input_ids": ids, "attention_mask": mask, "labels": labels, "num_items_in_batch": total}
                    with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                        part = self.engine(**given).loss
                else:
                    part = self.engine(batch)[0] / total
                self.engine.backward(part)
                self.engine.step()
                loss += part.detach() / len(self.steps)
        return float(loss)

    def turn(self) -> float:
        """Seconds of one turn."""
        began = synchronised_clock()
        self._turn()
        return synchronised_clock() - began

    def memory(self) -> int:
        return self.memory_of.read()

    def about(self) -> dict[str, Any]:
        known = peak_tflops(self.device)[0] if self.config.dtype == "bf16" else None
        peak = self.config.peak_tflops or known
        return {
            "parameters": self.size,
            "vocabulary": len(self.tokenizers.vocabulary),
            "used": self.used,
            "slots": self.slots,
            "batches": sum(map(len, self.steps)),
            "flops": self.flops,
            "peak": peak * 1e12 if peak else None,
            "threads": torch.get_num_threads(),
            "loss": self.loss,
        }


def by_length(sequences: list[TokenSequence], pass_tokens: int) -> list[list[TokenSequence]]:
    """Groups of sequences of similar length, of at most `pass_tokens` with the padding of each to its longest."""
    groups: list[list[TokenSequence]] = []
    for s in sorted(sequences, key=len, reverse=True):
        if groups and len(groups[-1][0]) * (len(groups[-1]) + 1) <= pass_tokens:
            groups[-1].append(s)
        else:
            groups.append([s])
    return groups


def padded(group: list[TokenSequence], pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, attention mask and labels, each (sequences, longest); the model shifts labels by itself."""
    ids, mask, labels = (np.full((len(group), max(map(len, group))), v) for v in (pad, 0, -100))
    for i, s in enumerate(group):
        ids[i, : len(s)], mask[i, : len(s)] = s.ids, 1
        labels[i, s.target_at + 1] = s.ids[s.target_at + 1]
    return torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(labels)
