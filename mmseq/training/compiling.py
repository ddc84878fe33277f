"""Compiling: torch.compile for what each layer does before and after attention.

Attention stays as it is: its work depends on where documents end, which is new in every batch and would be compiled
anew, and on a GPU its backends are kernels of their own. The rest of a layer depends on the number of tokens alone,
which is left open, so a whole run compiles each part once for training and once for validation. All layers share it.
"""

from __future__ import annotations

import torch
from torch import nn

from mmseq.errors import DependencyError


def compile_layers(transformer: nn.Module, device: torch.device) -> None:
    """Compile the layers in place, at their first pass; names of weights stay.

    Raises: DependencyError when this machine cannot compile.
    """
    require_compiler(device)
    for layer in transformer.layers:  # type: ignore[union-attr]
        layer.before = torch.compile(layer.before, dynamic=True, fullgraph=True)
        layer.after = torch.compile(layer.after, dynamic=True, fullgraph=True)


def require_compiler(device: torch.device) -> None:
    """Compile one addition. Raises: DependencyError with the reason when that fails."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:  # many kinds, of torch and of the compilers under it
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        needs = "Triton and a C compiler" if device.type == "cuda" else "a C++ compiler and Python's headers"
        raise DependencyError(
            f"compile=true does not work on this machine: {reason}",
            fix=f"install {needs} (on a Debian system: apt install g++ python3-dev), or set compile=false",
        ) from error
