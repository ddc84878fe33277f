"""Registers our checkpoints with transformers: importing this module is enough.

    import mmseq.model.huggingface
    model = transformers.AutoModel.from_pretrained("runs/demo/checkpoint")
    model.sequence.predict("text, image, proprio -> action[16]", episode)
    model.save_pretrained("copy")

The directory is a checkpoint of ours before and after. A language model for servers is `mmseq export`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmseq.errors import ConfigError, require
from mmseq.inputs import ModelInput
from mmseq.model.attention import choose_backend, documents_of
from mmseq.model.device import default_device
from mmseq.model.sequence_model import SequenceModel
from mmseq.model.weights import SHARD_BYTES

require("transformers", "hf")
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel  # noqa: E402
from transformers.modeling_outputs import BaseModelOutput  # noqa: E402

# What AutoModel hands on beside the model's own options, and what says nothing where nothing is downloaded.
_IGNORED = ("adapter_kwargs", "cache_dir", "force_download", "local_files_only", "low_cpu_mem_usage", "revision")
_IGNORED += ("token", "trust_remote_code", "use_safetensors", "attn_implementation", "_from_auto", "code_revision")


class MMSeqConfig(PretrainedConfig):
    """config.json of a checkpoint as it stands: `model`, `vocabulary`, `ranges`, `tokenizers`, `tasks`."""

    model_type = "mmseq"


class MMSeqModel(PreTrainedModel):
    """A SequenceModel, `sequence`, behind the interface of transformers."""

    config_class = MMSeqConfig
    base_model_prefix = "sequence"
    main_input_name = "input_ids"

    def __init__(self, config: MMSeqConfig, sequence: SequenceModel):
        super().__init__(config)
        self.sequence = sequence

    @classmethod
    def from_pretrained(cls, directory: str | Path, *arguments: Any, config: Any = None, **options: Any) -> MMSeqModel:  # type: ignore[override]
        """dtype: of the weights, default and `auto`: fp32 on a CPU, bf16 on a GPU. device_map: one device.

        Raises: CheckpointError when the directory is not a complete checkpoint, ConfigError for an option that
        means nothing here.
        """
        dtype, device = options.pop("dtype", options.pop("torch_dtype", None)), options.pop("device_map", None)
        unknown = [name for name, value in options.items() if name not in _IGNORED and value is not None]
        if unknown or arguments:
            raise ConfigError(f"AutoModel of a checkpoint of mmseq has no option {', '.join(unknown) or arguments}")
        if isinstance(dtype, str):
            dtype = None if dtype == "auto" else getattr(torch, dtype.removeprefix("torch."))
        if isinstance(device, dict):
            if len(set(device.values())) != 1:
                raise ConfigError(f"device_map {device}: a checkpoint of mmseq goes to one device")
            device = next(iter(device.values()))
        if device == "auto":
            device = default_device()
        sequence = SequenceModel.from_pretrained(directory, device=device or "cpu", dtype=dtype)
        return cls(config or MMSeqConfig.from_pretrained(str(directory)), sequence).eval()

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, *, is_main_process: bool = True, shard_bytes: int = SHARD_BYTES
    ) -> None:
        """Write a checkpoint of ours, with its tokenizers."""
        if is_main_process:
            self.sequence.save_pretrained(save_directory, shard_bytes=shard_bytes)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.sequence.transformer.embed

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, slots: Tensor | None = None):
        """Hidden states (B, T, D) of ids (B, T), padded on the right where attention_mask (B, T) is 0.

        slots (B, T, S): default the slot "none", that of text. Frames come in one position per code here.
        """
        B, T = input_ids.shape
        keep = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        if not bool((keep[:, 1:] <= keep[:, :-1]).all()):
            raise ConfigError("attention_mask has padding before a token", fix="pad on the right")
        lengths = [n for n in keep.sum(1).tolist() if n]
        t, ids = self.sequence.transformer, input_ids[keep]
        chosen = ids.new_zeros(len(ids), 1) if slots is None else slots[keep]
        positions = torch.arange(T, device=ids.device).expand(B, T)[keep]
        half = t.embed.weight.dtype != torch.float32 or torch.is_autocast_enabled(ids.device.type)
        backend = choose_backend(ids.device, t.config.attention, half=half)[0]
        places = 1 if self.sequence.tokenizers.layout.flat else 2  # type: ignore[union-attr]
        line = ModelInput.of_ids(np.zeros(0, np.int64), np.zeros((0, places), np.int64), merge=t.config.merge)
        line = replace(line.tensors().to(ids.device), ids=ids, slots=chosen.expand(-1, places), positions=positions)
        hidden = t(line, t.code_vectors(), documents_of(lengths, ids.device), backend)
        out = hidden.new_zeros(B, T, hidden.shape[-1])
        out[keep] = hidden
        return BaseModelOutput(last_hidden_state=out)


AutoConfig.register("mmseq", MMSeqConfig, exist_ok=True)
AutoModel.register(MMSeqConfig, MMSeqModel, exist_ok=True)
