"""The builder: the length is known beforehand, and learning happens only where the task predicts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmseq.errors import TaskError
from mmseq.sequence import NOTHING, RANGES, SLOTS, Layout, merge_codes, sequence_length, split_codes
from mmseq.tasks import Task
from mmseq.testing import tiny
from mmseq.tokenization.bundle import EpisodeTokens
from mmseq.vocabulary import RANGE_OF_STREAM

SEGMENTS = (
    "text",
    "plan",
    "image",
    "image.front",
    "image@+3",
    "image@end",
    "video[2]",
    "demo[3]",
    "proprio",
    "action[3]",
)
EXTRA = ("action[0.1s]@+2", "progress", "success", "proprio@+1")


def arrows():
    sides = [
        st.lists(st.sampled_from(names), min_size=1, max_size=4).map(", ".join)
        for names in (SEGMENTS + EXTRA, [s for s in SEGMENTS + EXTRA if not s.startswith("demo")])
    ]
    plain = st.tuples(*sides).map(" -> ".join)
    return plain | st.tuples(plain, st.integers(1, 3)).map(lambda x: f"text, ({x[0]}) * {x[1]}")


def worlds():
    """(bundle, tokens) by name: one and two cameras, merged and not, and video without a robot."""
    two = tiny.embodiment("two", ("front", "wrist"))
    lone = tiny.episode(2)
    lone.streams["image.side"] = lone.streams["image.front"]
    out = {}
    for name, merge, robot in (("one", 2, tiny.embodiment()), ("two", 2, two), ("unmerged", 1, two)):
        bundle = tiny.tokenizers((robot,), merge=merge)
        out[name] = (bundle, EpisodeTokens(tiny.episode(1, robot=robot), bundle))
    partial = tiny.episode(3, robot=two)
    del partial.streams["image.wrist"]
    out["lost a camera"] = (bundle, EpisodeTokens(partial, bundle))
    extra = tiny.tokenizers((tiny.embodiment(),))
    out["a camera too many"] = (extra, EpisodeTokens(lone, extra))
    bare = tiny.tokenizers(())
    film = tiny.video(4)
    out["video"] = (bare, EpisodeTokens(film, bare))
    film = tiny.video(5)
    film.streams["image.other"] = film.streams["image.main"]
    out["video of two cameras"] = (bare, EpisodeTokens(film, bare))
    return out


WORLDS = worlds()


@settings(max_examples=400, deadline=None)
@given(arrows(), st.sampled_from(list(WORLDS)), st.integers(0, 1))
def test_the_length_is_known_without_the_data(arrow, world, variant):
    bundle, tokens = WORLDS[world]
    task, builder = Task.parse(arrow), bundle.builder()
    if task.missing(tokens.streams):
        return
    moments = task.moments(len(tokens), tokens.rate_hz)
    now = moments[len(moments) // 2]
    sequence = builder.build(task, tokens, now, variant)
    known = sequence_length(
        task.place(tokens.rate_hz),
        bundle.layout,
        rate_hz=tokens.rate_hz,
        cameras=len(builder.views(tokens.embodiment, tokens.streams)),
        numbered=len(builder.numbered(tokens.embodiment, tokens.streams)) > 1,
        axes={"proprio": 3, "action": 4},
        text_lengths={s: len(tokens.text(s, variant)) for s in ("text", "plan") if s in tokens.streams},
    )
    assert known == len(sequence) == len(sequence.slots)
    assert sequence.slots.min() >= 0
    assert sequence.slots.max() < SLOTS
    # learning: exactly the tokens of predicted segments, each in the range of its stream
    learned = {int(at) + 1: RANGES[r] for at, r in zip(sequence.target_at, sequence.target_range)}
    wanted = {i: RANGE_OF_STREAM[s.stream] for s in sequence.segments if s.predicted for i in range(s.start, s.stop)}
    assert learned == wanted
    for at, name in learned.items():
        assert bundle.vocabulary.range_of(int(sequence.ids[at])) == name


def test_a_final_chunk_beyond_the_end_repeats_the_last_action_and_learns_only_what_was_done():
    bundle, tokens = WORLDS["two"]
    task, end = Task.parse("image -> action[6]"), len(tokens)
    whole = bundle.builder().build(task, tokens, end - 6)
    short = bundle.builder().build(task, tokens, end - 2, pad=True)
    assert len(short) == len(whole)  # packing plans without knowing the moment
    chunk = short.segments[-1]
    codes = bundle.vocabulary.decode("action", short.ids[chunk.start : chunk.stop]).reshape(6, 4)
    assert np.array_equal(codes[:2], tokens.vector("action", end - 2, end))
    assert (codes[2:] == codes[1]).all()
    assert chunk.padding == 4 * 4
    assert short.target_at.tolist() == list(range(chunk.start - 1, chunk.start - 1 + 2 * 4))
    assert len(short.target_range) == 2 * 4
    with pytest.raises(TaskError, match=f"needs steps {end - 2} to {end + 3}"):
        bundle.builder().build(task, tokens, end - 2)


def test_the_header_of_a_segment_says_camera_and_time():
    bundle, tokens = WORLDS["two"]
    sequence = bundle.builder().build(Task.parse("image.wrist -> image.wrist@+3"), tokens, 0)
    names = [bundle.vocabulary.describe(int(i)) for i in sequence.ids]
    assert names[:4] == ["<bos>", "<two>", "<image>", "<camera_1>"]
    given_span, predicted = sequence.segments
    header = names[given_span.stop : predicted.start]
    assert header[:2] == ["<image>", "<camera_1>"]
    assert header[2].startswith("<time_")
    assert names[-1] == "<eos>"
    assert given_span.stop - given_span.start == bundle.layout.frame_tokens // bundle.layout.merge**2
    assert predicted.stop - predicted.start == bundle.layout.frame_tokens


def test_given_vision_is_merged():
    bundle, tokens = WORLDS["two"]
    build = lambda arrow: bundle.builder().build(Task.parse(arrow), tokens, 0)
    assert len(build("image.wrist -> action[2]").patch_at) == bundle.layout.frame_positions(False)
    assert len(build("image.wrist -> image.wrist@+3").patch_at) == bundle.layout.frame_positions(False)


def copies(arrow: str, now: int = 5):
    """Of each predicted vision token in order: the code it may copy, or NOTHING."""
    bundle, tokens = WORLDS["two"]
    sequence = bundle.builder().build(Task.parse(arrow), tokens, now)
    spans = [s for s in sequence.segments if s.predicted and RANGE_OF_STREAM[s.stream] == "vision"]
    found = np.concatenate([sequence.copies[s.start - 1 : s.stop - 1] for s in spans])
    first = bundle.vocabulary.ranges["vision"].start
    return np.where(found == NOTHING, NOTHING, found - first)


@pytest.mark.parametrize(
    ("arrow", "steps"),
    [
        ("text, image -> video[3]", (5, 6, 7)),  # each frame from the one before
        ("image, action[4] -> image@+4", (5,)),
        ("video[3] -> image@+4", (5,)),  # the last of the past
        ("image, image@+6 -> image@+2", (5,)),  # what is before, not what comes after
        ("image@+6 -> image", (11,)),  # unless there is nothing before
        ("image -> image@end, image@+2", (5, 5)),
        ("(image, action[2] -> image@+2) * 2", (5, 7)),
    ],
)
def test_a_predicted_frame_may_copy_the_frame_before(arrow, steps):
    _, tokens = WORLDS["two"]
    by_camera = ["front", "wrist"]
    wanted = []
    segments = Task.parse(arrow).predicted
    for segment, group in zip(segments, np.split(np.array(steps), len(segments))):
        for camera in [segment.camera] if segment.camera else by_camera:
            wanted += [tokens.vision(camera, int(s), int(s) + 1)[0] for s in group]
    assert np.array_equal(copies(arrow), np.concatenate(wanted))


def test_a_frame_of_another_camera_is_not_copied():
    assert (copies("image.front -> image.wrist@+3") == NOTHING).all()
    assert (copies("demo[2] -> image.wrist@+3") == NOTHING).all()


def test_a_camera_outside_the_contract_is_refused():
    bundle, tokens = WORLDS["a camera too many"]
    with pytest.raises(TaskError, match="no camera 'side'"):
        bundle.builder().build(Task.parse("image.side -> text"), tokens, 0)


def test_leaving_the_episode_is_an_error_with_the_steps():
    bundle, tokens = WORLDS["one"]
    with pytest.raises(TaskError, match="needs steps 22 to 25 of an episode of 24 steps"):
        bundle.builder().build(Task.parse("image -> action[4]"), tokens, 22)


def test_a_latent_needs_its_tokenizer():
    bundle, tokens = WORLDS["one"]
    with pytest.raises(TaskError, match="latent-action tokenizer"):
        bundle.builder().build(Task.parse("image -> latent"), tokens, 0)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_merging_is_undone(merge, rows, columns, frames):
    layout = Layout((rows * merge, columns * merge), merge)
    codes = np.arange(frames * layout.frame_tokens).reshape(frames, -1)
    patches = merge_codes(codes, layout)
    assert patches.shape == (frames, layout.frame_positions(False), merge**2)
    assert np.array_equal(split_codes(patches, layout), codes)


def test_neighbours_are_merged():
    assert merge_codes(np.arange(16)[None], Layout((4, 4), 2))[0, 0].tolist() == [0, 1, 4, 5]


def test_a_merge_that_does_not_fit_is_refused():
    with pytest.raises(TaskError, match="does not divide"):
        Layout((5, 4), 2)
    with pytest.raises(TaskError, match="at most 256"):
        Layout((32, 32), 2)
