"""The range loss is the full-vocabulary cross entropy with every id of other ranges masked out."""

import weakref

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


def arguments(*, dtype=torch.float32, copying=True):
    """hidden (37, 24), weight (90, 24), targets of 20 codes, and what may be copied."""
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    hidden, weight, gate = (x.requires_grad_() for x in (make(37, 24), make(90, 24), make(37)))
    target, copied = torch.randint(0, 20, (2, 37), generator=generator)
    return hidden, weight, target, (copied, gate) if copying else None


def plain(hidden, weight, target, start, stop, z_weight, copies):
    """nats (N,) and the sum that is minimised, by `full_vocabulary` with the gate added to its logits."""
    if copies is None:
        nats, loss = full_vocabulary(hidden, weight, target, start, stop, z_weight)
    else:  # a gate is a coordinate more: one-hot of the copied code in the weight, its gate in the hidden state
        eye = torch.zeros(len(weight), stop - start, dtype=weight.dtype)
        eye[torch.arange(start, stop), torch.arange(stop - start)] = 1
        more = F.one_hot(copies[0], stop - start) * copies[1][:, None]
        nats, loss = full_vocabulary(
            torch.cat([hidden, more], 1), torch.cat([weight, eye], 1), target, start, stop, z_weight
        )
    return nats, loss.sum()


@pytest.fixture(params=[512, 1, 7])
def tiles(request, monkeypatch):
    """Columns of a tile: one tile, one for each code, and a last one that is smaller."""
    monkeypatch.setattr(range_loss, "TILE_ELEMENTS", 1)
    monkeypatch.setattr(range_loss, "TILE_COLUMNS", request.param)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("copying", [False, True])
@pytest.mark.parametrize("z_weight", [0.0, 1e-3])
def test_loss_and_gradients_equal_the_masked_full_vocabulary(z_weight, copying):
    hidden, weight, target, copies = arguments(copying=copying)
    nats, total = range_loss.range_loss(hidden, weight[30:50], target, z_weight, copies)
    wanted, wanted_total = plain(hidden, weight, target, 30, 50, z_weight, copies)
    torch.testing.assert_close(nats, wanted.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total, wanted_total, rtol=1e-5, atol=1e-5)
    assert not nats.requires_grad
    inputs = (hidden, weight, *([copies[1]] if copies else []))
    mine = torch.autograd.grad(3 * total, inputs)
    theirs = torch.autograd.grad(3 * wanted_total, inputs)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert (mine[1][:30] == 0).all()
    assert (mine[1][50:] == 0).all()


@pytest.mark.parametrize(("columns", "times"), [(512, 1), (7, 6)])
def test_a_tile_is_made_once_where_it_is_the_only_one(monkeypatch, columns, times):
    monkeypatch.setattr(range_loss, "TILE_ELEMENTS", 1)
    monkeypatch.setattr(range_loss, "TILE_COLUMNS", columns)
    made, logits = [], range_loss._Tile.logits
    monkeypatch.setattr(range_loss._Tile, "logits", lambda *given: made.append(1) or logits(*given))
    hidden, weight, target, copies = arguments()
    range_loss.range_loss(hidden, weight[:20], target, 1e-3, copies)
    assert len(made) == times


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("autocast", [False, True])
def test_in_bf16_it_is_as_exact_as_its_factors(autocast):
    """Halves are multiplied, under autocast or because the arguments are; what is summed over tiles is fp32."""
    hidden, weight, target, (copied, gate) = arguments(dtype=torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight, gate)]
    wanted_nats, wanted = plain(exact[0], exact[1], target, 30, 50, 1e-3, (copied, exact[2]))
    given = [x.detach().float().requires_grad_() for x in exact] if autocast else [hidden, weight, gate]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        nats, total = range_loss.range_loss(given[0], given[1][30:50], target, 1e-3, (copied, given[2]))
    assert (nats.dtype, total.dtype) == (torch.float32, torch.float32)
    assert float((nats - wanted_nats.detach()).abs().max()) <= 0.1  # of logits up to 20
    for mine, theirs in zip(torch.autograd.grad(total, given), torch.autograd.grad(wanted, exact), strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) <= 0.01


class Storage(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the bytes of the tensors that are made and alive."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = 0, 0
        self.known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        before = {
            x.untyped_storage()._cdata
            for x in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(x, torch.Tensor)
        }
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.known | before:
                storage = x.untyped_storage()
                self.known.add(storage._cdata)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return out

    def gone(self, key, size):
        self.known.discard(key)
        self.alive -= size


def test_at_most_a_hundredth_of_the_logits_is_alive(monkeypatch):
    """Beside the gradients of hidden states and weight. `mmseq bench loss` measures the process at full size."""
    monkeypatch.setattr(range_loss, "TILE_ELEMENTS", 1)
    N, V, D = 512, 150_000, 8
    hidden, weight = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    with Storage() as storage:
        _, total = range_loss.range_loss(hidden, weight, torch.arange(N), 1e-4)
        total.backward()
    assert storage.peak - (N + V) * D * 4 <= N * V * 4 / 100
    assert storage.peak > (N + V) * D * 4  # it sees what is made


def test_without_gradients_none_are_made(monkeypatch):
    hidden, weight, target, copies = arguments()
    seen = []
    original = range_loss._loss
    monkeypatch.setattr(range_loss, "_loss", lambda *a, **k: seen.append(original(*a, **k)) or seen[-1])
    with torch.no_grad():
        nats, total = range_loss.range_loss(hidden, weight[:20], target, 1e-3, copies)
    assert seen[0][2] == ()
    assert not total.requires_grad
    again = range_loss.range_loss(hidden, weight[:20], target, 1e-3, copies)
    assert torch.equal(nats, again[0])
    assert torch.equal(total, again[1])


def test_no_positions_give_zero_and_zero_gradients():
    """A rank without such targets runs the same steps, or the others would wait for it."""
    hidden, weight, target, (copied, gate) = arguments()
    nats, total = range_loss.range_loss(hidden[:0], weight, target[:0], 1e-3, (copied[:0], gate[:0]))
    assert nats.shape == (0,)
    assert total == 0
    for gradient in torch.autograd.grad(total, (hidden, weight, gate)):
        assert (gradient == 0).all()


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
    for name, (nats, total, task) in out.items():
        at, codes, tasks = batch.targets[name]
        ids = bundle.vocabulary.ranges[name]
        wanted = full_vocabulary(hidden[at], weight, codes, ids.start, ids.stop, model.config.z_loss)
        torch.testing.assert_close(nats, wanted[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(total, wanted[1].sum(), rtol=1e-5, atol=1e-5)
        assert torch.equal(task, tasks)


@pytest.mark.usefixtures("tiles")
def test_what_may_be_copied_has_its_logit_raised():
    hidden, weight, target, (copied, gate) = arguments()
    nats, _ = range_loss.range_loss(hidden, weight[:20], target, copies=(copied, gate))
    logits = hidden @ weight[:20].t()
    logits[torch.arange(37), copied] += gate
    torch.testing.assert_close(nats, F.cross_entropy(logits, target, reduction="none").detach())


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
