"""Fragments: which piece of each parameter, and of its optimizer state, this rank holds, at every ZeRO stage.

A fragment is a contiguous piece of a flattened parameter, with the tensors that belong to it: the fp32 weight
and what the optimizer keeps (`exp_avg`, `momentum_buffer`, `average`, ...). A checkpoint that is written as
fragments with their addresses can be read by any number of ranks at any stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmseq.errors import ConfigError

WEIGHT = "weight"


@dataclass
class Fragment:
    """Elements start .. start + length - 1 of the flattened parameter `name`.

    tensors: views (length,) into what the engine trains with; writing to them changes it.
    """

    name: str
    start: int
    length: int
    tensors: dict[str, Tensor]


def base_optimizer(engine: Any) -> Any:
    """The optimizer of the recipe, under whatever DeepSpeed laid around it."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def local_fragments(engine: Any, model: nn.Module, *, replicas: bool = False) -> list[Fragment]:
    """What this rank holds of every trained parameter. Together the ranks hold each element once.

    replicas: with what other ranks hold as well, which at ZeRO 0 is everything: who reads must fill all of its own.
    """
    stage = engine.zero_optimization_stage()
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if stage == 0:
        return [_replicated(n, p, engine, whole=replicas) for n, p in named]
    find = _of_flat_groups if stage < 3 else _of_partition
    return [f for f in (find(n, p, engine) for n, p in named) if f is not None and f.length]


def create_states(engine: Any, model: nn.Module, keys: dict[str, set[str]], updates: int) -> None:
    """Give a fresh optimizer its tensors, zero, as if it had made `updates` steps.

    keys: by parameter, what the optimizer keeps of it; under ZeRO 1 to 3 it keeps the same of all.
    """
    base = base_optimizer(engine)
    stage = engine.zero_optimization_stage()
    if stage == 0:
        places = [(p, base.state_of(p), keys.get(n, set())) for n, p in model.named_parameters() if p.requires_grad]
    else:
        flats = _flat_groups(engine) if stage < 3 else engine.optimizer.fp32_partitioned_groups_flat
        places = [(flat, base.state[flat], set().union(*keys.values())) for flat in flats]
    for tensor, state, wanted in places:
        state.update({key: torch.zeros_like(tensor) for key in sorted(wanted)})
        if "exp_avg" in wanted:
            state["step"] = torch.tensor(float(updates))


def refresh_weights(engine: Any) -> None:
    """Bring the weights that the model computes with up to the fp32 weights of the fragments, on all ranks."""
    optimizer = engine.optimizer
    stage = engine.zero_optimization_stage()
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def _flat_groups(engine: Any) -> list[Tensor]:
    """The flat fp32 tensors of this rank that ZeRO 1 or 2 hands to the optimizer, one per group."""
    optimizer = engine.optimizer
    found = getattr(optimizer, "single_partition_of_fp32_groups", None)
    return found if found is not None else optimizer.fp32_groups_flat_partition


def _states(state: dict[str, Any], like: Tensor) -> dict[str, Tensor]:
    """The tensors of an optimizer's state that have an element for each of the parameter's."""
    return {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == like.shape}


def _replicated(name: str, parameter: Tensor, engine: Any, *, whole: bool) -> Fragment:
    """ZeRO 0 holds everything everywhere: each rank answers for its share when it is written."""
    rank, world = (0, 1) if whole else (torch.distributed.get_rank(), torch.distributed.get_world_size())
    size = parameter.numel()
    start, stop = size * rank // world, size * (rank + 1) // world
    tensors = {WEIGHT: parameter.data, **_states(base_optimizer(engine).state_of(parameter), parameter)}
    return Fragment(name, start, stop - start, {k: v.view(-1)[start:stop] for k, v in tensors.items()})


def _of_flat_groups(name: str, parameter: Any, engine: Any) -> Fragment | None:
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    flat = _flat_groups(engine)[mapping.param_group_index]
    place = mapping.get_hp_fragment_address()
    tensors = {WEIGHT: flat.data, **_states(base_optimizer(engine).state[flat], flat)}
    narrowed = {k: v.narrow(0, place.start, place.numel) for k, v in tensors.items()}
    return Fragment(name, mapping.lp_fragment_address.start, place.numel, narrowed)


def _of_partition(name: str, parameter: Any, engine: Any) -> Fragment:
    optimizer = engine.optimizer
    if getattr(optimizer, "swap_optimizer", False):
        raise ConfigError(
            "optimizer state on NVMe cannot be written to a checkpoint", fix="offload to the CPU instead of NVMe"
        )
    group, place, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
    flat = optimizer.fp32_partitioned_groups_flat[group]
    start = optimizer._get_param_partition_rank(parameter) * size
    length = max(0, min(size, parameter.ds_numel - start))  # the last ranks hold padding
    tensors = {WEIGHT: flat.data, **_states(base_optimizer(engine).state[flat], flat)}
    return Fragment(name, start, length, {k: v.narrow(0, place, length) for k, v in tensors.items()})
