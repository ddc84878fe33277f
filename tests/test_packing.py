"""Packing: every sequence once, rows nearly full, and the same loss as one sequence at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmseq.errors import ConfigError
from mmseq.packing import collate, pack
from mmseq.sequence import RANGES
from mmseq.tasks import Task
from mmseq.testing import tiny
from mmseq.tokenization.bundle import EpisodeTokens


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 100), max_size=200), st.integers(100, 300))
def test_every_sequence_once_and_no_row_too_long(lengths, row_tokens):
    rows = pack(lengths, row_tokens)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= row_tokens for row in rows)
    assert pack(lengths, row_tokens) == rows
    halves = [sum(lengths[i] for i in row) <= row_tokens // 2 for row in rows]
    assert sum(halves) <= 1  # two half-empty rows would have been one


@pytest.mark.parametrize("row_tokens", [1024, 2048])
def test_rows_of_a_demo_like_mix_are_99_percent_full(row_tokens):
    # policy, forward and inverse dynamics, captions: the lengths of 64-token frames, merged and not
    rng = np.random.default_rng(0)
    lengths = rng.choice([110, 150, 152, 95, 340, 610], p=[0.4, 0.2, 0.15, 0.1, 0.1, 0.05], size=4096)
    lengths = lengths + rng.integers(0, 12, size=4096)  # instructions differ in length
    rows = pack(lengths.tolist(), row_tokens)
    assert lengths.sum() / (len(rows) * row_tokens) >= 0.99


def test_a_sequence_longer_than_a_row_is_refused():
    with pytest.raises(ConfigError, match="120 tokens does not fit into a row of 100"):
        pack([4, 120], 100)


ARROWS = [
    "text, image, proprio -> action[4]",
    "image, action[4] -> image@+4",
    "video[2] -> text",
    "text, image -> progress",
]


@pytest.fixture(scope="module")
def world():
    bundle = tiny.tokenizers()
    builder = bundle.builder()
    sequences = [
        builder.build(Task.parse(a), EpisodeTokens(tiny.episode(i), bundle), i + 1) for i, a in enumerate(ARROWS)
    ]
    return bundle, sequences


def test_targets_are_the_next_ids_by_range_and_task(world):
    bundle, sequences = world
    batch = collate(sequences, bundle.vocabulary, tasks=[0, 1, 2, 3], pad_to=600)
    assert batch.tokens == 600
    assert sum(batch.lengths) == 600
    assert batch.used_tokens == sum(map(len, sequences))
    total = 0
    for name, (at, codes, task) in batch.targets.items():
        ids = bundle.vocabulary.ranges[name]
        assert torch.equal(batch.ids[at + 1] - ids.start, codes)
        assert int(codes.max()) < ids.size
        starts = np.cumsum([0, *batch.lengths])
        assert [int(np.searchsorted(starts, int(a), side="right")) - 1 for a in at] == task.tolist()
        total += len(at)
    assert total == sum(len(s.target_at) for s in sequences)
    assert set(batch.targets) <= set(RANGES)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-6)])
def test_packed_and_unpacked_agree_in_loss_and_gradients(world, dtype, tolerance):
    bundle, sequences = world
    model = tiny.model(bundle, attention="document").to(dtype).train()

    def run(batches):
        model.zero_grad()
        count = sum(len(at) for b in batches for at, _, _ in b.targets.values())
        loss = sum(total.double() for b in batches for _, total, _ in model.losses(b).values()) / count
        loss.backward()
        return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    packed, packed_gradients = run([collate(sequences, bundle.vocabulary, pad_to=512)])
    single, gradients = run([collate([s], bundle.vocabulary) for s in sequences])
    assert abs(packed - single) <= tolerance * abs(single)
    assert packed_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        # `embed` also sees the padding token, which no loss depends on
        scale = max(1.0, float(gradient.abs().max()))
        assert float((packed_gradients[name] - gradient).abs().max()) <= tolerance * scale, name
