"""Readout: from hidden states to the codes that the model would answer with.

One rule for decoding at temperature 0 and for validation, which the tokenizer of a range names: the median of codes
that have an order, such as bins, since its expected absolute error is least; the medoid of codes that look alike, of
frames; of a number the mean; else the likeliest.

The medoid is the code that is most alike to all codes, weighted by how likely they are: the choice of least Bayes risk.
Where a model is sure that a robot's arm is somewhere, and unsure which of many codes of the arm it is, the likeliest
single code is the background's: codes chosen so paint the arm over (docs/log.md).

Axes: N positions, D width, C codes of a range.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmseq.model.range_loss import GPU_TILE_ELEMENTS, TILE_ELEMENTS, add_copies

TILE_ROWS = 64  # at least so many rows of logits at once, for matrix products that are worth their start


def best_codes(
    logits_NC: Float[Tensor, "N C"], readout: str, features_CF: Float[Tensor, "C F"] | None = None
) -> Int[Tensor, " N"]:
    """The median, the medoid or the likeliest code. features_CF: of every code, rows of unit length, for the medoid."""
    if readout == "medoid":
        assert features_CF is not None
        features_CF = features_CF.float()
        return (logits_NC.softmax(-1) @ features_CF @ features_CF.t()).argmax(-1)
    if readout == "median":
        return (logits_NC.softmax(-1).cumsum(-1) < 0.5).sum(-1).clamp_max(logits_NC.shape[-1] - 1)
    return logits_NC.argmax(-1)


def mean_codes(logits_NC: Float[Tensor, "N C"]) -> Float[Tensor, " N"]:
    """The mean code under the model: what a scalar is predicted to be."""
    share_NC = logits_NC.softmax(-1)
    return (share_NC * torch.arange(share_NC.shape[-1], device=share_NC.device)).sum(-1)


@torch.no_grad()
def read_codes(
    hidden_ND: Float[Tensor, "N D"],
    weight_CD: Float[Tensor, "C D"],
    readout: str,
    copies: tuple[Int[Tensor, " N"], Float[Tensor, " N"]] | None = None,
    features_CF: Float[Tensor, "C F"] | None = None,
) -> Tensor:
    """The code of each position (N,): `mean_codes` or `best_codes`. Of N x C logits a tile is alive.

    copies: as for `range_loss`. features_CF: as for `best_codes`.
    """
    elements = TILE_ELEMENTS if hidden_ND.device.type == "cpu" else GPU_TILE_ELEMENTS
    rows = max(TILE_ROWS, elements // len(weight_CD))
    out = []
    for first in range(0, len(hidden_ND), rows):
        part = slice(first, first + rows)
        logits_NC = (hidden_ND[part] @ weight_CD.t()).float()
        if copies is not None:
            logits_NC = add_copies(logits_NC, copies[0][part], copies[1][part])
        out.append(mean_codes(logits_NC) if readout == "mean" else best_codes(logits_NC, readout, features_CF))
    return torch.cat(out) if out else torch.zeros(0, device=hidden_ND.device)
