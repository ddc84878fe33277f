"""The order of data: a pure function of seed and position, fair to the weights, blind to the number of workers."""

import collections
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmseq.data import mixture as mixture_module
from mmseq.data.mixture import (
    DataState,
    MixConfig,
    Mixture,
    RowOrder,
    SourceConfig,
    TaskConfig,
    held_out,
    least_holdout,
    load_mix,
)
from mmseq.data.moments import permute
from mmseq.data.tokens import write_token_shards
from mmseq.errors import ConfigError, DataError, FingerprintError, TaskError
from mmseq.testing import tiny
from mmseq.training.loader import steps

TASKS = {"text, image, proprio -> action[4]": 3.0, "image, action[4] -> image@+4": 1.0, "video[2] -> text": 2.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokens")
    bundle = tiny.tokenizers()
    robots = [tiny.episode(i, length=12 + i) for i in range(14)]
    write_token_shards(robots, root / "robot", bundle, name="robot")
    write_token_shards([tiny.video(i, length=10) for i in range(9)], root / "video", bundle, name="video")
    return root, bundle


def make(world, *, split="train", seed=0, row_tokens=256, weights=TASKS, **changes):
    root, bundle = world
    settings = {
        "sources": {"robot": SourceConfig(path="robot", weight=3.0), "video": SourceConfig(path="video")},
        "tasks": [TaskConfig(task=t, weight=w) for t, w in weights.items()],
        "holdout": 0.3,
    }
    return Mixture(MixConfig(**(settings | changes)), root, bundle, row_tokens=row_tokens, seed=seed, split=split)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(mixture_module, "BLOCK_SAMPLES", 240)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 600), st.integers(-(2**70), 2**70))
def test_permute_is_a_bijection(size, key):
    assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


def test_permute_scatters():
    order = [permute(i, 10_000, 3) for i in range(2000)]
    assert abs(np.corrcoef(np.arange(2000), order)[0, 1]) < 0.1
    assert order != [permute(i, 10_000, 4) for i in range(2000)]


def rows(mixture, count, state=None):
    return RowOrder(mixture, state).take(count)


def test_the_order_is_a_function_of_the_seed(world):
    assert rows(make(world), 60) == rows(make(world), 60)
    assert rows(make(world), 60) != rows(make(world, seed=1), 60)


def test_the_longest_sequence_of_a_stream_is_found(tmp_path):
    bundle = tiny.tokenizers()
    episodes = [replace(tiny.episode(i, length=4 + i), texts=["go"] * (i % 3 + 1)) for i in range(9)]
    episodes[2] = replace(episodes[2], texts=["put the red one far behind the small blue one"])  # too short to be used
    episodes[7] = replace(episodes[7], texts=["go", "put the red one away", "stop"])
    write_token_shards(episodes, tmp_path / "robot", bundle, name="robot")
    mixture = make((tmp_path, bundle), weights={"text -> image@+7": 1}, sources={"robot": SourceConfig()}, holdout=0.0)
    (stream,) = mixture.moments
    lengths = {len(mixture.build(stream.sample(k, seed=3))) for k in range(400)}
    longest = stream.longest()
    assert longest.length == len(mixture.build(longest)) == max(lengths) > min(lengths)
    assert longest.episode == 7


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_world_size_reads_the_same_rows(world, world_size):
    mixture = make(world)
    reference = rows(make(world), 24)
    streams = [
        steps(mixture, DataState(), rows_per_step=8, rows_per_pass=2, rank=r, world=world_size, prefetch=1)
        for r in range(world_size)
    ]
    for step in range(3):
        parts = [next(s) for s in streams]
        assert len({(p.state.block, p.state.row) for p in parts}) == 1
        wanted = reference[8 * step : 8 * step + 8]
        for rank, part in enumerate(parts):
            assert part.samples == [s for row in wanted for s in row]
            own = [mixture.build(s).ids for row in wanted[rank::world_size] for s in row]
            found = np.concatenate([b.input.ids[: b.used_tokens].numpy() for b in part.batches])
            np.testing.assert_array_equal(found, np.concatenate(own))
    for stream in streams:
        stream.close()


def test_it_resumes_from_any_state(world):
    order = RowOrder(make(world))
    states, taken = [], []
    for size in (1, 3, 7, 2, 40, 5, 60, 11):
        states.append(order.state)
        taken.append(order.take(size))
    for i, state in enumerate(states):
        again = RowOrder(make(world), DataState(state.block, state.row))
        assert [again.take(len(part)) for part in taken[i:]] == taken[i:]
    assert states[-1].block > 0  # a boundary between blocks was crossed


def test_an_epoch_visits_every_moment_once(world):
    for stream in make(world).moments:
        for epoch in range(2):
            visits = [stream.sample(epoch * len(stream) + k, 0) for k in range(len(stream))]
            moments = {(s.episode, s.now) for s in visits}
            assert len(moments) == len(stream)
            assert moments == {(s.episode, s.now) for s in map(stream.moment, range(len(stream)))}
        first = [stream.sample(k, 0).now for k in range(len(stream))]
        assert first != [stream.sample(len(stream) + k, 0).now for k in range(len(stream))]


def test_a_policy_sees_the_last_moments_of_its_episodes(world):
    mixture = make(world)
    policy, dynamics, _ = (next(s for s in mixture.moments if s.task_index == i) for i in range(3))
    lengths = {e: int(mixture.shards["robot"].plan.lengths[e]) for e in {s.episode for s in drawn(policy)}}
    assert {(s.episode, s.now) for s in drawn(policy)} == {(e, t) for e, n in lengths.items() for t in range(n)}
    assert max(s.now - lengths[s.episode] for s in drawn(dynamics)) == -5
    last = next(s for s in drawn(policy) if s.now == lengths[s.episode] - 1)
    built = mixture.build(last)
    assert len(built) == last.length
    axes = (built.segments[-1].stop - built.segments[-1].start) // 4
    assert built.segments[-1].padding == 3 * axes
    assert len(built.target_at) == axes


def drawn(stream):
    return [stream.moment(i) for i in range(len(stream))]


def test_blocks_keep_the_weights_and_lose_nothing(world):
    mixture = make(world)
    counts = collections.Counter(s.moments for b in range(4) for row in mixture.block(b) for s in row)
    total = 4 * mixture_module.BLOCK_SAMPLES
    assert abs(sum(counts.values()) - total) <= len(mixture.moments)
    for stream, weight in zip(mixture.moments, mixture.weights):
        assert abs(counts[stream.index] - total * weight) <= 0.5 + 1e-9
    by_task = collections.Counter()
    for stream, weight in zip(mixture.moments, mixture.weights):
        by_task[stream.task_index] += weight
    np.testing.assert_allclose([by_task[i] for i in range(3)], np.array([3, 1, 2]) / 6)
    # `video[2] -> text` can be filled by both sources, 3 to 1
    caption = {s.source: w for s, w in zip(mixture.moments, mixture.weights) if s.task_index == 2}
    assert caption["robot"] / caption["video"] == pytest.approx(3)


def test_the_samples_of_a_stream_go_on_across_blocks(world):
    mixture = make(world)
    stream = mixture.moments[0]
    seen = [s for b in range(3) for row in mixture.block(b) for s in row if s.moments == stream.index]
    key = lambda s: (s.episode, s.now, s.variant)
    assert sorted(map(key, seen)) == sorted(key(stream.sample(k, 0)) for k in range(len(seen)))


def test_lengths_are_known_and_rows_fit(world):
    mixture = make(world)
    for row in mixture.block(0)[:20]:
        assert sum(s.length for s in row) <= 256
        for sample in row:
            assert len(mixture.build(sample)) == sample.length


def test_held_out_episodes_are_never_trained_on(world):
    train, holdout = make(world), make(world, split="holdout")
    seen = {(s.source, s.episode) for b in range(3) for row in train.block(b) for s in row}
    kept = {(s.source, m.episode) for s in holdout.moments for m in map(s.moment, range(len(s)))}
    assert kept
    assert not seen & kept
    for source, episode in kept:
        assert held_out(f"{source}/{train.shards[source].plan.ids[episode]}", 0.3)


def test_more_data_moves_no_episode_across():
    ids = [f"robot/episode-{i}" for i in range(4000)]
    small, large = {i for i in ids if held_out(i, 0.1)}, {i for i in ids if held_out(i, 0.2)}
    assert small < large
    assert 0.08 < len(small) / len(ids) < 0.12


def test_weighting_by_frames_follows_the_moments(world):
    mixture = make(world, weighting="frames", weights={"video[2] -> text": 1.0})
    sizes = np.array([len(s) * {"robot": 3, "video": 1}[s.source] for s in mixture.moments])
    np.testing.assert_allclose(mixture.weights, sizes / sizes.sum())


def test_the_moments_of_a_task_and_a_source_are_numbered_by_their_places_in_the_mix(world):
    """Their order hangs on the number, so what another task or source can fill must not change it."""
    numbers = {(m.task_index, m.source): m.index for m in make(world).moments}
    assert numbers == {(0, "robot"): 0, (1, "robot"): 2, (2, "robot"): 4, (2, "video"): 5}


def test_a_source_of_no_weight_is_not_drawn_from(world):
    sources = {"robot": SourceConfig(path="robot"), "video": SourceConfig(path="video", weight=0)}
    assert {m.source for m in make(world, sources=sources).moments} == {"robot"}
    with pytest.raises(ConfigError, match="video: its weight is 0"):
        make(world, sources=sources, tasks=[TaskConfig(task="video[2] -> text", sources=["video"])])


def test_a_task_draws_from_the_sources_that_it_names_and_is_called_by_its_name(world):
    mixture = make(world, tasks=[TaskConfig(task="video[2] -> text", name="caption", sources=["robot"])])
    assert [(row["task"], row["source"]) for row in mixture.shares()] == [("caption", "robot")]
    assert mixture.provenance(mixture.block(0)[0][0]).startswith("caption at step ")


def test_a_holdout_without_moments_is_empty_and_one_without_weights_is_refused(world):
    empty = make(world, split="holdout", holdout=0.0)
    assert (empty.moments, empty.weights) == ([], [])
    for split, arrow in (("holdout", "video[2] -> text"), ("train", "text, image -> video[500]")):
        with pytest.raises(ConfigError, match="all weights are zero, or no task with a weight can be filled"):
            make(world, split=split, weights={arrow: 0.0})


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 15, 16, 20, 40])
def test_the_least_holdout_of_a_small_source_is_a_few_episodes(count):
    for trial in range(20):
        ids = [f"{trial}/episode-{i}" for i in range(count)]
        share = least_holdout(ids)
        kept = sum(held_out(i, share) for i in ids)
        wanted = max(1, min(count // 4, 4))
        assert kept == wanted or (1 <= kept < wanted and share >= 0.4)
        assert share <= 0.4 or kept == 1


def test_a_task_of_no_weight_need_not_be_filled(world):
    mixture = make(world, weights={"video[2] -> text": 1.0, "text, image -> video[500]": 0.0})
    assert {m.task_index for m in mixture.moments} == {0}
    with pytest.raises(ConfigError, match="no episode can fill the task"):
        make(world, weights={"video[2] -> text": 1.0, "text, image -> video[500]": 0.1})


def test_shares_add_up(world):
    shares = make(world).shares()
    assert sum(r["samples"] for r in shares) == pytest.approx(1)
    assert sum(r["tokens"] for r in shares) == pytest.approx(1)
    assert {r["source"] for r in shares if r["task"] == "policy"} == {"robot"}
    few = make(world, tasks=[TaskConfig(task="video[5] -> text", sources=["video"])])
    (row,), (moments,) = few.shares(), few.moments
    assert 1 < len(moments) < 64  # which is how many are looked at of more
    assert row["tokens_per_sample"] == pytest.approx(np.mean([s.length for s in drawn(moments)]))


def test_a_step_knows_where_its_samples_came_from(world):
    mixture = make(world)
    options = {"rows_per_step": 4, "rows_per_pass": 2, "prefetch": 1, "world": 2}
    halves = [next(steps(mixture, DataState(), rank=r, **options)) for r in (0, 1)]
    step = halves[0]
    assert step.slot_tokens == 512
    assert step.samples == halves[1].samples
    assert sum(half.used_tokens for half in halves) == sum(s.length for s in step.samples)
    named = mixture.provenance(step.samples[0])
    assert "at step" in named
    assert "/tiny-" in named or "/video-" in named


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"sources": {}}, ConfigError, "no sources"),
        ({"tasks": []}, ConfigError, "no tasks"),
        ({"weighting": "heavy"}, ConfigError, "as_given or frames"),
        ({"holdout": 1.0}, ConfigError, "holdout"),
        ({"sources": {"robt": SourceConfig(path="x")}}, DataError, "no token shards"),
        ({"tasks": [TaskConfig(task="image -> acton[2]")]}, TaskError, "unknown stream"),
        ({"tasks": [TaskConfig(task="image -> text", sources=["vdeo"])]}, ConfigError, "did you mean 'video'"),
        (
            {"tasks": [TaskConfig(task="image -> action[2]", sources=["video"])]},
            ConfigError,
            r"video: no action \(there is image",
        ),
        ({"tasks": [TaskConfig(task="image.frnt -> text")]}, ConfigError, "no image.frnt .did you mean 'image.front'"),
        (
            {"tasks": [TaskConfig(task="forse[2], image -> text")]},
            ConfigError,
            "robot: no forse .there is action, image",
        ),
        ({"tasks": [TaskConfig(task="image -> action[400]")]}, ConfigError, "episodes of at most"),
        ({"tasks": [TaskConfig(task="policy"), TaskConfig(task="policy")]}, ConfigError, "two tasks are named"),
        ({"tasks": [TaskConfig(task="image -> text", weight=0)]}, ConfigError, "all weights are zero"),
        ({"tasks": [TaskConfig(task="image -> text", weight=-1)]}, ConfigError, "negative"),
        ({"tasks": [TaskConfig(task="image -> text", sources=[])]}, ConfigError, "Name each source once"),
        ({"tasks": [TaskConfig(task="image -> text", sources=["video"] * 2)]}, ConfigError, "Name each source once"),
        ({"holdout": -0.1}, ConfigError, r"holdout must be in \[0, 1\)"),
        ({"sources": {"video": SourceConfig(holdout=1.0)}}, ConfigError, r"sources.video.holdout must be in \[0, 1\)"),
        ({"sources": {"video": SourceConfig(weight=-1)}}, ConfigError, "sources.video.weight must not be negative"),
        ({"sources": {"video": SourceConfig(weight=float("inf"))}}, ConfigError, "sources.video.weight.*got inf"),
        ({"tasks": [TaskConfig(task="image -> text", weight=float("nan"))]}, ConfigError, "got nan"),
        ({"tasks": [TaskConfig(task="image -> text", weight=float("inf"))]}, ConfigError, "got inf"),
    ],
)
def test_a_mix_that_cannot_work_says_why(world, changes, error, says):
    with pytest.raises(error, match=says):
        make(world, **changes)


def test_a_sequence_longer_than_a_row_is_refused(world):
    with pytest.raises(ConfigError, match="does not fit into a row of 32"):
        make(world, row_tokens=32).block(0)


def test_shards_of_other_tokenizers_are_refused(world):
    root, _ = world
    with pytest.raises(FingerprintError, match="Tokenize again"):
        make((root, tiny.tokenizers(seed=5)))


def test_a_mix_file_is_strict(tmp_path):
    (tmp_path / "mix.yaml").write_text("sources: {a: {path: b, wieght: 2}}\ntasks: [{task: policy}]\n")
    with pytest.raises(ConfigError, match=r"sources.a.wieght.*did you mean 'weight'"):
        load_mix(tmp_path / "mix.yaml")


def test_the_share_of_chunks_that_are_learned_at_once(world):
    task = TaskConfig(task="image, proprio -> action[4]", parallel=0.5)
    mixture = make(world, tasks=[task])
    drawn = [s for row in rows(mixture, 400) for s in row]
    visible = [s.visible for s in drawn if s.visible is not None]
    assert len(visible) / len(drawn) == pytest.approx(0.5, abs=0.03)
    counts = np.bincount(visible) / len(visible)
    assert counts == pytest.approx([0.625, 0.125, 0.125, 0.125], abs=0.04)
    assert rows(make(world, tasks=[task]), 9) == rows(mixture, 9)
    hidden = next(s for s in drawn if s.visible == 1)
    sequence = mixture.build(hidden)
    assert len(sequence) == hidden.length
    assert len(sequence.masked) == 3 * 4 - 1
    whole = make(world, tasks=[TaskConfig(task=task.task)])
    assert all(s.visible is None for row in rows(whole, 20) for s in row)


@pytest.mark.parametrize(
    ("arrow", "share", "message"),
    [("image -> text", 0.5, "does not end with action"), ("image -> action[2]", 1.5, r"must be in \[0, 1\]")],
)
def test_what_cannot_be_learned_at_once_is_refused(world, arrow, share, message):
    with pytest.raises(ConfigError, match=message):
        make(world, tasks=[TaskConfig(task=arrow, parallel=share)])
