"""The transformer's weights: how they begin, and what the vectors of codes are made of."""

import pytest
import torch

from mmseq.model import transformer
from mmseq.model.transformer import EMBED_STD, OWN, SHARED, SLOT_STD, Transformer
from mmseq.packing import collate
from mmseq.tasks import Task
from mmseq.testing import tiny
from mmseq.tokenization.bundle import EpisodeTokens


def batch_of(model):
    tokens = EpisodeTokens(tiny.episode(0), model.tokenizers)
    arrow = Task.parse("text, image -> image@+2, action[2]")
    return collate([model.tokenizers.builder().build(arrow, tokens, 3)], model.vocabulary)


@pytest.fixture(scope="module")
def model():
    return tiny.model(width=64, mlp=256, layers=3, tie_embeddings=False)


@pytest.mark.parametrize(
    ("merge", "more", "parts"),
    [
        (2, {}, {"slots", "merge", "copied", "copy_gate"}),
        (1, {}, {"slots", "copied", "copy_gate"}),
        (2, {"copying": False, "slot_embeddings": False, "tie_embeddings": False}, {"merge", "head"}),
    ],
)
def test_a_model_has_the_parts_that_it_is_configured_with_and_all_of_them_learn(merge, more, parts):
    model = tiny.model(tiny.tokenizers(merge=merge), **more).train()
    always = {"embed", "layers", "norm", "code_projection"}
    assert {name.split(".")[0] for name, _ in model.transformer.named_parameters()} == always | parts
    model.losses(batch_of(model))["vision"][1].backward()
    for name, weight in model.transformer.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.any(), name


def test_weights_begin_with_the_spread_that_keeps_a_deep_residual_in_bounds(model):
    plain = Transformer(model.config)
    plain.initialise(0)
    wanted = {"embed.weight": EMBED_STD, "slots.weight": SLOT_STD, "copy_gate.weight": 0.0}
    assert abs(EMBED_STD - 0.0283) < 1e-4
    for name, weight in plain.named_parameters():
        if weight.dim() < 2:
            assert (weight == 1).all(), name  # norms
            continue
        std = wanted.get(name, weight.shape[1] ** -0.5)
        if name.endswith(("attention.out.weight", "mlp.down.weight")):
            std /= 6**0.5  # two residual outputs in each of three layers
        assert weight.std().item() == pytest.approx(std, rel=0.15), name
        assert abs(weight.mean()) <= 0.15 * std, name


def test_a_code_is_mostly_what_it_shares_and_a_little_of_its_own(model):
    """Vectors keep the length that they begin with: 0.9^2 + 0.4^2 is about 1."""
    t = model.transformer
    shared = t.code_vectors()
    assert (shared[0] == 0).all()
    used = t.code_features[1:].any(1)
    own = t.embed.weight[-len(used) :][used]
    assert own.std().item() == pytest.approx(OWN * EMBED_STD, rel=0.15)
    assert shared[1:][used].std().item() == pytest.approx(SHARED * EMBED_STD, rel=0.25)
    assert (shared[1:][~used] == 0).all()


def test_only_the_rows_of_codes_are_added_to(model):
    t = model.transformer
    codes, total = t.code_vectors(), model.config.vocabulary
    first = total - len(codes) + 1  # the id of the first code
    for start, stop in ((0, 5), (first - 3, first), (0, first)):
        assert torch.equal(t.output_rows(start, stop, codes), t.head.weight[start:stop])
    for start, stop in ((first, first + 1), (first, total), (total - 2, total)):
        wanted = t.head.weight[start:stop] + codes[start - first + 1 : stop - first + 1]
        assert torch.equal(t.output_rows(start, stop, codes), wanted)
        assert torch.equal(t.output_rows(start, stop, None), t.head.weight[start:stop])
    ids = torch.tensor([0, first - 1, first, total - 1])
    embedded = t.embed_tokens(ids, codes) - t.embed.weight[ids]
    torch.testing.assert_close(embedded, codes[[0, 0, 1, len(codes) - 1]], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("asked", "training", "times"), [(True, True, 2), (True, False, 0), (False, True, 0)])
def test_activations_are_made_again_only_where_it_is_asked_for_and_gradients_are_taken(
    monkeypatch, asked, training, times
):
    model, called = tiny.model(activation_checkpointing=asked).train(training), []
    original = transformer.checkpoint
    monkeypatch.setattr(transformer, "checkpoint", lambda *a, **k: called.append(1) or original(*a, **k))
    model.losses(batch_of(model))
    assert len(called) == times  # once for each layer
