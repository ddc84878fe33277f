"""Language models of Hugging Face in our terms: their config.json and the names of their tensors, both ways.

Llama (SmolLM and SmolLM2 are Llama), Qwen2 and 2.5, Qwen3, SmolLM3. What our transformer cannot represent is
refused with the name of the field.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from mmseq.errors import CheckpointError, ConfigError
from mmseq.model.config import ModelConfig

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DEFAULT_CONTEXT = 2048  # written by an export when nobody knows

# Fields that a config.json may lack, as transformers fills them in.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    "smollm3": {"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_theta": 2_000_000.0},
}
# Fields that change what is computed, and the only values that our transformer has.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish", None),
    "attention_bias": (False, None),  # Llama's is on all four projections; Qwen2's has no field
    "mlp_bias": (False, None),
    "attention_dropout": (0, None),
    "partial_rotary_factor": (1, None),
    "rope_interleaved": (False, None),
    "quantization_config": (None,),
}


def read_config(data: Any, where: str) -> ModelConfig:
    """The transformer of a language model's config.json, without `vocabulary` and `merge`, and without what only
    our models have. Raises: CheckpointError naming the field that is absent, wrong or cannot be represented."""
    family = data.get("model_type") if isinstance(data, dict) else None
    if not isinstance(family, str) or family not in ARCHITECTURES:
        raise CheckpointError(
            f"{where}: model_type is {family!r}",
            fix=f"start from one of {', '.join(ARCHITECTURES)}, or from a checkpoint",
        )
    fields = {**_DEFAULTS[family], **{k: v for k, v in data.items() if v is not None}}
    for name, allowed in _ONLY.items():
        if fields.get(name) not in allowed:
            raise _unsupported(where, name, fields[name])
    try:
        _refuse_sliding_windows(fields, where)
        heads, width, layers = (fields[k] for k in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
        theta, scaling = _rope(fields, where)
        shape = {
            "width": width,
            "layers": layers,
            "heads": heads,
            "kv_heads": fields.get("num_key_value_heads", heads),
            "head_size": fields.get("head_dim") or width // heads,
            "mlp": fields["intermediate_size"],
            "rope_theta": theta,
            "rope_scaling": scaling,
            "nope_every": _nope_every(fields, where) if family == "smollm3" else 0,
            "norm_eps": fields.get("rms_norm_eps", 1e-6),
            "qk_norm": family == "qwen3",
            "qkv_bias": family == "qwen2",
            "tie_embeddings": fields.get("tie_word_embeddings", False),
            "context_tokens": fields.get("max_position_embeddings", 0),
            "slot_embeddings": False,
            "copying": False,
            "merge": 1,
            "vocabulary": fields["vocab_size"],
        }
        config = ModelConfig.from_dict(shape)
        config.check()
    except KeyError as error:
        raise CheckpointError(f"{where} lacks {error.args[0]!r}", fix="copy all files of the model") from error
    except (ConfigError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{where} is damaged: {error}") from error
    return config


def _unsupported(where: str, field: str, value: Any) -> CheckpointError:
    return CheckpointError(f"{where}: {field}={value!r} cannot be represented", fix="start from another model")


def _refuse_sliding_windows(fields: dict[str, Any], where: str) -> None:
    types = fields.get("layer_types")
    if types is not None:
        if set(types) != {"full_attention"}:
            raise _unsupported(where, "layer_types", types)
        return
    if fields.get("use_sliding_window") and fields.get("sliding_window") is not None:
        none_slides = fields["model_type"] != "smollm3" and fields.get("max_window_layers", 28) >= fields.get(
            "num_hidden_layers", 0
        )
        if not none_slides:
            raise _unsupported(where, "use_sliding_window", True)


def _rope(fields: dict[str, Any], where: str) -> tuple[float, dict[str, Any] | None]:
    """theta and scaling, from `rope_theta` and `rope_scaling` or from transformers 5's `rope_parameters`."""
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    rope = fields.get(name) or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{where}: {name} must hold fields, it holds {rope!r:.80}")
    theta = rope.get("rope_theta") or fields.get("rope_theta", 10_000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1) != 1:
        raise _unsupported(where, f"{name}.partial_rotary_factor", rope["partial_rotary_factor"])
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise _unsupported(where, f"{name}.rope_type", kind)
    context = fields.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    scaling = {k: rope[k] for k in ("factor", "low_freq_factor", "high_freq_factor")}
    return theta, {
        **scaling,
        "original_max_position_embeddings": context or fields["max_position_embeddings"],
    }


def _nope_every(fields: dict[str, Any], where: str) -> int:
    """SmolLM3: `no_rope_layers` has a 1 for each layer with RoPE, whatever its name says."""
    layers, given = fields["num_hidden_layers"], fields.get("no_rope_layers")
    if given is None:
        return fields.get("no_rope_layer_interval", 4)
    rope = [bool(x) for x in given][:layers]
    every = rope.index(False) + 1 if False in rope else 0
    if rope != [not every or (i + 1) % every != 0 for i in range(layers)]:
        raise _unsupported(where, "no_rope_layers", given)
    return every


def family_of(config: ModelConfig) -> str:
    """The family whose architecture a model of ours has. Raises: ConfigError naming the fields that none combines."""
    special = [name for name in ("qk_norm", "qkv_bias", "nope_every") if getattr(config, name)]
    if len(special) > 1:
        raise ConfigError(f"no architecture of Hugging Face has model.{' and model.'.join(special)} together")
    family = {"qk_norm": "qwen3", "qkv_bias": "qwen2", "nope_every": "smollm3"}[special[0]] if special else "llama"
    if family == "llama" and config.width % config.heads:
        raise ConfigError(
            f"Hugging Face's Llama wants a width that is a multiple of the heads, "
            f"got model.width={config.width}, model.heads={config.heads}"
        )
    return family


def write_config(config: ModelConfig, *, vocabulary: int, tied: bool, end: int, dtype: str) -> dict[str, Any]:
    """The config.json of a model of ours as a language model. end: the id that closes a text.

    RoPE stands there in the form that every version of transformers and the servers read.
    """
    family = family_of(config)
    scaling = {"rope_type": "llama3", **asdict(config.rope_scaling)} if config.rope_scaling else None
    data = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": vocabulary,
        "hidden_size": config.width,
        "intermediate_size": config.mlp,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.context_tokens or DEFAULT_CONTEXT,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": None,
        "torch_dtype": dtype,
    }
    if family == "smollm3":
        data["no_rope_layers"] = [int(config.has_rope(i)) for i in range(config.layers)]
    return data


def tensors(config: ModelConfig) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """Every tensor of the layers and the last norm: our name, then theirs with their number of rows. Ours holds
    theirs one after the other. Embedding and head are not among them: their rows are ids."""
    H, G, K, D, M = config.heads, config.kv_heads, config.head_size, config.width, config.mlp
    heads = {"q": H * K, "k": G * K, "v": G * K}
    for i in range(config.layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
            parts = [(f"{theirs}.self_attn.{x}_proj.{kind}", rows) for x, rows in heads.items()]
            yield f"{ours}.attention.qkv.{kind}", parts
        if config.qk_norm:
            for x in "qk":
                yield f"{ours}.attention.{x}_norm.weight", [(f"{theirs}.self_attn.{x}_norm.weight", K)]
        yield f"{ours}.attention.out.weight", [(f"{theirs}.self_attn.o_proj.weight", D)]
        yield f"{ours}.mlp.gate_up.weight", [(f"{theirs}.mlp.{x}_proj.weight", M) for x in ("gate", "up")]
        yield f"{ours}.mlp.down.weight", [(f"{theirs}.mlp.down_proj.weight", D)]
        yield f"{ours}.attention_norm.weight", [(f"{theirs}.input_layernorm.weight", D)]
        yield f"{ours}.mlp_norm.weight", [(f"{theirs}.post_attention_layernorm.weight", D)]
    yield "norm.weight", [("model.norm.weight", D)]
