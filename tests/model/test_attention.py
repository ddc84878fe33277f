"""Attention: every backend equals a dense causal softmax inside each document."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmseq.errors import ConfigError, DependencyError
from mmseq.model import attention
from mmseq.model.attention import BACKENDS, HALF_ONLY, attend, choose_backend, documents_of, why_not

LENGTHS = [1, 5, 17, 16, 33, 70, 2]


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


def test_documents_whose_padded_block_has_as_many_rows_as_they_have_tokens_are_cut_too():
    """Two documents of 2 and 5 tokens: 7 tokens, in a block of 10 places."""
    q, k, v = (x.detach()[:7] for x in inputs(4, 2))
    assert (attend(q, k, v, documents_of([2, 5], "cpu")) - dense(q, k, v, [2, 5])).abs().max() <= 1e-10


def test_each_backend_runs_what_it_is_named_after(monkeypatch):
    called = []
    sdpa = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        attention.F, "scaled_dot_product_attention", lambda *a, **k: called.append("sdpa") or sdpa(*a, **k)
    )

    def packed(name):
        def kernel(q, k, v, bounds, key_bounds, longest, longest_key, **options):
            """What the kernels are given, by the definition: cu_seqlens as int32, and the longest document."""
            assert torch.equal(bounds, key_bounds)
            assert bounds.dtype == torch.int32
            assert longest == longest_key == max(LENGTHS)
            called.append(name)
            return dense(q, k, v, bounds.diff().tolist())

        return kernel

    monkeypatch.setattr(attention, "_flash_attention", lambda: packed("flash"))
    monkeypatch.setattr(attention, "_varlen_attention", lambda: packed("varlen"))
    q, k, v = (x.detach() for x in inputs(4, 2))
    for backend, wanted in (("document", set()), ("sdpa", {"sdpa"}), ("flash", {"flash"}), ("varlen", {"varlen"})):
        called.clear()
        found = attend(q, k, v, documents_of(LENGTHS, "cpu"), backend)
        assert (found - dense(q, k, v, LENGTHS)).abs().max() <= 1e-10
        assert set(called) == wanted


def run(backend, device="cpu", dtype=torch.float32):
    """Output and gradients of attention over `LENGTHS`, in fp32 on the CPU. Skips where the backend cannot run."""
    missing = why_not(backend, device)
    if missing:
        pytest.skip(f"{backend} needs {missing}")
    given = [x.detach().to(device, dtype).requires_grad_() for x in inputs(4, 2)]
    found = attend(*given, documents_of(LENGTHS, device), backend)
    gradients = torch.autograd.grad((found.float() * found.float().detach().cos()).sum(), given)
    return [x.detach().float().cpu() for x in (found, *gradients)]


def reference():
    given = inputs(4, 2)
    found = dense(*given, LENGTHS)
    return [x.detach().float() for x in (found, *torch.autograd.grad((found * found.detach().cos()).sum(), given))]


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "flex"])
def test_backends_agree_forward_and_backward(backend):
    for mine, theirs in zip(run(backend), reference(), strict=True):
        assert (mine - theirs).abs().max() <= 1e-5


def test_flex_agrees_forward_and_refuses_to_train_on_a_cpu():
    with torch.no_grad():
        found = attend(*(x.float() for x in inputs(4, 2)), documents_of(LENGTHS, "cpu"), "flex")
    assert (found - reference()[0]).abs().max() <= 1e-5
    with pytest.raises(ConfigError, match="flex attention backend cannot train on a CPU"):
        run("flex")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_agree_on_a_gpu(backend):
    half = backend in HALF_ONLY
    for mine, theirs in zip(run(backend, "cuda", torch.bfloat16 if half else torch.float32), reference(), strict=True):
        assert (mine - theirs).abs().max() <= (5e-2 if half else 2e-3)


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
    for name, what in (
        ("flash", "a GPU and the flash-attn package"),
        ("varlen", "a GPU of compute capability 8.0 or later"),
    ):
        with pytest.raises(DependencyError, match=f"the {name} attention backend needs {what}"):
            choose_backend("cpu", name)


def test_the_choice_on_a_gpu_is_what_is_installed_and_what_it_can_do(monkeypatch):
    capability = lambda *of: monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: of)
    flash = lambda kernel: monkeypatch.setattr(attention, "_flash_attention", lambda: kernel)
    varlen = lambda kernel: monkeypatch.setattr(attention, "_varlen_attention", lambda: kernel)
    capability(8, 0), flash(None), varlen(len)
    assert choose_backend("cuda") == ("flex", "flash-attn is not installed; FlexAttention is part of torch")
    assert [why_not(name, "cuda") for name in BACKENDS] == [None] * 3 + ["a GPU and the flash-attn package", None]
    flash(len)
    assert choose_backend("cuda") == ("flash", "flash-attn imports")
    assert choose_backend("cuda", half=False) == ("flex", "flash-attn has no fp32")
    assert choose_backend("cpu")[0] == "document"
    assert [why_not(name, "cuda") for name in BACKENDS] == [None] * 5
    assert why_not("flash", "cpu") == "a GPU and the flash-attn package"
    capability(7, 5)
    assert why_not("varlen", "cuda") == "a GPU of compute capability 8.0 or later"
    varlen(None)
    assert [why_not(name, "cuda") for name in BACKENDS] == [None] * 4 + ["torch 2.10 or later"]


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_without_fp32_is_refused_where_it_is_needed(monkeypatch, name):
    monkeypatch.setattr(attention, "why_not", lambda backend, device: None)
    assert choose_backend("cuda", name) == (name, "requested")
    if name in HALF_ONLY:
        with pytest.raises(ConfigError, match=f"the {name} attention backend has no fp32"):
            choose_backend("cuda", name, half=False)
    else:
        assert choose_backend("cuda", name, half=False) == (name, "requested")


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 700), min_size=1, max_size=12))
def test_flex_blocks_are_those_of_the_whole_mask(lengths):
    from torch.nn.attention.flex_attention import create_block_mask

    documents = documents_of(lengths, "cpu")
    of = documents.document_of_token
    size = len(of)
    dense = create_block_mask(lambda b, h, q, k: (q >= k) & (of[q] == of[k]), None, None, size, size, device="cpu")
    mask = documents.flex_mask
    assert torch.equal(mask.to_dense(), dense.to_dense())
    for indices in (mask.kv_indices, mask.full_kv_indices):  # beyond those that count, too
        assert ((indices >= 0) & (indices < -(-size // 128))).all()

    def whole(mask):
        pairs = zip(mask.full_kv_num_blocks[0, 0], mask.full_kv_indices[0, 0])
        return [sorted(indices[:count].tolist()) for count, indices in pairs]

    mine, theirs = whole(mask), whole(dense)
    assert mine[:-1] == theirs[:-1]  # the last block may go beyond the line
    assert set(mine[-1]) <= set(theirs[-1]) or size % 128
