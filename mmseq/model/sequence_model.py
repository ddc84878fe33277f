"""SequenceModel: the transformer with its tokenizers. One directory holds it all.

config.json  model.safetensors  tokenizers/  [mix.yaml  train.yaml  README.md]
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmseq.errors import CheckpointError
from mmseq.model.attention import choose_backend, documents_of
from mmseq.model.range_loss import range_losses
from mmseq.model.transformer import ModelConfig, Transformer
from mmseq.packing import Batch, collate
from mmseq.sequence import RANGES
from mmseq.tokenization.bundle import Tokenizers
from mmseq.vocabulary import Vocabulary

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TOKENIZERS_FOLDER = "tokenizers"


class SequenceModel(nn.Module):
    """One model for every arrow. `loss` trains it, `predict` runs it."""

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary, tokenizers: Tokenizers | None = None):
        super().__init__()
        self.config = config
        self.vocabulary = vocabulary
        self.tokenizers = tokenizers
        self.transformer = Transformer(config)

    @classmethod
    def new(cls, config: ModelConfig, tokenizers: Tokenizers, *, seed: int = 0) -> SequenceModel:
        """A freshly initialised model whose vocabulary and merge come from the tokenizers."""
        config.vocabulary = len(tokenizers.vocabulary)
        config.merge = tokenizers.layout.merge
        model = cls(config, tokenizers.vocabulary, tokenizers)
        model.transformer.initialise(seed)
        model._initialise_from_codes(seed)
        return model

    @torch.no_grad()
    def _initialise_from_codes(self, seed: int) -> None:
        """Codes that mean nearly the same start with nearly the same vector.

        Vision codes are placed by their FSQ coordinates, bins by a few waves of their value. It
        spares the model learning the order of each range from examples.
        """
        assert self.tokenizers is not None
        generator = torch.Generator().manual_seed(seed + 1)
        features = {"vision": torch.from_numpy(self.tokenizers.vision.code_vectors()).float()}
        for name in ("action", "proprio", "progress"):
            x = torch.linspace(0, 1, self.vocabulary.ranges[name].size)[:, None]
            waves = math.pi * torch.tensor([1.0, 2, 4, 8])
            features[name] = torch.cat([2 * x - 1, (x * waves).sin(), (x * waves).cos()], 1)
        weight = self.transformer.embed.weight
        for name, feature in features.items():
            ids = self.vocabulary.ranges[name]
            feature = feature / feature.std().clamp_min(1e-6)
            projection = torch.randn(feature.shape[1], weight.shape[1], generator=generator)
            structured = feature @ projection / math.sqrt(feature.shape[1])
            scale = weight.std()
            weight[ids.start : ids.stop] = 0.9 * scale * structured + 0.4 * weight[ids.start : ids.stop]

    @property
    def device(self) -> torch.device:
        return self.transformer.embed.weight.device

    @property
    def parameters_count(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def hidden(self, batch: Batch, backend: str | None = None) -> Tensor:
        """Hidden states (T, D) of a packed batch."""
        documents = documents_of(batch.lengths, self.device)
        backend = backend or choose_backend(self.device, self.config.attention)[0]
        return self.transformer(
            batch.ids, batch.slots, batch.positions, batch.patch_at, batch.patch_ids, documents, backend
        )

    def forward(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Per range: (nats (N,), minimised loss (N,), task index (N,)) of every predicted token."""
        hidden = self.hidden(batch)
        weight = self.transformer.output_weight
        out = {}
        for name, (at, codes, task) in batch.targets.items():
            ids = self.vocabulary.ranges[name]
            rows = weight[ids.start : ids.stop]
            nll, loss = range_losses(hidden.index_select(0, at), rows, codes, self.config.z_loss)
            out[name] = (nll, loss, task)
        return out

    def predict(self, arrow: str, episode, t: int = 0, **options) -> Any:
        """Fill the right side of `arrow` at step t of `episode`. See `inference.predict.predict`."""
        from mmseq.inference.predict import predict

        return predict(self, arrow, episode, t, **options)

    @torch.no_grad()
    def score(self, arrow: str, episode, t: int = 0) -> float:
        """Log-likelihood in nats per token of the predicted side as the episode has it.

        With `-> video[n]` this is a video-likelihood reward (Escontrela et al. 2023).
        """
        from mmseq.tasks import Task
        from mmseq.tokenization.bundle import EpisodeTokens

        assert self.tokenizers is not None
        sequence = self.tokenizers.builder().build(Task.parse(arrow), EpisodeTokens(episode, self.tokenizers), t)
        groups = self(collate([sequence], self.vocabulary).to(self.device)).values()
        return -float(torch.cat([nll for nll, _, _ in groups]).mean())

    @torch.no_grad()
    def embed_span(self, arrow: str, episode, t: int = 0) -> np.ndarray:
        """Mean last hidden state (width,) over the given side: a representation for transfer."""
        from mmseq.tasks import Task
        from mmseq.tokenization.bundle import EpisodeTokens

        assert self.tokenizers is not None
        sequence = self.tokenizers.builder().build(Task.parse(arrow), EpisodeTokens(episode, self.tokenizers), t)
        hidden = self.hidden(collate([sequence], self.vocabulary).to(self.device))
        spans = [hidden[s.start : s.stop] for s in sequence.segments if not s.predicted]
        return torch.cat(spans or [hidden[:2]]).mean(0).float().cpu().numpy()

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config, weights and tokenizers. The directory needs nothing else."""
        assert self.tokenizers is not None
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.tokenizers.save(directory / TOKENIZERS_FOLDER)
        weights = {k: v.detach().to("cpu").contiguous() for k, v in self.transformer.state_dict().items()}
        save_file(weights, directory / WEIGHTS_FILE, metadata={"format": "mmseq-1"})
        config = {
            "model_type": "mmseq",
            "format": 1,
            "model": self.config.to_dict(),
            "vocabulary": self.vocabulary.to_dict(),
            "ranges": {r.name: [r.start, r.size] for r in self.vocabulary.ranges.values()},
            "range_names": list(RANGES),
            "tokenizers": self.tokenizers.fingerprints(),
            "dtype": str(next(iter(weights.values())).dtype).removeprefix("torch."),
        }
        (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ) -> SequenceModel:
        """Load a checkpoint directory. dtype: default fp32 on a CPU and bf16 on a GPU.

        Raises: CheckpointError when the directory is not a complete checkpoint.
        """
        directory = Path(directory)
        if not (directory / CONFIG_FILE).is_file():
            raise CheckpointError(
                f"{directory} is not a checkpoint: it has no {CONFIG_FILE}",
                fix="name the directory that holds config.json and model.safetensors, such as runs/demo/checkpoint",
            )
        try:
            config = json.loads((directory / CONFIG_FILE).read_text())
            if config.get("model_type") != "mmseq":
                raise CheckpointError(
                    f"{directory / CONFIG_FILE}: model_type is {config.get('model_type')!r}, not 'mmseq'"
                )
            model_config = ModelConfig(**config["model"])
            model_config.check()
            vocabulary = Vocabulary.from_dict(config["vocabulary"])
            fingerprints = dict(config["tokenizers"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{directory / CONFIG_FILE} is damaged: {error}") from error
        tokenizers = Tokenizers.load(directory / TOKENIZERS_FOLDER)
        vocabulary.require_same_ranges(tokenizers.vocabulary, mine=f"{directory}", theirs="its tokenizers")
        tokenizers.require_fingerprints(
            fingerprints, what=str(directory / CONFIG_FILE), fix="put back the tokenizers it was trained with"
        )
        with torch.device("meta"):
            model = cls(model_config, tokenizers.vocabulary, tokenizers)
        try:
            weights = load_file(directory / WEIGHTS_FILE)
        except Exception as error:
            raise CheckpointError(f"{directory / WEIGHTS_FILE} cannot be read: {error}") from error
        try:
            model.transformer.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            raise CheckpointError(f"{directory / WEIGHTS_FILE} does not fit {CONFIG_FILE}: {error}") from error
        dtype = dtype or (torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16)
        return model.to(device=device, dtype=dtype).eval()
