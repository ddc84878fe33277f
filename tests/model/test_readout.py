"""The code that is answered: the median of bins, the medoid of frames, the mean of scalars, else the likeliest."""

import pytest
import torch

from mmseq.model import readout
from mmseq.model.range_loss import add_copies


def test_bins_have_a_median_and_others_a_likeliest_code():
    logits = torch.tensor([[0.3, 0.05, 0.25, 0.4], [0.6, 0.2, 0.1, 0.1]]).log()
    assert readout.best_codes(logits, "median").tolist() == [2, 0]
    assert readout.best_codes(logits, "likeliest").tolist() == [3, 0]
    torch.testing.assert_close(readout.mean_codes(logits), torch.tensor([1.75, 0.7]))


def test_the_medoid_is_what_most_of_the_probability_is_alike_to():
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 0.995], [-0.1, 0.995], [-1.0, 0.0]])
    features = features / features.norm(dim=1, keepdim=True)
    background, arm = (
        0.4,
        0.2,
    )  # one code of the background is likelier than any of the arm's, which are likelier together
    share = torch.tensor([[background, arm, arm, arm, 0.0], [0.9, 0.05, 0.05, 0.0, 0.0]])
    found = readout.best_codes(share.log(), "medoid", features).tolist()
    assert readout.best_codes(share.log(), "likeliest").tolist() == [0, 0]
    assert found[0] in (1, 2, 3)
    assert found[1] == 0
    for row, code in zip(share, found):
        alike = [sum(p * float(a @ b) for p, b in zip(row, features)) for a in features]
        assert code == max(range(5), key=alike.__getitem__)


@pytest.mark.parametrize(
    ("how", "copied"),
    [
        ("likeliest", False),
        ("likeliest", True),
        ("median", False),
        ("mean", False),
        ("medoid", False),
        ("medoid", True),
    ],
)
def test_tiles_of_rows_change_nothing(monkeypatch, how, copied):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(150, 8, generator=generator), torch.randn(40, 8, generator=generator)
    codes, gate = torch.randint(0, 40, (150,), generator=generator), torch.randn(150, generator=generator).exp()
    copies = (codes, gate) if copied else None
    logits = hidden @ weight.t()
    if copies is not None:
        logits = add_copies(logits, codes, gate)
    features = torch.nn.functional.normalize(torch.randn(40, 5, generator=generator), dim=1)
    expected = readout.mean_codes(logits) if how == "mean" else readout.best_codes(logits, how, features)
    monkeypatch.setattr(readout, "TILE_ELEMENTS", 1)
    torch.testing.assert_close(readout.read_codes(hidden, weight, how, copies, features), expected)
    assert readout.read_codes(hidden[:0], weight, how, None, features).shape == (0,)
