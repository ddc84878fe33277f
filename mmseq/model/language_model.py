"""Start a SequenceModel from a language model: a local directory as Hugging Face publishes them.

Text ids stay. The rows of all other ids are drawn like the language model's own: normal, with the mean and the
standard deviation of each column over the rows of the tokenizer's pieces. So a new token enters the layers as
an average one plus noise of the size that they are used to, and its first logits spread as those of text do
(Hewitt 2021, "Initializing new word embeddings for pretrained language models"; columns are taken as independent).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmseq.errors import CheckpointError, FingerprintError
from mmseq.model import families
from mmseq.model.config import LANGUAGE_MODEL_FIELDS, ModelConfig
from mmseq.model.sequence_model import CONFIG_FILE, SequenceModel
from mmseq.model.transformer import EMBED_STD, OWN, SHARED, Transformer
from mmseq.model.weights import StoredWeights
from mmseq.tokenization.bundle import Tokenizers

TOKENIZER_FILE = "tokenizer.json"


def read_json(path: Path) -> Any:
    """Raises: CheckpointError when the file is absent or damaged."""
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(
            f"{path}: {error.strerror}", fix="name a directory with config.json, tokenizer.json and safetensors"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def from_language_model(
    directory: str | Path, recipe: ModelConfig, tokenizers: Tokenizers, *, seed: int = 0
) -> SequenceModel:
    """The language model with the ranges and modules that mmseq adds, in fp32 on the CPU.

    A text alone has the logits that the language model gives it. Tensors are copied one at a time into the new
    model, so that the weights stand in memory once.
    recipe: decides what a language model does not have; a field that it has may be left at its default.
    Raises: CheckpointError, ConfigError naming what cannot be represented or contradicts the recipe;
    FingerprintError when the text tokenizer is another.
    """
    directory = Path(directory)
    weights = require_language_model(directory, tokenizers)
    theirs = families.read_config(read_json(directory / CONFIG_FILE), str(directory / CONFIG_FILE))
    config = recipe.adopt(theirs, LANGUAGE_MODEL_FIELDS, where=str(directory))
    config = config.for_tokenizers(tokenizers)
    with torch.device("meta"):
        model = SequenceModel(config, tokenizers.vocabulary, tokenizers)
    model.transformer.to_empty(device="cpu")
    with torch.no_grad():
        _copy_layers(model.transformer, weights)
        generator = torch.Generator().manual_seed(seed)
        spread = _rows(model, "embed.weight", weights, families.EMBEDDING, theirs.vocabulary, generator)
        if not config.tie_embeddings:
            _rows(model, "head.weight", weights, families.HEAD, theirs.vocabulary, generator)
        _borrow_ends(model, read_json(directory / CONFIG_FILE))
        _new_modules(model.transformer, float(spread.square().mean().sqrt()), generator)
        model.learn_codes()
        projection = model.transformer.code_projection
        assert projection is not None
        projection.weight.normal_(generator=generator).mul_(SHARED * spread[:, None])
    return model


def require_language_model(directory: Path, tokenizers: Tokenizers) -> StoredWeights:
    """The weights of a directory, of which nothing is read yet, once it fits the tokenizers.

    Raises: CheckpointError, FingerprintError as `from_language_model`.
    """
    theirs = families.read_config(read_json(directory / CONFIG_FILE), str(directory / CONFIG_FILE))
    _require_same_text(directory, tokenizers)
    pieces = tokenizers.vocabulary.ranges["text"].size
    if theirs.vocabulary < pieces:
        raise CheckpointError(
            f"{directory / CONFIG_FILE}: vocab_size={theirs.vocabulary}, its tokenizer has {pieces} pieces",
            fix="add rows with transformers' resize_token_embeddings and save it again",
        )
    return StoredWeights(directory)


def _require_same_text(directory: Path, tokenizers: Tokenizers) -> None:
    path = directory / TOKENIZER_FILE
    fix = f"train tokenizers with text.kind=huggingface text.path={path}, and tokenize with them"
    if not path.is_file():
        raise CheckpointError(
            f"{directory} has no {TOKENIZER_FILE}", fix="write it with transformers' AutoTokenizer.save_pretrained"
        )
    if not tokenizers.text.huggingface:
        raise FingerprintError(f"the tokenizers have a text tokenizer of their own, not that of {directory}", fix=fix)
    there = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    if there != tokenizers.text.fingerprint:
        raise FingerprintError(
            f"the text tokenizer is {tokenizers.text.fingerprint}, that of {directory} is {there}", fix=fix
        )


def _read(weights: StoredWeights, name: str, shape: tuple[int, ...]) -> Tensor:
    if name not in weights:
        raise CheckpointError(f"{weights.directory} has no tensor {name!r}", fix="copy all files of the model")
    tensor = weights[name]
    if tensor.shape != shape:
        raise CheckpointError(
            f"{weights.directory}: {name} has the shape {tuple(tensor.shape)}, its {CONFIG_FILE} says {shape}"
        )
    if not tensor.is_floating_point() or not tensor.isfinite().all():
        what = "is not finite" if tensor.is_floating_point() else f"holds {tensor.dtype}, which may be quantised"
        raise CheckpointError(f"{weights.directory}: {name} {what}", fix="save the model in fp32, bf16 or fp16")
    return tensor


def _copy_layers(transformer: Transformer, weights: StoredWeights) -> None:
    mine = dict(transformer.named_parameters())
    known = {families.EMBEDDING, families.HEAD}
    for name, parts in families.tensors(transformer.config):
        first = 0
        for theirs, rows in parts:
            target = mine[name][first : first + rows]
            target.copy_(_read(weights, theirs, tuple(target.shape)))
            first += rows
            known.add(theirs)
        assert first == len(mine[name])
    foreign = [n for n in weights if n not in known and not n.endswith("rotary_emb.inv_freq")]
    if foreign:
        raise CheckpointError(
            f"{weights.directory} has {len(foreign)} tensors that its {CONFIG_FILE} has no place for: {foreign[0]!r}..."
        )


def _rows(
    model: SequenceModel, mine: str, weights: StoredWeights, theirs: str, stored: int, generator: torch.Generator
) -> Tensor:
    """Fill the embedding or the head: the rows of the tokenizer's pieces, then new ones that are like them.

    The language model may have more rows than pieces, as padding; those are left behind.
    Returns: the standard deviation of each column of the pieces (D,).
    """
    matrix = model.transformer.get_parameter(mine)
    codes = model.vocabulary.ranges["vision"].start
    pieces = model.vocabulary.ranges["text"].size
    matrix[:pieces].copy_(_read(weights, theirs, (stored, model.config.width))[:pieces])
    mean, spread = matrix[:pieces].mean(0), matrix[:pieces].std(0, correction=0)
    matrix[pieces:].normal_(generator=generator).mul_(spread)
    assert model.tokenizers is not None
    shared = torch.from_numpy(model.tokenizers.code_features()).any(1)  # the projection gives these the rest
    matrix[codes:] *= torch.where(shared, OWN, 1.0)[:, None]
    matrix[pieces:] += mean
    return spread


def _borrow_ends(model: SequenceModel, config: dict[str, Any]) -> None:
    """<bos> and <eos> begin as the language model's own: what attention rests on is the first token's row.

    A language model without a first token puts its end token between texts.
    """
    assert model.tokenizers is not None
    end = model.tokenizers.text.end
    first = config.get("bos_token_id")
    if type(first) is not int or not 0 <= first < model.vocabulary.ranges["text"].size:
        first = end
    embed = model.transformer.embed.weight
    embed[model.vocabulary.structure("<bos>")] = embed[first]
    embed[model.vocabulary.structure("<eos>")] = embed[end]


def _new_modules(transformer: Transformer, spread: float, generator: torch.Generator) -> None:
    """Slots, merging and copying as in a new model, slots in proportion to the embedding.

    Text has the slot "none", which is zero: it changes nothing.
    """
    for name, p in transformer.named_parameters():
        if name.startswith(("slots", "merge", "soft", "copied", "copy_gate")):
            p.normal_(generator=generator).mul_(transformer.initial_std(name, p))
        if name.startswith("slots"):
            p.mul_(spread / EMBED_STD)
            p[0] = 0.0
