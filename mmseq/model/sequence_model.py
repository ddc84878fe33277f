"""SequenceModel: the transformer with its tokenizers. One directory holds it all.

config.json  model.safetensors (in shards when large)  tokenizers/  [mix.yaml  train.yaml  README.md]
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmseq.errors import CheckpointError, ConfigError
from mmseq.model.attention import choose_backend
from mmseq.model.config import ModelConfig
from mmseq.model.range_loss import range_loss
from mmseq.model.readout import read_codes
from mmseq.model.sequence_parallel import documents_across, share
from mmseq.model.transformer import Transformer
from mmseq.model.weights import SHARD_BYTES, StoredWeights, save_weights
from mmseq.packing import Batch
from mmseq.tasks import Task
from mmseq.tokenization.bundle import Tokenizers
from mmseq.vocabulary import Vocabulary

CONFIG_FILE = "config.json"
TOKENIZERS_FOLDER = "tokenizers"
FORMAT = 2


class SequenceModel(nn.Module):
    """One model for every arrow. `loss` trains it, `predict` runs it."""

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary, tokenizers: Tokenizers | None = None):
        super().__init__()
        self.config = config
        self.vocabulary = vocabulary
        self.tokenizers = tokenizers
        self.tasks: dict[str, str] = {}  # names of what it was trained on, which `predict` understands
        self.parallel: list[str] = []  # those of them whose final chunk it has learned to decode in few passes
        self.transformer = Transformer(config)
        self._features: dict[str, Tensor] = {}  # of codes, by range
        self.sequence_group: Any = None  # the ranks that share a line of tokens with this one, when it is shared

    @classmethod
    def new(cls, config: ModelConfig, tokenizers: Tokenizers, *, seed: int = 0) -> SequenceModel:
        """A freshly initialised model for these tokenizers. Raises: ConfigError when the config contradicts them."""
        config = config.for_tokenizers(tokenizers)
        model = cls(config, tokenizers.vocabulary, tokenizers)
        model.transformer.initialise(seed)
        model.learn_codes(seed=seed + 1)
        return model

    def learn_codes(self, *, seed: int | None = None) -> None:
        """Let codes that mean nearly the same learn together from now on. See `Transformer.learn_codes`."""
        assert self.tokenizers is not None
        self.transformer.learn_codes(torch.from_numpy(self.tokenizers.code_features()), seed=seed)

    @property
    def device(self) -> torch.device:
        return self.transformer.embed.weight.device

    @property
    def parameters_count(self) -> int:
        """Of the model as it is saved."""
        return sum(p.numel() for name, p in self.named_parameters() if "code_projection" not in name)

    def share(self, batch: Batch) -> Batch:
        """What this rank keeps of a line of tokens that its `sequence_group` shares: all where there is none."""
        group = self.sequence_group
        if group is None:
            return batch
        index, parts = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        return share(batch, index, parts, pad=self.vocabulary.structure("<pad>"))

    def hidden(self, batch: Batch, backend: str | None = None) -> Tensor:
        """Hidden states (T, D) of a packed batch."""
        return self._hidden(batch, self.transformer.code_vectors(), backend)

    def _hidden(self, batch: Batch, codes: Tensor | None, backend: str | None = None) -> Tensor:
        weight = self.transformer.embed.weight
        half = weight.dtype != torch.float32 or torch.is_autocast_enabled(weight.device.type)
        backend = backend or choose_backend(self.device, self.config.attention, half=half)[0]
        documents = documents_across(batch, self.device, self.sequence_group)
        return self.transformer(batch.input, codes, documents, backend)

    def losses(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Per range: nats (N,) of every predicted token, their sum with the z-loss (), and task index (N,).

        Only the sum carries a gradient, and only once."""
        out = {}
        for name, hidden, rows, copies, targets, task in self._ranges(batch):
            nats, total = range_loss(hidden, rows, targets, self.config.z_loss, copies)
            out[name] = (nats, total, task)
        return out

    @torch.no_grad()
    def teacher_forced(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Per range: nats (N,) of every predicted token, the code that the model would put there when everything
        before it is true (N,), a mean for scalars, and task index (N,)."""
        assert self.tokenizers is not None
        out = {}
        for name, hidden, rows, copies, targets, task in self._ranges(batch):
            nats, _ = range_loss(hidden, rows, targets, self.config.z_loss, copies)
            readout, features = self.tokenizers.readout(name), self.features_of(name)
            out[name] = (nats, read_codes(hidden, rows, readout, copies, features), task)
        return out

    def features_of(self, range_name: str) -> Tensor | None:
        """What the codes of a range are made of (C, F), on the model's device; None where nobody asks for it."""
        assert self.tokenizers is not None
        if self.tokenizers.readout(range_name) != "medoid":
            return None
        if range_name not in self._features:
            self._features[range_name] = torch.from_numpy(self.tokenizers[range_name].code_features())
        self._features[range_name] = self._features[range_name].to(self.device)
        return self._features[range_name]

    def _ranges(self, batch: Batch) -> Iterator[tuple[str, Tensor, Tensor, Any, Tensor, Tensor]]:
        """Per range: name, hidden states (N, D) of predicted positions, rows (C, D) of the output matrix, copies,
        targets (N,) and task index (N,)."""
        codes = self.transformer.code_vectors()
        hidden = self._hidden(batch, codes)
        groups = batch.targets
        if self.config.copying and "vision" not in groups:
            none = batch.input.ids[:0]  # the gate runs on nothing: ranks must gather and reduce the same weights
            groups = {**groups, "vision": (none, none, none)}
        for name, (at, targets, task) in groups.items():
            ids = self.vocabulary.ranges[name]
            rows = self.transformer.output_rows(ids.start, ids.stop, codes)
            chosen, copies = hidden.index_select(0, at), None
            if name == "vision" and self.config.copying:
                copies = self._copies(batch, chosen, at)
            yield name, chosen, rows, copies, targets, task

    def _copies(self, batch: Batch, hidden_ND: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Of vision targets: the code that each may repeat (N,), and by how much its logit rises (N,)."""
        gate = self.transformer.copy_gate(hidden_ND).float().squeeze(-1)
        line = batch.input
        may = torch.zeros_like(line.ids)
        may[line.copy_at] = line.copy_ids - self.vocabulary.ranges["vision"].start + 1
        may = may[at]  # 0: nothing to repeat
        return (may - 1).clamp_min(0), gate * (may > 0)

    def decodes_in_parallel(self, task: Task) -> bool:
        """Whether it has learned to decode the final chunk of `task` in few passes."""
        return any(Task.parse(self.tasks[name]) == task for name in self.parallel)

    def predict(self, arrow: str, episode, t: int = 0, **options) -> Any:
        """Fill the right side of `arrow` at step t of `episode`. See `inference.predict.predict`."""
        from mmseq.inference.predict import predict

        return predict(self, arrow, episode, t, **options)

    def score(self, arrow: str, episode, t: int = 0) -> float:
        """How likely the model finds what the episode has. See `inference.predict.score`."""
        from mmseq.inference.predict import score

        return score(self, arrow, episode, t)

    def embed_span(self, arrow: str, episode, t: int = 0) -> np.ndarray:
        """A vector for the given side. See `inference.predict.embed_span`."""
        from mmseq.inference.predict import embed_span

        return embed_span(self, arrow, episode, t)

    def save_pretrained(self, directory: str | Path, *, shard_bytes: int = SHARD_BYTES) -> None:
        """Write config, weights and tokenizers. The directory needs nothing else.

        shard_bytes: weights beyond it are written in files of at most that size.
        """
        assert self.tokenizers is not None
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.tokenizers.save(directory / TOKENIZERS_FOLDER)
        weights = self.transformer.plain_state()
        save_weights(weights, directory, metadata={"format": f"mmseq-{FORMAT}"}, shard_bytes=shard_bytes)
        config = {
            "model_type": "mmseq",
            "format": FORMAT,
            "model": self.config.to_dict(),
            "vocabulary": self.vocabulary.to_dict(),
            "ranges": self.vocabulary.layout(),
            "range_names": list(self.vocabulary.ranges),
            "tokenizers": self.tokenizers.fingerprints(),
            "tasks": self.tasks,
            "parallel": self.parallel,
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
        try:
            dtype = dtype or (torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"device {str(device)!r} cannot be used: {reason}", fix="use cpu or cuda") from error
        if not directory.is_dir():
            raise CheckpointError(
                f"{directory} does not exist", fix="name a checkpoint; `mmseq demo` makes runs/demo/checkpoint"
            )
        if not (directory / CONFIG_FILE).is_file():
            raise CheckpointError(
                f"{directory} is not a checkpoint: it has no {CONFIG_FILE}",
                fix="name the directory that holds config.json and model.safetensors",
            )
        try:
            config = json.loads((directory / CONFIG_FILE).read_text())
            if config.get("model_type") != "mmseq":
                raise CheckpointError(
                    f"{directory / CONFIG_FILE}: model_type is {config.get('model_type')!r}, not 'mmseq'"
                )
            if config.get("format") != FORMAT:
                raise CheckpointError(
                    f"{directory} has format {config.get('format')!r}, this version of mmseq reads format {FORMAT}",
                    fix="load it with the version of mmseq that wrote it",
                )
            model_config = ModelConfig.from_dict(config["model"])
            model_config.check()
            vocabulary = Vocabulary.from_dict(config["vocabulary"])
            fingerprints = dict(config["tokenizers"])
            tasks = {str(name): str(arrow) for name, arrow in config.get("tasks", {}).items()}
            parallel = [str(name) for name in config.get("parallel", []) if name in tasks]
        except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
            raise CheckpointError(f"{directory / CONFIG_FILE} is damaged: {error}") from error
        if config.get("ranges") != vocabulary.layout():
            raise CheckpointError(f"{directory / CONFIG_FILE} is damaged: its ranges are not those of its vocabulary")
        tokenizers = Tokenizers.load(directory / TOKENIZERS_FOLDER, device=device)
        vocabulary.require_same_ranges(tokenizers.vocabulary, mine=f"{directory}", theirs="its tokenizers")
        model_config = model_config.for_tokenizers(tokenizers)
        tokenizers.require_fingerprints(
            fingerprints, what=str(directory / CONFIG_FILE), fix="put back the tokenizers it was trained with"
        )
        with torch.device("meta"):
            model = cls(model_config, tokenizers.vocabulary, tokenizers)
        model.tasks, model.parallel = tasks, parallel
        # copied, as stored tensors are maps of a file: who overwrites that must not change a model that serves
        stored = StoredWeights(directory).items()
        weights = {name: tensor.to(device=device, dtype=dtype, copy=True) for name, tensor in stored}
        try:
            model.transformer.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            raise CheckpointError(f"the weights of {directory} do not fit its {CONFIG_FILE}: {error}") from error
        return model.eval()
