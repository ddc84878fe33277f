"""Export: a checkpoint as a language model that transformers and its servers load without remote code.

    mmseq export runs/robot/checkpoint hf exported
    mmseq export runs/robot/checkpoint hf exported --text-only --dtype bf16

`config.json model.safetensors generation_config.json README.md`, and `tokenizer.json` when the text tokenizer is
one of Hugging Face.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmseq.errors import CheckpointError, ConfigError, did_you_mean
from mmseq.model import families
from mmseq.model.language_model import TOKENIZER_FILE
from mmseq.model.sequence_model import CONFIG_FILE, SequenceModel
from mmseq.model.weights import SHARD_BYTES, save_weights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export_hf(
    checkpoint: str | Path,
    out: str | Path,
    *,
    dtype: str = "fp32",
    text_only: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a checkpoint to the new folder `out`, complete or not at all.

    text_only: leave out the ids after the text range, so that a server of text can never sample them.
    Raises: ConfigError when no architecture of Hugging Face is like this model; CheckpointError when `out` exists.
    """
    from mmseq.data.shards import partial_folder, replace_folder

    out = Path(out).resolve()
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is unknown: {did_you_mean(dtype, DTYPES)}")
    require_new(out)
    model = SequenceModel.from_pretrained(checkpoint, dtype=torch.float32)
    assert model.tokenizers is not None
    text = model.tokenizers.text
    rows = text.size if text_only else len(model.vocabulary)
    families.family_of(model.config)  # refused before anything is written
    weights = hf_weights(model, rows)
    kind = str(DTYPES[dtype]).removeprefix("torch.")
    config = families.write_config(
        model.config, vocabulary=rows, tied=families.HEAD not in weights, end=text.end, dtype=kind
    )
    partial = partial_folder(out)
    save_weights(weights, partial, metadata={"format": "pt"}, dtype=DTYPES[dtype], shard_bytes=shard_bytes)
    _write_json(partial / CONFIG_FILE, config)
    _write_json(partial / "generation_config.json", {"eos_token_id": text.end})
    if text.huggingface:
        (partial / TOKENIZER_FILE).write_bytes(text.data)
        end = text.piece(text.end)
        tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "add_bos_token": False}
        _write_json(partial / "tokenizer_config.json", tokenizer)
    else:
        text.save(partial)
    (partial / "README.md").write_text(_readme(model, rows, config))
    replace_folder(partial, out)
    return out


def require_new(out: Path) -> None:
    """Raises: CheckpointError when something is at `out` already; an empty folder may be."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists, and nothing is replaced", fix="name another folder, or remove it")


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")


def hf_weights(model: SequenceModel, rows: int) -> dict[str, Tensor]:
    """The tensors of a model under Hugging Face's names, ids 0 .. rows - 1, mostly views of its own.

    The slot "none", which every text has, is added to the embedding; then embedding and head are two matrices.
    """
    state = model.transformer.plain_state()
    embed = head = state["embed.weight"][:rows]
    if not model.config.tie_embeddings:
        head = state["head.weight"][:rows]
    layout = model.tokenizers.layout  # type: ignore[union-attr]
    nowhere = torch.tensor(layout.slots("none", 1, 0, 1)[0])
    none = state["slots.weight"][nowhere].sum(0) if model.config.slot_embeddings else torch.zeros(1)
    if none.any():
        embed = embed + none
    out = {families.EMBEDDING: embed}
    for mine, parts in families.tensors(model.config):
        names, sizes = zip(*parts)
        out |= zip(names, state[mine].split(sizes))
    if embed is not head:
        out[families.HEAD] = head
    return out


def _readme(model: SequenceModel, rows: int, config: dict[str, Any]) -> str:
    v, c = model.vocabulary, model.config
    first = [v.structure("<bos>"), v.structure("<no_embodiment>"), v.header("text")]
    lines = [
        f"# A {config['architectures'][0].removesuffix('ForCausalLM')} exported by mmseq",
        "",
        f"`transformers.AutoModelForCausalLM.from_pretrained` loads it. It has {rows} ids.",
        "",
        "Carried: all layers, the embedding and the output matrix. What it computes for text is what mmseq computes.",
        "",
        "Not carried:",
        "",
    ]
    if rows < len(v):
        lines.append("- the ids of vision, actions and structure (`--text-only`)")
    if c.slot_embeddings:
        lines.append("- slots, the vectors for the place of a token in its frame or chunk; text has none")
    if c.merge > 1:
        lines.append(f"- merged vision: {c.merge} x {c.merge} codes of a given frame in one position")
    if c.copying:
        lines.append("- copying of the code at the same place of the frame before")
    if lines[-1] == "":
        lines.append("- nothing")
    if any((c.slot_embeddings, c.merge > 1, c.copying)):
        lines += ["", "So frames and actions come out right from mmseq only."]
    if not model.tokenizers.text.huggingface:  # type: ignore[union-attr]
        lines += ["", "Text is SentencePiece's, `text.model`: encode without a prefix, and close with its end piece."]
    if rows == len(v):
        lines += ["", f"A text that mmseq trained with `-> text` begins with the ids {first}.", ""]
        lines += ["| range | first id | ids |", "| --- | --- | --- |"]
        lines += [f"| {r.name} | {r.start} | {r.size} |" for r in v.ranges.values()]
    return "\n".join(lines) + "\n"
