"""Attention: every backend equals a dense causal softmax inside each document."""

import pytest
import torch

from mmseq.errors import ConfigError, DependencyError
from mmseq.model.attention import attend, choose_backend, documents_of

LENGTHS = [1, 5, 17, 16, 33, 2]


def dense(q, k, v, lengths):
    """The definition, one document and head at a time."""
    out, start = torch.empty_like(q), 0
    for n in lengths:
        for h in range(q.shape[1]):
            g = h // (q.shape[1] // k.shape[1])
            a, b, c = q[start : start + n, h], k[start : start + n, g], v[start : start + n, g]
            scores = (a @ b.t() / q.shape[2] ** 0.5).masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf"))
            out[start : start + n, h] = scores.softmax(-1) @ c
        start += n
    return out


def inputs(heads, groups, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    make = lambda n: torch.randn(sum(LENGTHS), n, 16, generator=generator, dtype=dtype).requires_grad_()
    return make(heads), make(groups), make(groups)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("backend", ["document", "sdpa"])
def test_it_is_a_dense_causal_softmax_in_each_document(backend, heads, groups):
    q, k, v = inputs(heads, groups)
    found = attend(q, k, v, documents_of(LENGTHS, "cpu"), backend)
    wanted = dense(q, k, v, LENGTHS)
    assert (found - wanted).abs().max() <= 1e-10
    weight = torch.randn_like(found)
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), (q, k, v), retain_graph=True),
        torch.autograd.grad((wanted * weight).sum(), (q, k, v)),
    ):
        assert (a - b).abs().max() <= 1e-9


def test_flex_agrees():
    q, k, v = (x.detach() for x in inputs(4, 2, torch.float32))
    found = attend(q, k, v, documents_of(LENGTHS, "cpu"), "flex")
    assert (found - dense(q, k, v, LENGTHS)).abs().max() <= 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["document", "sdpa", "flex", "flash"])
def test_backends_agree_on_a_gpu(backend):
    q, k, v = (x.detach().cuda() for x in inputs(4, 2, torch.float32))
    try:
        choose_backend("cuda", backend)
    except DependencyError as error:
        pytest.skip(str(error))
    kind = torch.bfloat16 if backend == "flash" else torch.float32
    found = attend(q.to(kind), k.to(kind), v.to(kind), documents_of(LENGTHS, "cuda"), backend).float().cpu()
    assert (found - dense(q.cpu(), k.cpu(), v.cpu(), LENGTHS)).abs().max() <= (2e-2 if backend == "flash" else 2e-3)


def test_documents_do_not_see_each_other_or_the_future():
    q, k, v = (x.detach() for x in inputs(4, 2))
    documents = documents_of(LENGTHS, "cpu")
    before = attend(q, k, v, documents)
    at = 1 + 5 + 8  # inside the third document
    v = v.clone()
    v[at] += 100
    after = attend(q, k, v, documents)
    changed = (after - before).abs().amax((1, 2)) > 1e-9
    assert changed.nonzero().flatten().tolist() == list(range(at, 1 + 5 + 17))


def test_the_choice_says_why():
    assert choose_backend("cpu")[0] == "document"
    assert "CPU" in choose_backend("cpu")[1]
    assert choose_backend("cpu", "sdpa") == ("sdpa", "requested")
    with pytest.raises(ConfigError, match="Use auto or one of"):
        choose_backend("cpu", "xformers")
    with pytest.raises(DependencyError, match="flash"):
        choose_backend("cpu", "flash")
