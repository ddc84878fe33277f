"""The builder: the length is known beforehand, and learning happens only where the task predicts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmseq.errors import TaskError
from mmseq.layout import Layout, merge_codes, sequence_length, split_codes
from mmseq.sequence import NOTHING, Draft
from mmseq.streams import STREAMS, VISION, stream_row
from mmseq.tasks import Task
from mmseq.testing import tiny
from mmseq.tokenization.bundle import EpisodeTokens, Tokenizers

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
EXTRA = ("action[0.1s]@+2", "progress", "success", "proprio@+1", "proprio[2]")
GIVEN = ("image@-2", "image@-0.1s", "proprio[3]@-1", "image@-3..-1", "image@+1..4")


def arrows():
    sides = [
        st.lists(st.sampled_from(names), min_size=1, max_size=4).map(", ".join)
        for names in (SEGMENTS + EXTRA + GIVEN, [s for s in SEGMENTS + EXTRA if not s.startswith("demo")])
    ]
    plain = st.tuples(*sides).map(" -> ".join)
    inner = plain.filter(lambda arrow: ".." not in arrow)  # each repetition of a group has the offsets of the others
    return plain | st.tuples(inner, st.integers(1, 3)).map(lambda x: f"text, ({x[0]}) * {x[1]}")


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
    task = task.middle(tokens.rate_hz)
    moments = task.moments(len(tokens), tokens.rate_hz)
    now = moments[len(moments) // 2]
    sequence = builder.build(task, tokens, now, variant)
    known = sequence_length(
        task.place(tokens.rate_hz),
        bundle.layout,
        cameras=len(builder.views(tokens.embodiment, tokens.streams)),
        numbered=len(builder.numbered(tokens.embodiment, tokens.streams)) > 1,
        axes={"proprio": 3, "action": 4},
        text_lengths={s: len(tokens.codes(s, now, now + 1, variant)) for s in ("text", "plan") if s in tokens.streams},
    )
    line = sequence.input
    assert known == len(sequence) == len(line.slots) == len(line.positions)
    assert line.slots.min() >= 0
    assert line.slots.max() < bundle.layout.slot_rows
    # learning: exactly the tokens of predicted segments, each in the range of its stream
    ranges = list(bundle.vocabulary.ranges)
    learned = {int(at) + 1: ranges[r] for at, r in zip(sequence.target_at, sequence.target_range)}
    predicted = [s for s in sequence.segments if s.predicted]
    wanted = {i: stream_row(s.stream).range for s in predicted for i in range(s.start, s.stop)}
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
    assert np.array_equal(codes[:2], tokens.codes("action", end - 2, end))
    assert (codes[2:] == codes[1]).all()
    assert chunk.padding == 4 * 4
    assert short.target_at.tolist() == list(range(chunk.start - 1, chunk.start - 1 + 2 * 4))
    assert len(short.target_range) == 2 * 4
    with pytest.raises(TaskError, match=f"needs steps {end - 2} to {end + 3}"):
        bundle.builder().build(task, tokens, end - 2)
    with pytest.raises(TaskError, match=f"needs steps {end} to {end} "):  # not even the first is there
        bundle.builder().build(Task.parse("image -> action[6]@+2"), tokens, end - 2, pad=True)


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
    assert len(build("image.wrist -> action[2]").input.patch_at) == bundle.layout.frame_positions(False)
    assert len(build("image.wrist -> image.wrist@+3").input.patch_at) == bundle.layout.frame_positions(False)


def test_given_vision_that_is_not_merged_is_its_codes():
    bundle, tokens = WORLDS["unmerged"]
    sequence = bundle.builder().build(Task.parse("video.front[2], proprio[2] -> action[2]"), tokens, 5)
    film, states, _ = sequence.segments
    assert len(sequence.input.patch_at) == 0
    codes = bundle.vocabulary.decode("vision", sequence.ids[film.start : film.stop]).reshape(2, -1)
    assert np.array_equal(codes, tokens.codes("image.front", 4, 6))
    slots = sequence.input.slots
    assert np.array_equal(slots[film.start : film.stop], bundle.layout.slots("vision", 4, 0, 32))
    assert np.array_equal(slots[states.start : states.stop], bundle.layout.slots("proprio", 3, 0, 6))


class Means:
    """An encoder: the mean colour of each quarter of a frame."""

    kind, positions, features, fingerprint = "means", 4, 3, "means"

    def encode(self, frames):
        return frames.reshape(-1, 2, 8, 2, 8, 3).mean((2, 4)).reshape(-1, 4, 3).astype(np.float32)


def test_what_an_encoder_gives_stands_in_place_of_given_frames_and_is_that_of_their_steps():
    bundle = Tokenizers({**tiny.tokenizers()}, embodiments=(tiny.embodiment(),), encoder=Means())
    episode = tiny.episode(1)
    tokens = EpisodeTokens(episode, bundle)
    arrow = "image@-3, video[2], demo[2], image@end, proprio[2] -> image@+2, action[2]"
    sequence = bundle.builder().build(Task.parse(arrow), tokens, 5)
    past, film, demo, end, *_ = spans = sequence.segments
    steps = [2, 4, 5, 0, 23, 23]
    wanted = Means().encode(episode["image.front"][steps])
    assert [s.stop - s.start for s in spans] == [4, 8, 8, 4, 6, 16, 8]
    line = sequence.input
    assert line.soft_at.tolist() == [i for s in (past, film, demo, end) for i in range(s.start, s.stop)]
    np.testing.assert_allclose(line.soft, wanted.reshape(-1, 3))
    assert len(line.patch_at) == 0
    draft = Draft(bundle.builder(), tokens, 5)
    for segment in Task.parse("image@-3, video[2] -> action[2]").place(tokens.rate_hz)[:2]:
        draft.header(segment, "front")
        draft.content(segment, "front", bundle.builder().codes(segment, "front", tokens, 5, 0))
    for start in (0, past.start, past.start + 1, past.stop, film.start + 5):
        left = line.soft_at[(line.soft_at >= start) & (line.soft_at < film.stop)]
        cut = draft.input(start)  # what is computed from there on, when the rest lies in the cache
        assert cut.soft_at.tolist() == (left - start).tolist()
        np.testing.assert_array_equal(cut.soft, line.soft[12 - len(left) : 12])


def test_cameras_are_those_of_the_contract_where_there_is_one():
    streams = ["image.wrist", "image.side", "text", "image.front"]
    builder = WORLDS["two"][0].builder()
    assert list(builder.numbered("two", streams)) == ["front", "wrist"]
    assert builder.views("two", streams) == ["front", "wrist"]
    assert builder.views("two", streams[1:]) == ["front"]
    for other in ("nobody", None):
        assert builder.views(other, streams) == ["wrist", "side", "front"]
    assert builder.visible("two", streams) == ["text", "image.front", "image.wrist"]


def copies(arrow: str, now: int = 5):
    """Of each predicted vision token in order: the code it may copy, or NOTHING."""
    bundle, tokens = WORLDS["two"]
    sequence = bundle.builder().build(Task.parse(arrow), tokens, now)
    spans = [s for s in sequence.segments if s.predicted and stream_row(s.stream).kind is VISION]
    dense = np.full(len(sequence), NOTHING)
    dense[sequence.input.copy_at] = sequence.input.copy_ids
    found = np.concatenate([dense[s.start - 1 : s.stop - 1] for s in spans])
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
        ("image@+6, image@+3 -> image", (8,)),  # then the first of them
        ("image@-2, image -> image", (3,)),  # not what is of the same step
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
            wanted += [tokens.codes(f"image.{camera}", int(s), int(s) + 1)[0] for s in group]
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
    with pytest.raises(TaskError, match="have 256 slots"):
        Layout((32, 32), 2, flat=True)


def test_every_place_has_its_own_slots():
    """Of chunks of 128 steps by 64 axes, frames of 64 by 64 tokens, and frames that are no squares."""
    for grid in ((64, 64), (8, 24), (3, 5)):
        layout = Layout(grid, 1, ("action", "proprio", "force"))
        uses = {"vision": grid, "next vision": grid, "merged": grid, "action": (128, 64), "next force": (128, 64)}
        taken = []
        for use, (rows, columns) in uses.items():
            slots = layout.slots(use, columns, 0, rows * columns)
            assert len({tuple(pair) for pair in slots.tolist()}) == rows * columns
            row, column = slots.reshape(rows, columns, 2).transpose(2, 0, 1)
            assert (row == row[:, :1]).all()  # a row of places shares a row of the table, a column another
            assert (column == column[:1]).all()
            assert np.array_equal(row[:, 0], row[0, 0] + np.arange(rows))
            assert np.array_equal(column[0], column[0, 0] + np.arange(columns))
            taken.append(set(slots.ravel().tolist()))
        assert all(not a & b for i, a in enumerate(taken) for b in taken[i + 1 :])
        assert max(map(max, taken)) < layout.slot_rows
        assert 0 not in set.union(*taken)  # row 0 is of tokens without a place
    assert layout.slots("text", 7, 0, 7).tolist() == [[0, 0]] * 7


def test_a_predicted_position_has_the_slot_of_the_token_that_it_must_predict():
    bundle, tokens = WORLDS["two"]
    layout, builder = bundle.layout, bundle.builder()
    sequence = builder.build(Task.parse("action[3], proprio -> image.front@+2, action[5]"), tokens, 4)
    given_chunk, state, frame, chunk = sequence.segments
    slots = sequence.input.slots
    assert np.array_equal(slots[given_chunk.start : given_chunk.stop], layout.slots("action", 4, 0, 12))
    assert np.array_equal(slots[state.start : state.stop], layout.slots("proprio", 3, 0, 3))
    assert np.array_equal(slots[frame.start - 1 : frame.stop - 1], layout.slots("next vision", 4, 0, 16))
    assert np.array_equal(slots[chunk.start - 1 : chunk.stop - 1], layout.slots("next action", 4, 0, 20))
    assert (slots[[0, 1, given_chunk.start - 1, state.start - 1, len(slots) - 1]] == 0).all()


def test_slots_from_before_are_one_number_for_each_place():
    layout = Layout((4, 4), 2, ("action", "proprio"), flat=True)
    assert layout.slot_rows == 1 + 7 * 256
    assert layout.slots("vision", 4, 0, 18)[:, 0].tolist() == [*range(1, 17), 1, 2]
    assert layout.slots("merged", 4, 0, 5)[:, 0].tolist() == [257, 258, 259, 260, 257]
    assert layout.slots("next action", 4, 254, 3)[:, 0].tolist() == [1 + 5 * 256 + i for i in (254, 255, 0)]
    with pytest.raises(TaskError, match="action has 65 steps of 4 axes, at most 256 codes"):
        layout.slots("action", 4, 0, 260)
    assert layout.slots("next proprio", 3, 0, 1)[0, 0] == 1 + 6 * 256
    assert layout.slots("text", 1, 0, 2).tolist() == [[0], [0]]
    more = Layout((4, 4), 2, ("action", "proprio", "force"), flat=True)  # which came later, after all others
    assert more.tables | layout.tables == more.tables
    assert more.slots("force", 3, 0, 2)[:, 0].tolist() == [1 + 7 * 256, 2 + 7 * 256]
    assert more.slot_rows == 1 + 9 * 256


@pytest.mark.parametrize(
    ("arrow", "axes", "flat", "says"),
    [
        ("image -> action[256]", 128, False, None),
        ("image -> action[257]", 4, False, "257 steps of 4 axes, at most 256 steps of 128 axes"),
        ("image -> action[2]", 129, False, "2 steps of 129 axes"),
        ("image -> action[16]", 16, True, None),
        ("image -> action[16]", 17, True, "16 steps of 17 axes, at most 256 codes"),
        ("image -> video[300]", 4, True, None),  # each frame begins anew
    ],
)
def test_a_chunk_with_more_places_than_slots_is_refused_before_it_is_built(arrow, axes, flat, says):
    layout = Layout((2, 2), 1, flat=flat)
    length = lambda: sequence_length(
        Task.parse(arrow).place(10.0), layout, cameras=1, numbered=False, axes={"action": axes}, text_lengths={}
    )
    if says is None:
        assert length() > 0
    else:
        with pytest.raises(TaskError, match=says):
            length()


def test_what_is_given_of_the_past_says_so():
    bundle, tokens = WORLDS["one"]
    sequence = bundle.builder().build(Task.parse("image@-4, image, proprio[3] -> action[2]"), tokens, 9)
    past, now, states, _ = sequence.segments
    names = [bundle.vocabulary.describe(int(i)) for i in sequence.ids]
    assert names[2:4] == ["<image>", "<past>"]
    assert names[4] == bundle.vocabulary.describe(bundle.vocabulary.time(4 / 20))
    assert (past.step, now.step, states.step) == (5, 9, 7)
    codes = bundle.vocabulary.decode("proprio", sequence.ids[states.start : states.stop]).reshape(3, 3)
    assert np.array_equal(codes, tokens.codes("proprio", 7, 10))
    merged = bundle.vocabulary.decode("vision", sequence.input.cut(past.start, past.stop).patch_ids)
    assert np.array_equal(split_codes(merged[None], bundle.layout), tokens.codes("image.front", 5, 6))


def test_predicted_states_follow_now():
    bundle, tokens = WORLDS["one"]
    sequence = bundle.builder().build(Task.parse("image -> proprio[2]"), tokens, 9)
    span = sequence.segments[-1]
    codes = bundle.vocabulary.decode("proprio", sequence.ids[span.start : span.stop]).reshape(2, 3)
    assert np.array_equal(codes, tokens.codes("proprio", 10, 12))


def test_masks_hide_what_comes_after_the_visible_steps_and_not_the_last_token():
    bundle, tokens = WORLDS["one"]
    sequence = bundle.builder().build(Task.parse("image -> action[5]"), tokens, 2, visible=2)
    chunk = sequence.segments[-1]
    assert sequence.masked.tolist() == list(range(chunk.start + 2 * 4, chunk.stop - 1))


def test_every_stream_of_the_table_has_a_kind_that_says_its_shape():
    for row in STREAMS.values():
        shape = row.kind.shape(3, 16, 5)
        assert shape in (None, (3, 16), (3, 5), (1,))
