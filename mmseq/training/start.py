"""What a run starts from: its data, and fresh weights, a language model (`init_from`) or a checkpoint of ours.

Rank 0 builds the whole model in fp32 on its CPU; DeepSpeed sends it to the other ranks, whole or in shares.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mmseq.config import to_yaml
from mmseq.data.mixture import MixConfig, Mixture
from mmseq.errors import CheckpointError, ConfigError, FingerprintError, MMSeqError, did_you_mean
from mmseq.layout import Layout
from mmseq.model.config import CHECKPOINT_FIELDS, LANGUAGE_MODEL_FIELDS, ModelConfig
from mmseq.model.families import read_config
from mmseq.model.language_model import from_language_model, read_json, require_language_model
from mmseq.model.sequence_model import CONFIG_FILE, TOKENIZERS_FOLDER, SequenceModel
from mmseq.model.weights import StoredWeights
from mmseq.tokenization.bundle import Tokenizers
from mmseq.training.config import TrainConfig
from mmseq.training.distributed import agree
from mmseq.training.lora import add_adapters
from mmseq.vocabulary import EMBODIMENT_SLOTS, Vocabulary

# Of the model's settings: may change when a run goes on; and what the tokenizers decide, which are compared.
HOW = ("attention", "activation_checkpointing", "slots", "soft")


def open_mixture(config: TrainConfig, mix: MixConfig, tokenizers: Tokenizers) -> Mixture:
    """The data of a run. Raises: ConfigError, DataError, FingerprintError when it is not there, is of other
    tokenizers, or has a sequence that no row can hold."""
    data, ranges = config.data, tokenizers.vocabulary.ranges
    for name in config.range_weights:
        if name not in ranges:
            raise ConfigError(f"range_weights names an unknown range {name!r}: {did_you_mean(name, ranges)}")
    if not any(config.range_weights.get(name, 1.0) for name in ranges):
        raise ConfigError("range_weights are 0 for every range, so nothing would be learned")
    mixture = Mixture(mix, data.tokens, tokenizers, row_tokens=data.row_tokens, seed=config.seed)
    longest = max((moments.longest() for moments in mixture.moments), key=lambda sample: sample.length)
    if longest.length > data.row_tokens:
        raise ConfigError(
            f"{mixture.provenance(longest)} has {longest.length} tokens, more than any other and than "
            f"data.row_tokens={data.row_tokens}",
            fix=f"raise that to at least {longest.length}, or shorten the task",
        )
    return mixture


def identity_of(config: TrainConfig, model: ModelConfig, mixture: Mixture) -> dict[str, Any]:
    """What must be the same when a run goes on. model: its whole shape."""
    return {
        "seed": config.seed,
        "mix": to_yaml(mixture.mix),
        "tokens": {name: shards.reader.manifest["index"]["sha256"] for name, shards in mixture.shards.items()},
        "tokenizers": mixture.tokenizers.fingerprints(),
        "model": {k: v for k, v in model.to_dict().items() if k not in HOW},
        "optimizer": config.optimizer.kind,
        "init_from": config.init_from,
        "base": StoredWeights(config.init_from).fingerprint() if config.init_from else None,
        "lora": [config.lora.rank, config.lora.alpha],
        "rows": [config.data.row_tokens, config.data.rows_per_step],
    }


def in_todays_terms(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity as it was stored, with settings that came after it at their defaults."""
    try:
        mix = OmegaConf.merge(OmegaConf.structured(MixConfig), OmegaConf.create(identity["mix"]))
        model = ModelConfig.from_dict(identity["model"]).to_dict()
    except (KeyError, OmegaConfBaseException, YAMLError, ConfigError):
        return identity  # of a program after this one
    return {**identity, "mix": to_yaml(OmegaConf.to_object(mix)), "model": {k: model[k] for k in model if k not in HOW}}


def require_start(config: TrainConfig, tokenizers: Tokenizers) -> None:
    """Raises: what `build_model` raises when `init_from` and the tokenizers do not fit; reads no weights."""
    if config.init_from is None:
        return
    directory = Path(config.init_from)
    if _is_ours(directory):
        _require_known(Tokenizers.load(directory / TOKENIZERS_FOLDER), tokenizers, directory)
        StoredWeights(directory)
    else:
        require_language_model(directory, tokenizers)


def build_model(config: TrainConfig, tokenizers: Tokenizers) -> SequenceModel:
    """The model of a recipe before its first step, in fp32 on the CPU. Its `config` is the whole shape.

    Raises: ConfigError, CheckpointError, FingerprintError when recipe, tokenizers and what it starts from
    contradict each other.
    """
    if config.init_from is None:
        return SequenceModel.new(config.model, tokenizers, seed=config.seed)
    directory = Path(config.init_from)
    if _is_ours(directory):
        model = from_checkpoint(directory, config.model, tokenizers)
    else:
        model = from_language_model(directory, config.model, tokenizers, seed=config.seed)
    if config.lora.rank:
        add_adapters(model, config.lora, seed=config.seed)
    return model


def model_of_rank(config: TrainConfig, tokenizers: Tokenizers, rank: int) -> SequenceModel:
    """`build_model` on rank 0; on other ranks a model of that shape whose weights are memory that nobody has written.

    Raises: on all ranks together, what `build_model` raises on rank 0.
    """
    model, problem = None, None
    try:
        model = build_model(config, tokenizers) if rank == 0 else _unwritten(config, tokenizers)
    except MMSeqError as error:
        problem = error
    if agree(problem is not None):
        raise problem or ConfigError("another rank could not build the model; it says why")
    assert model is not None
    return model


def _unwritten(config: TrainConfig, tokenizers: Tokenizers) -> SequenceModel:
    shape = model_shape(config).for_tokenizers(tokenizers)
    with torch.device("meta"):
        model = SequenceModel(shape, tokenizers.vocabulary, tokenizers)
    model.to_empty(device="cpu")
    model.learn_codes()
    if config.lora.rank:
        add_adapters(model, config.lora)
    return model


def model_shape(config: TrainConfig) -> ModelConfig:
    """The recipe's model with what `init_from` decides, read from config.json alone. Raises: as `build_model`."""
    if config.init_from is None:
        return config.model
    path = Path(config.init_from) / CONFIG_FILE
    if not _is_ours(path.parent):
        return config.model.adopt(
            read_config(read_json(path), str(path)), LANGUAGE_MODEL_FIELDS, where=config.init_from
        )
    try:
        theirs = ModelConfig.from_dict(read_json(path).get("model"))
    except ConfigError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return config.model.adopt(theirs, CHECKPOINT_FIELDS, where=config.init_from)


def _is_ours(directory: Path) -> bool:
    if not directory.is_dir():
        raise CheckpointError(
            f"init_from: {directory} does not exist", fix="name a local directory; nothing is downloaded"
        )
    data = read_json(directory / CONFIG_FILE)
    return isinstance(data, dict) and data.get("model_type") == "mmseq"


def from_checkpoint(directory: Path, recipe: ModelConfig, tokenizers: Tokenizers) -> SequenceModel:
    """A checkpoint of ours under other embodiments: those that it knows keep their tokens, new ones get spare ones.

    Ranges that it lacks are gained: their rows are drawn like those that it has.
    Raises: FingerprintError when a tokenizer or a known embodiment is another.
    """
    old = SequenceModel.from_pretrained(directory, dtype=torch.float32)
    assert old.tokenizers is not None
    config = recipe.adopt(old.config, CHECKPOINT_FIELDS, where=str(directory)).for_tokenizers(tokenizers)
    _require_known(old.tokenizers, tokenizers, directory)
    state = old.transformer.state_dict()
    _move_rows(state, old.tokenizers, tokenizers)
    with torch.device("meta"):
        model = SequenceModel(config, tokenizers.vocabulary, tokenizers)
    model.transformer.load_state_dict(state, assign=True)
    model.learn_codes()
    return model


def _require_known(old: Tokenizers, new: Tokenizers, directory: Path) -> None:
    """Raises: FingerprintError for a range or an embodiment that both have and that differs, or that is gone."""
    theirs = {k: v for k, v in old.fingerprints().items() if k in new.fingerprints() or not k.startswith("embodiment/")}
    new.require_fingerprints(
        theirs, what=str(directory), fix="keep its tokenizers and give a changed embodiment another name"
    )
    if new.layout.flat != old.layout.flat:
        raise FingerprintError(
            f"the tokenizers and {directory} number places in another way", fix="keep the tokenizers of the checkpoint"
        )


def _move_rows(state: dict[str, torch.Tensor], old: Tokenizers, new: Tokenizers) -> None:
    """Put rows that belong to ids and slots where `new` has them; rows that `old` lacks are drawn."""
    ids, rows = _ids_of(old.vocabulary), _ids_of(new.vocabulary)
    embodiments = _embodiment_rows(old.vocabulary, new.vocabulary)
    first = old.vocabulary.ranges["embodiment"].start
    ids |= {("embodiment", i): first + there for i, there in enumerate(embodiments)}
    for name in ("embed.weight", "head.weight"):
        if name in state:
            state[name] = _moved(state[name], ids, rows, len(new.vocabulary))
    if "slots.weight" in state and old.layout != new.layout:
        state["slots.weight"] = _moved(
            state["slots.weight"], _rows_of(old.layout), _rows_of(new.layout), new.layout.slot_rows
        )


def _moved(weight: torch.Tensor, old: dict[Any, int], new: dict[Any, int], count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    drawn = torch.randn(count, weight.shape[1], generator=generator) * weight.std(0) + weight.mean(0)
    pairs = [(here, old[key]) for key, here in new.items() if key in old]
    here, there = torch.tensor(pairs).unbind(1)
    drawn[here] = weight[there]
    return drawn


def _ids_of(vocabulary: Vocabulary) -> dict[Any, int]:
    """The ids by what they mean: a range and a code, or a structural token; ids beyond all ranges by their place."""
    ranges = vocabulary.ranges.values()
    found: dict[Any, int] = {(r.name, i): r.start + i for r in ranges for i in range(r.size)}
    for token in vocabulary.structural:  # their places depend on which streams there are
        at = vocabulary.structure(token)
        del found["structure", at - vocabulary.ranges["structure"].start]
        found["structure", token] = at
    last = max(r.stop for r in ranges)
    return found | {("unused", i): last + i for i in range(len(vocabulary) - last)}


def _rows_of(layout: Layout) -> dict[Any, int]:
    """The rows of the slot table by what they mean."""
    sizes = {use: (first, rows + columns) for use, (first, rows, columns) in layout.tables.items()}
    return {(use, i): first + i for use, (first, count) in sizes.items() for i in range(count)} | {"none": 0}


def _embodiment_rows(old: Vocabulary, new: Vocabulary) -> list[int]:
    """For each embodiment token of `new`, the one of `old` whose row it begins with."""
    known = {name: old.embodiments.index(name) for name in new.embodiments if name in old.embodiments}
    free = [i for i in range(EMBODIMENT_SLOTS) if i not in known.values()]
    spare = iter(sorted(free, key=lambda i: i < len(old.embodiments)))  # rows of forgotten robots last
    names = [*new.embodiments, *[None] * (EMBODIMENT_SLOTS - len(new.embodiments))]
    return [known[name] if name in known else next(spare) for name in names]
