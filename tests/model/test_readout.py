"""The code that is answered: the median of bins, the mean of scalars, the likeliest of everything else."""

import pytest
import torch

from mmseq.model import readout
from mmseq.model.range_loss import add_copies


def test_bins_have_a_median_and_others_a_likeliest_code():
    logits = torch.tensor([[0.3, 0.05, 0.25, 0.4], [0.6, 0.2, 0.1, 0.1]]).log()
    assert readout.best_codes(logits, "median").tolist() == [2, 0]
    assert readout.best_codes(logits, "likeliest").tolist() == [3, 0]
    torch.testing.assert_close(readout.mean_codes(logits), torch.tensor([1.75, 0.7]))


@pytest.mark.parametrize(
    ("how", "copied"), [("likeliest", False), ("likeliest", True), ("median", False), ("mean", False)]
)
def test_tiles_of_rows_change_nothing(monkeypatch, how, copied):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(150, 8, generator=generator), torch.randn(40, 8, generator=generator)
    codes, gate = torch.randint(0, 40, (150,), generator=generator), torch.randn(150, generator=generator).exp()
    copies = (codes, gate) if copied else None
    logits = hidden @ weight.t()
    if copies is not None:
        logits = add_copies(logits, codes, gate)
    expected = readout.mean_codes(logits) if how == "mean" else readout.best_codes(logits, how)
    monkeypatch.setattr(readout, "TILE_ELEMENTS", 1)
    torch.testing.assert_close(readout.read_codes(hidden, weight, how, copies), expected)
    assert readout.read_codes(hidden[:0], weight, how).shape == (0,)
