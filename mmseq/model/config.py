"""ModelConfig: size and form of the transformer, in a recipe and in a checkpoint's config.json."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args, get_type_hints

from mmseq.errors import ConfigError, did_you_mean, raise_all


@dataclass(kw_only=True)
class RopeScaling:
    """How Llama 3.1 and later stretch RoPE to longer contexts (`rope_type: llama3`), in Hugging Face's names."""

    # longer wavelengths than original_max_position_embeddings / low_freq_factor become so many times as long
    factor: float = 8.0
    low_freq_factor: float = 1.0  # see factor; those between the two are interpolated
    high_freq_factor: float = 4.0  # shorter wavelengths than original_max_position_embeddings / high_freq_factor stay
    original_max_position_embeddings: int = 8192  # the context before it was stretched


@dataclass(kw_only=True)
class ModelConfig:
    """Size and form of the transformer."""

    width: int = 128  # of the residual stream
    layers: int = 4  # transformer blocks
    heads: int = 4  # query heads
    kv_heads: int = 4  # key/value heads; `heads` must be a multiple
    head_size: int = 32  # width of a head
    mlp: int = 384  # hidden width of SwiGLU
    rope_theta: float = 10_000.0  # base of the rotary wavelengths
    rope_scaling: RopeScaling | None = None  # of Llama 3.1 (`init_from` fills it in)
    nope_every: int = 0  # of SmolLM3: each n-th layer has no RoPE; 0 is none
    norm_eps: float = 1e-6  # of RMSNorm
    qk_norm: bool = True  # RMSNorm of queries and keys
    qkv_bias: bool = False  # of Qwen2
    tie_embeddings: bool = True  # the output matrix is the embedding
    context_tokens: int = 0  # the context a language model was made for, which an export repeats; 0 is unknown
    # learned vectors for the place of a token in its frame or chunk; off for a plain language model
    slot_embeddings: bool = True
    # a predicted vision token may repeat the one at its place in the frame before; off for a plain language model
    copying: bool = True
    merge: int = 0  # the tokenizers'; 0 takes it from them
    slots: int = 0  # rows of the table of slots; the tokenizers', 0 takes them from them
    soft: int = 0  # features of an encoder's position; the tokenizers', 0 takes them from them
    vocabulary: int = 0  # of a recipe, a forecast for `mmseq inspect`; the tokenizers decide
    attention: str = "auto"  # backend: `auto`, or one of those in model/attention.py
    activation_checkpointing: bool = False  # compute activations again in the backward pass, for less memory
    z_loss: float = 1e-4  # weight of the squared log of the softmax's denominator

    def check(self) -> None:
        """Raises: ConfigError naming every field that cannot be."""
        raise_all(self.problems())

    def problems(self) -> Iterator[ConfigError]:
        """Everything that cannot be."""
        for name in ("width", "layers", "heads", "kv_heads", "head_size", "mlp", "vocabulary", "merge"):
            if getattr(self, name) < 1:
                yield ConfigError(f"model.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("nope_every", "context_tokens", "slots", "soft"):
            if getattr(self, name) < 0:
                yield ConfigError(f"model.{name} must not be negative, got {getattr(self, name)}")
            if getattr(self, name) > 1 << 30:
                yield ConfigError(f"model.{name} is {getattr(self, name)}, more than any machine can hold")
        if self.layers > 10_000:
            yield ConfigError(f"model.layers is {self.layers}", fix="use at most 10000")
        if not (math.isfinite(self.z_loss) and self.z_loss >= 0):
            yield ConfigError(f"model.z_loss must not be negative, got {self.z_loss}")
        positive: dict[str, float] = {"rope_theta": self.rope_theta, "norm_eps": self.norm_eps}
        if self.rope_scaling:
            positive |= {f"rope_scaling.{k}": v for k, v in asdict(self.rope_scaling).items()}
        for name, value in positive.items():
            if not (math.isfinite(value) and value > 0):
                yield ConfigError(f"model.{name} must be positive, got {value}")
        if self.rope_scaling and self.rope_scaling.high_freq_factor <= self.rope_scaling.low_freq_factor:
            yield ConfigError("model.rope_scaling.high_freq_factor must be larger than low_freq_factor")
        if self.kv_heads > 0 and self.heads % self.kv_heads:
            yield ConfigError(f"model.heads {self.heads} is not a multiple of model.kv_heads {self.kv_heads}")
        if self.head_size % 2:
            yield ConfigError(f"model.head_size must be even for RoPE, got {self.head_size}")

    def for_tokenizers(self, tokenizers: Any) -> ModelConfig:
        """This config with what the tokenizers (`Tokenizers`) decide.

        Raises: ConfigError when it says something else.
        """
        layout = tokenizers.layout
        theirs = {"merge": layout.merge, "slots": layout.slot_rows, "soft": layout.soft and tokenizers.soft_features}
        for name, value in theirs.items():
            mine = getattr(self, name)
            if mine not in (0, value):
                raise ConfigError(f"model.{name} is {mine}, the tokenizers have {value}", fix="leave it out")
        return replace(self, vocabulary=len(tokenizers.vocabulary), **theirs)

    def has_rope(self, layer: int) -> bool:
        """Whether layer 0 .. layers - 1 rotates its queries and keys."""
        return not self.nope_every or (layer + 1) % self.nope_every != 0

    def adopt(self, theirs: ModelConfig, names: tuple[str, ...], *, where: str) -> ModelConfig:
        """This recipe's config with the fields `names` of what it starts from.

        Raises: ConfigError when the recipe sets one of them to something else.
        """
        default = ModelConfig()
        for name in names:
            mine, other = getattr(self, name), getattr(theirs, name)
            if mine not in (getattr(default, name), other):
                raise ConfigError(
                    f"the recipe has model.{name}={mine}, {where} has {other}", fix=f"leave model.{name} out"
                )
        return replace(self, **{name: getattr(theirs, name) for name in names})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> ModelConfig:
        """Of a config.json; what it lacks has its default. Raises: ConfigError naming the field."""
        return _typed(cls, data, "model")


# What a language model decides, and what a checkpoint of ours decides.
LANGUAGE_MODEL_FIELDS = (
    *("width", "layers", "heads", "kv_heads", "head_size", "mlp", "rope_theta", "rope_scaling", "nope_every"),
    *("norm_eps", "qk_norm", "qkv_bias", "tie_embeddings", "context_tokens"),
)
CHECKPOINT_FIELDS = (*LANGUAGE_MODEL_FIELDS, "slot_embeddings", "copying", "merge", "soft")


def _typed[T](schema: type[T], data: Any, where: str) -> T:
    if not isinstance(data, dict):
        raise ConfigError(f"{where} must hold fields, it holds {data!r:.80}")
    hints = get_type_hints(schema)
    values = {}
    for name, value in data.items():
        if name not in hints:
            raise ConfigError(f"{where}.{name} is unknown to this version of mmseq: {did_you_mean(name, hints)}")
        kind = hints[name]
        if RopeScaling in get_args(kind):
            values[name] = None if value is None else _typed(RopeScaling, value, f"{where}.{name}")
            continue
        fits = isinstance(value, (int, float) if kind is float else kind)
        if not fits or isinstance(value, bool) != (kind is bool):
            raise ConfigError(f"{where}.{name} must be {kind.__name__}, got {value!r:.80}")
        values[name] = kind(value)
    return schema(**values)
