"""How much memory a rank needs to train, by arithmetic: weights, gradients, optimizer, activations.
It is an estimate from formulas: nothing has been measured on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmseq.model.config import ModelConfig
from mmseq.training.config import TrainConfig
from mmseq.training.flops import layer_parameters

BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's reduce_bucket_size
LIVE_PARAMETERS = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters


@dataclass(frozen=True, kw_only=True)
class MemoryPart:
    """Bytes of one rank, and the formula they come from. on_host: in the machine's memory, not the GPU's."""

    name: str
    size: float
    formula: str
    on_host: bool = False


def rank_memory(
    config: TrainConfig, model: ModelConfig, parameters: int, world: int, settings: Mapping[str, Any], *, cpu: bool
) -> list[MemoryPart]:
    """The parts of one rank's memory at the peak of a step.

    model: with its vocabulary. settings: DeepSpeed's, merged (`engine.deepspeed_settings`). cpu: whether norms
    and attention run without fused kernels. Formulas use P parameters, W ranks, b bytes of a weight.
    """
    stage, P, W = config.deepspeed.zero_stage, parameters, world
    zero = settings.get("zero_optimization", {})
    b = 2 if config.deepspeed.dtype == "bf16" and stage else 4
    bucket = float(zero.get("reduce_bucket_size", BUCKET_ELEMENTS))
    buckets = 2 if zero.get("overlap_comm") and stage < 3 else 1  # one is filled while the other is reduced
    live = min(P, float(zero.get("stage3_max_live_parameters", LIVE_PARAMETERS)))
    host = lambda key: (zero.get(key) or {}).get("device") == "cpu"
    parts = []
    if stage == 3:
        parts += [
            MemoryPart(name="weights", size=b * P / W, formula=f"{b} P / W", on_host=host("offload_param")),
            MemoryPart(name="gathered weights", size=b * live, formula=f"{b} min(P, stage3_max_live_parameters)"),
        ]
    else:
        parts.append(MemoryPart(name="weights", size=b * P, formula=f"{b} P"))
        if config.deepspeed.dtype == "bf16" and not stage:
            parts.append(MemoryPart(name="bf16 copies", size=2 * P, formula="2 P, of autocast"))
    if stage >= 2:
        on_host = host("offload_optimizer")
        parts.append(MemoryPart(name="gradients", size=b * P / W, formula=f"{b} P / W", on_host=on_host))
    else:
        parts.append(MemoryPart(name="gradients", size=b * P, formula=f"{b} P"))
    if stage:
        formula = f"{b * buckets} reduce_bucket_size"
        parts.append(MemoryPart(name="gradient buckets", size=b * buckets * bucket, formula=formula))
    parts.append(_optimizer(config, model, P, W, on_host=host("offload_optimizer")))
    parts.append(_activations(config, model, world, cpu=cpu))
    return parts


def _optimizer(config: TrainConfig, model: ModelConfig, P: int, W: int, *, on_host: bool) -> MemoryPart:
    average = 4 if config.optimizer.average_decay else 0
    note = ", the average of the weights" if average else ""
    if config.deepspeed.zero_stage:
        per = 16 + average
        formula = f"{per} P / W: fp32 weights, two moments, while it steps the gradient{note}"
        return MemoryPart(name="optimizer", size=per * P / W, formula=formula, on_host=on_host)
    if config.optimizer.kind == "muon":
        hidden = model.layers * layer_parameters(model)
        size = 4 * hidden + 8 * (P - hidden) + average * P
        formula = f"4 P in the layers (Muon), 8 P in the rest (Adam's moments){note}"
        return MemoryPart(name="optimizer", size=size, formula=formula)
    return MemoryPart(name="optimizer", size=(8 + average) * P, formula=f"{8 + average} P: two moments{note}")


def _activations(config: TrainConfig, model: ModelConfig, world: int, *, cpu: bool) -> MemoryPart:
    rows = min(config.data.rows_per_pass, max(1, config.data.rows_per_step // config.groups(world)))
    tokens = rows * config.data.row_tokens / max(1, config.deepspeed.sequence_parallel)
    b = 2 if config.deepspeed.dtype == "bf16" else 4
    per, formula = layer_activations(model, config.data.row_tokens, cpu=cpu)
    if model.activation_checkpointing:
        size = b * tokens * (model.layers * model.width + per)
        formula = f"{b} tokens (layers D + {formula})"
    else:
        size = b * tokens * model.layers * per
        formula = f"{b} tokens layers ({formula})"
    return MemoryPart(name="activations", size=size, formula=f"{formula}, {tokens:,.0f} tokens")


def layer_activations(model: ModelConfig, row_tokens: int, *, cpu: bool) -> tuple[float, str]:
    """Numbers that one layer keeps of each token for its way back, and their formula.

    D width, H and G query and key/value heads, K head size, M hidden width of the MLP, L tokens of the
    longest document (of a row here). The inputs of norms and of the first matrices; q, k, v before and after
    their norm, attention's output; the MLP's two halves, the activated one and their product. Without fused
    kernels also the normed vectors, copies of q, k, v by document, and the attention weights.
    """
    D, H, G, K, M = model.width, model.heads, model.kv_heads, model.head_size, model.mlp
    fused = 4 * D + 3 * (H + G) * K + 4 * M
    if not cpu:
        return fused, "4 D + 3 (H + G) K + 4 M"
    return fused + 2 * D + 2 * (H + G) * K + H * row_tokens, "6 D + 5 (H + G) K + 4 M + H L"
