"""The range loss is the full-vocabulary cross entropy with every id of other ranges masked out."""

import pytest
import torch
import torch.nn.functional as F

from mmseq.model import range_loss
from mmseq.packing import collate
from mmseq.tasks import Task
from mmseq.testing import tiny
from mmseq.tokenization.bundle import EpisodeTokens

ARROWS = ["text, image, proprio -> action[4]", "image, action[4] -> image@+4", "text, image -> plan, progress, success"]


def full_vocabulary(hidden, weight, target, start, stop, z_weight):
    """The formula as it stands in papers: all logits, then a mask."""
    logits = hidden @ weight.t()
    mask = torch.full_like(logits, float("-inf"))
    mask[:, start:stop] = 0
    logits = logits + mask
    nll = F.cross_entropy(logits, target + start, reduction="none")
    return nll, nll + z_weight * logits.logsumexp(-1).square()


@pytest.mark.parametrize("z_weight", [0.0, 1e-3])
@pytest.mark.parametrize("chunk", [1 << 24, 60])
def test_loss_and_gradients_equal_the_masked_full_vocabulary(monkeypatch, z_weight, chunk):
    monkeypatch.setattr(range_loss, "CHUNK_ELEMENTS", chunk)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 24, generator=generator).requires_grad_()
    weight = torch.randn(90, 24, generator=generator).requires_grad_()
    target = torch.randint(0, 20, (37,), generator=generator)
    found = range_loss.range_losses(hidden, weight[30:50], target, z_weight)
    wanted = full_vocabulary(hidden, weight, target, 30, 50, z_weight)
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    mine = torch.autograd.grad(found[1].sum(), (hidden, weight))
    theirs = torch.autograd.grad(wanted[1].sum(), (hidden, weight))
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert (mine[1][:30] == 0).all()
    assert (mine[1][50:] == 0).all()


def test_the_model_reports_each_range_against_the_full_logits():
    bundle = tiny.tokenizers()
    model = tiny.model(bundle, copying=False)
    builder = bundle.builder()
    sequences = [builder.build(Task.parse(a), EpisodeTokens(tiny.episode(i), bundle), 2) for i, a in enumerate(ARROWS)]
    batch = collate(sequences, bundle.vocabulary, tasks=[0, 1, 2])
    out = model.losses(batch)
    assert set(out) == {"action", "vision", "text", "progress", "success"}
    codes = model.transformer.code_vectors()
    rows = [model.transformer.output_rows(r.start, r.stop, codes) for r in bundle.vocabulary.ranges.values()]
    hidden, weight = model.hidden(batch), torch.cat(rows)
    for name, (nll, loss, task) in out.items():
        at, codes, tasks = batch.targets[name]
        ids = bundle.vocabulary.ranges[name]
        wanted = full_vocabulary(hidden[at], weight, codes, ids.start, ids.stop, model.config.z_loss)
        torch.testing.assert_close(nll, wanted[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(loss, wanted[1], rtol=1e-5, atol=1e-5)
        assert torch.equal(task, tasks)


@pytest.mark.parametrize("chunk", [1 << 24, 60])
def test_what_may_be_copied_has_its_logit_raised(monkeypatch, chunk):
    monkeypatch.setattr(range_loss, "CHUNK_ELEMENTS", chunk)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(37, 24, generator=generator), torch.randn(20, 24, generator=generator)
    target, copied = torch.randint(0, 20, (2, 37), generator=generator)
    gate = torch.randn(37, generator=generator)
    nll, _ = range_loss.range_losses(hidden, weight, target, copies=(copied, gate))
    logits = hidden @ weight.t()
    logits[torch.arange(37), copied] += gate
    torch.testing.assert_close(nll, F.cross_entropy(logits, target, reduction="none"))


def test_copying_reaches_only_predicted_vision():
    bundle = tiny.tokenizers()
    model = tiny.model(bundle)
    build = lambda arrow, i: bundle.builder().build(Task.parse(arrow), EpisodeTokens(tiny.episode(i), bundle), 2)
    batch = collate([build("image -> action[2]", 0), build("image -> image@+2", 1)], bundle.vocabulary)
    before = model.losses(batch)
    with torch.no_grad():
        model.transformer.copy_gate.weight.add_(1.0)
    after = model.losses(batch)
    assert torch.equal(before["action"][0], after["action"][0])
    assert not torch.equal(before["vision"][0], after["vision"][0])
