"""Packing: every sequence once, rows nearly full, and the same loss as one sequence at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmseq.errors import ConfigError
from mmseq.packing import collate, pack
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
def test_rows_of_a_demo_like_mix_are_full(row_tokens):
    # policy, forward and inverse dynamics, captions: the lengths of 64-token frames, merged and not
    rng = np.random.default_rng(0)
    lengths = rng.choice([110, 150, 152, 95, 340, 610], p=[0.4, 0.2, 0.15, 0.1, 0.1, 0.05], size=4096)
    lengths = lengths + rng.integers(0, 12, size=4096)  # instructions differ in length
    rows = pack(lengths.tolist(), row_tokens)
    assert lengths.sum() / (len(rows) * row_tokens) >= 0.995


def test_rows_of_text_beside_long_video_are_full():
    """Lengths from 20 to 8,000, as many of each magnitude, in one block of a mixture."""
    lengths = np.exp(np.random.default_rng(0).uniform(np.log(20), np.log(8000), 4096)).astype(int)
    rows = pack(lengths.tolist(), 8192)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert lengths.sum() / (len(rows) * 8192) >= 0.995


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([3, 4, 10, 11, 25]) | st.integers(1, 40), min_size=1, max_size=9), st.integers(40, 60))
def test_a_row_is_as_full_as_what_is_left_can_make_it(lengths, row_tokens):
    left = dict(enumerate(lengths))
    for row in pack(lengths, row_tokens):
        longest = max(left.values())
        sums = {longest}
        others = list(left.values())
        others.remove(longest)
        for n in others:
            sums |= {s + n for s in sums}
        assert longest in [lengths[i] for i in row]
        assert sum(lengths[i] for i in row) == max(s for s in sums if s <= row_tokens)
        left = {i: n for i, n in left.items() if i not in row}


def test_many_of_one_length_fill_a_row_by_any_number_of_them():
    for count in range(1, 12):
        row = pack([60] + [7] * 20, 60 + 7 * count + 3)[0]
        assert len(row) == 1 + count


def test_a_sequence_longer_than_a_row_is_refused():
    assert pack([4, 100], 100) == [[1], [0]]  # as long as one
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
        assert torch.equal(batch.input.ids[at + 1] - ids.start, codes)
        assert int(codes.max()) < ids.size
        starts = np.cumsum([0, *batch.lengths])
        assert [int(np.searchsorted(starts, int(a), side="right")) - 1 for a in at] == task.tolist()
        total += len(at)
    assert total == sum(len(s.target_at) for s in sequences)
    assert set(batch.targets) <= set(bundle.vocabulary.ranges)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(ARROWS), st.integers(0, 4), st.integers(1, 12)), min_size=1, max_size=8))
def test_a_row_holds_its_sequences_whole_and_in_order(world, drawn):
    bundle, _ = world
    made = [bundle.builder().build(Task.parse(a), EpisodeTokens(tiny.episode(i), bundle), t) for a, i, t in drawn]
    batch = collate(made, bundle.vocabulary, tasks=list(range(len(made))), pad_to=sum(map(len, made)) + 5)
    found = {name: [] for name in ("target", "patch", "copy")}
    starts = np.cumsum([0, *batch.lengths]).tolist()
    assert batch.lengths == [*map(len, made), 5]
    for number, (sequence, start) in enumerate(zip(made, starts)):
        part = slice(start, start + len(sequence))
        assert batch.input.ids[part].tolist() == sequence.ids.tolist()
        assert batch.input.slots[part].tolist() == sequence.input.slots.tolist()
        assert batch.input.positions[part].tolist() == list(range(len(sequence)))
        found["target"] += [(start + int(at), number) for at in sequence.target_at]
        own = sequence.input
        found["patch"] += [(start + int(at), *map(int, ids)) for at, ids in zip(own.patch_at, own.patch_ids)]
        found["copy"] += [(start + int(at), int(c)) for at, c in zip(own.copy_at, own.copy_ids)]
    targets = [(int(a), int(t)) for at, _, task in batch.targets.values() for a, t in zip(at, task)]
    assert sorted(targets) == sorted(found["target"])
    assert [(int(a), *ids) for a, ids in zip(batch.input.patch_at, batch.input.patch_ids.tolist())] == found["patch"]
    assert list(zip(batch.input.copy_at.tolist(), batch.input.copy_ids.tolist())) == found["copy"]


def test_what_is_hidden_in_one_sequence_is_hidden_there_alone_and_still_learned(world):
    bundle, sequences = world
    task, tokens = Task.parse("image -> action[4]"), EpisodeTokens(tiny.episode(1), bundle)
    hidden = bundle.builder().build(task, tokens, 3, visible=1)
    made = [sequences[0], hidden, sequences[2]]
    batch = collate(made, bundle.vocabulary, pad_to=sum(map(len, made)))
    assert batch.lengths == [*map(len, made)]  # no padding of no tokens
    start, mask = len(made[0]), bundle.vocabulary.structure("<mask>")
    assert (batch.input.ids == mask).nonzero().flatten().tolist() == [start + int(at) for at in hidden.masked]
    at, codes, _ = batch.targets["action"]
    own = (at >= start) & (at < start + len(hidden))
    assert codes[own].tolist() == tokens.codes("action", 3, 7).reshape(-1).tolist()


def losses_and_gradients(model, batches):
    model.zero_grad()
    count = sum(len(at) for b in batches for at, _, _ in b.targets.values())
    loss = sum(total.double() for b in batches for _, total, _ in model.losses(b).values()) / count
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@settings(max_examples=6, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(ARROWS), st.integers(0, 4), st.integers(1, 12)), min_size=2, max_size=6),
    st.integers(0, 40),
    st.sampled_from([torch.float64, torch.float32]),
)
def test_packed_and_unpacked_agree_in_loss_and_gradients(world, drawn, padding, dtype):
    bundle, _ = world
    made = [bundle.builder().build(Task.parse(a), EpisodeTokens(tiny.episode(i), bundle), t) for a, i, t in drawn]
    model = tiny.model(bundle, attention="document").to(dtype).train()
    one = collate(made, bundle.vocabulary, pad_to=sum(map(len, made)) + padding)
    packed, packed_gradients = losses_and_gradients(model, [one])
    single, gradients = losses_and_gradients(model, [collate([s], bundle.vocabulary) for s in made])
    assert abs(packed - single) <= 1e-6 * abs(single)
    assert packed_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        scale = max(1.0, float(gradient.abs().max()))
        assert float((packed_gradients[name] - gradient).abs().max()) <= 1e-6 * scale, name
