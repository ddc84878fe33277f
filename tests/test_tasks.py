"""The arrow grammar: what is written is what is meant, and a mistake is shown where it is."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mmseq.errors import TaskError
from mmseq.grammar import ALIASES, Duration, DurationRange, Group, Segment, parse_offset
from mmseq.streams import STREAMS, lacking
from mmseq.tasks import Task
from mmseq.testing import tiny
from mmseq.tokenization.bundle import EpisodeTokens

names = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True)
steps = st.integers(1, 4096).map(lambda n: Duration(float(n)))
seconds = st.decimals("0.0001", "4096", places=4).filter(bool).map(lambda d: Duration(float(d), seconds=True))
durations = st.one_of(steps, seconds)


@st.composite
def segments(draw, predicted: bool, durations=durations, streams=None):
    every = [name for name, row in STREAMS.items() if row.predicted or not predicted] + ["force", "gaze"]
    segment = Segment(draw(st.sampled_from(streams or every)), predicted)
    row, camera, length, offset = segment.row, None, None, None
    if row.kind.cameras and streams is None:
        camera = draw(st.none() | names)
    if row.length != "no":
        length = draw(durations if row.length == "must" else st.none() | durations)
    if row.timed:
        past = durations.map(lambda d: Duration(-d.value, d.seconds)) if not predicted else st.nothing()
        end = st.just("end") if segment.stream == "image" else st.nothing()
        offset = draw(st.none() | durations | past | ranges(durations, predicted) | end)
    return Segment(segment.stream, predicted, camera, length, offset)


@st.composite
def ranges(draw, durations, predicted: bool):
    low, high = sorted((draw(durations), draw(durations)), key=lambda d: d.value)
    assume(low.seconds == high.seconds and low.value < high.value)
    if predicted or draw(st.booleans()):
        return DurationRange(low, high)
    return DurationRange(*(Duration(-d.value, d.seconds) for d in (high, low)))


@st.composite
def tasks(draw, durations=durations, streams=None):
    given_side = draw(st.lists(segments(False, durations, streams), max_size=4))
    if draw(st.booleans()):
        side = draw(st.lists(segments(True, durations, streams), min_size=1, max_size=3))
        return Task((*given_side, *side))
    inner = draw(st.lists(segments(False, durations, streams), max_size=2))
    inner += draw(st.lists(segments(True, durations, streams), min_size=1, max_size=2))
    assume(not any(isinstance(s.offset, DurationRange) for s in inner))
    return Task((*given_side, Group(tuple(inner), draw(st.integers(1, 6)))))


@settings(max_examples=300, deadline=None)
@given(tasks())
def test_a_written_task_parses_to_itself(task):
    assert Task.parse(str(task)) == task


def test_a_demonstration_is_only_given():
    with pytest.raises(TaskError, match="a demonstration is given, not predicted"):
        Task.parse("text -> demo[8]")


@pytest.mark.parametrize(("name", "arrow"), ALIASES.items())
def test_a_name_is_its_arrow(name, arrow):
    task = Task.parse(name)
    assert task == Task.parse(arrow)
    assert task.alias == name
    assert Task.parse(str(task)) == task


def test_the_same_shape_with_other_lengths_keeps_its_name():
    assert Task.parse("text, image, proprio -> action[3]").alias == "policy"
    assert Task.parse("image, action[0.4s] -> image@+0.4s").alias == "forward_dynamics"
    assert Task.parse("image.wrist -> action[3]").alias is None


@pytest.mark.parametrize(
    ("text", "column", "says"),
    [
        ("imge -> action[4]", 1, "Did you mean 'image'"),
        ("image -> action", 16, "needs a length"),
        ("image -> action[0]", 17, "outside"),
        ("image -> action[1.5]", 17, "expected a number"),
        ("image, -> action[4]", 8, "expected a stream"),
        ("image -> text -> plan", 15, "second arrow"),
        ("text[4] -> image", 5, "takes no length"),
        ("proprio.left -> image", 8, "no cameras"),
        ("text@+4 -> image", 5, "no offset"),
        ("action[4]@end -> text", 1, "only image"),
        ("image, text", 1, "nothing is predicted"),
        ("image ? text", 7, "unexpected"),
        ("(image -> action[1]) * 0", 24, "repeat count"),
        ("(image -> action[1]) * 8 -> text", 26, "arrow after a group"),
        ("((image -> text) * 2 -> text) * 2", 2, "group inside"),
        ("policy -> image", 1, "whole task"),
        ("", 1, "found 'the end'"),
        ("image -> image@-3", 10, "does not lie in the past"),
        ("image -> image@-3..-1", 10, "does not lie in the past"),
        ("image@3 -> text", 7, "expected '+' or '-'"),
        ("image@+5..2 -> text", 7, "no range of offsets"),
        ("image@+2..2 -> text", 7, "no range of offsets"),
        ("image@-1..3 -> text", 11, "expected '+' or '-'"),  # +3 or -3: nobody knows
        ("image@-10..1 -> text", 12, "expected '+' or '-'"),
        ("image@+1..0.5s -> text", 7, "no range of offsets"),
        ("(image@+1..3 -> action[1]) * 2", 28, "range of offsets inside a group"),
        ("actions -> text", 1, "Did you mean 'action'"),
        ("force.left -> text", 6, "no cameras"),
    ],
)
def test_a_mistake_is_shown_where_it_is(text, column, says):
    with pytest.raises(TaskError) as caught:
        Task.parse(text)
    assert f"column {column}:" in str(caught.value), str(caught.value)
    assert says in str(caught.value)


def test_places_follow_the_definitions():
    place = lambda arrow: [(p.start, p.stop) for p in Task.parse(arrow).place(10.0)]
    assert place("image, action[4] -> image@+4") == [(0, 1), (0, 4), (4, 5)]
    assert place("video[3] -> video[2]") == [(-2, 1), (1, 3)]
    assert place("text, image -> action[0.5s]") == [(None, None), (0, 1), (0, 5)]
    assert place("(image -> action[2]) * 3") == [(0, 1), (0, 2), (2, 3), (2, 4), (4, 5), (4, 6)]


@pytest.fixture(scope="module")
def filled():
    bundle = tiny.tokenizers()
    tokens = EpisodeTokens(tiny.episode(length=14), bundle)
    codes, other = tokens.codes("image.front", 0, 14), tokens.codes  # encoded once: the builder asks thousands of times
    tokens.codes = lambda stream, start, stop, variant=0: (
        codes[start:stop] if stream == "image.front" else other(stream, start, stop, variant)
    )
    return tokens, bundle.builder()


@pytest.mark.parametrize("pad", [False, True])
@settings(max_examples=100, deadline=None)
@given(
    tasks(
        st.integers(1, 6).map(lambda n: Duration(float(n))),
        ("text", "image", "video", "proprio", "action", "progress", "success"),
    )
)
def test_moments_are_exactly_those_at_which_the_sequence_can_be_built(filled, pad, task):
    tokens, builder = filled

    def fits(now: int) -> bool:
        try:
            builder.build(task, tokens, now, pad=pad)
        except TaskError:
            return False
        return True

    moments = task.moments(len(tokens), tokens.rate_hz, pad=pad)
    timed = any(p.start is not None for p in task.place(tokens.rate_hz))
    inside = range(len(tokens))
    assert list(moments) == [now for now in inside if not timed or fits(now)]


def test_a_name_that_no_stream_has_is_a_further_vector_of_some_robot():
    task = Task.parse("force[4], tactile@-2, image -> action[4]")
    assert task.missing(["image.front", "action", "tactile"]) == ["force"]
    assert [(p.start, p.stop) for p in task.place(10.0)][:2] == [(-3, 1), (-2, -1)]
    assert Task.parse("image -> force[4]").place(10.0)[1].start == 1  # what is observed and predicted follows now
    assert Task.parse("image, motion[4] -> action[4]").place(10.0)[1].start == 0  # what is commanded begins with it


def test_a_range_of_offsets_stays_inside_the_episode():
    task = Task.parse("image, image@+2..10 -> action[3]")
    assert task.moments(30, 10.0) == range(0, 28)
    assert task.offsets_within(3, 30, 10.0) == [range(2, 11)]
    assert task.offsets_within(25, 30, 10.0) == [range(2, 5)]
    assert task.offsets_within(27, 30, 10.0) == [range(2, 3)]
    past = Task.parse("image@-8..-2, image -> text")
    assert past.moments(30, 10.0) == range(2, 30)
    assert past.offsets_within(5, 30, 10.0) == [range(-5, -1)]
    assert past.offsets_within(20, 30, 10.0) == [range(-8, -1)]
    assert Task.parse("image, image@+0.2s..1s -> text").offsets_within(0, 30, 10.0) == [range(2, 11)]
    assert Task.parse("image, image@+2..10, image@-3..-1 -> text").offsets_within(9, 13, 10.0) == [
        range(2, 4),
        range(-3, 0),
    ]


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize(
    "arrow",
    ["image -> action[4]@+2..6", "image, proprio[3]@+1..6 -> action[1]", "image -> proprio[2]@+1..4, action[1]"],
)
def test_the_offsets_inside_an_episode_are_those_with_which_the_task_has_room(arrow, pad):
    task, length = Task.parse(arrow), 12
    (segment,) = task.ranged
    for now in range(length):
        moments = {o: task.with_offsets([o]).moments(length, 10.0, pad=pad) for o in segment.offset.steps(10.0)}
        (found,) = task.offsets_within(now, length, 10.0, pad=pad)
        assert list(found) == [offset for offset, inside in moments.items() if now in inside]


def test_a_segment_spans_its_steps_or_the_one_that_is_now_or_the_last():
    spans = lambda arrow: [p.span(3, 10) for p in Task.parse(arrow).place(10.0)]
    assert spans("text, image@end, video[2] -> image@+2, action[4]") == [(3, 4), (9, 10), (2, 4), (5, 6), (3, 7)]


@pytest.mark.parametrize(
    ("arrow", "streams", "left"),
    [
        ("text, image, proprio -> action[4]", ["text", "proprio"], "image -> action[4]"),
        ("text, image -> text, action[4]", ["text"], "image -> text, action[4]"),
        ("text, image -> action[4]", ["plan"], "text, image -> action[4]"),
        ("text -> action[4]", ["text"], "text -> action[4]"),  # something must be given
        ("text, (image -> action[4]) * 2", ["text"], "text, (image -> action[4]) * 2"),
    ],
)
def test_a_task_goes_without_what_is_given_while_something_is_left(arrow, streams, left):
    assert str(Task.parse(arrow).without(streams)) == left


def test_a_stream_is_named_on_its_side_of_the_arrow():
    task = Task.parse("text, image -> text, action[4]")
    named = lambda stream: [task.names(stream), task.names(stream, given=True), task.names(stream, given=False)]
    assert named("text") == [True, True, True]
    assert named("image") == [True, True, False]
    assert named("action") == [True, False, True]
    assert named("plan") == [False, False, False]


def test_a_range_is_drawn_from_before_anything_is_predicted():
    task = Task.parse("image, image@+2..10 -> action[3]")
    assert str(task.with_offsets([7])) == "image, image@+7 -> action[3]"
    assert str(task.nearest(10.0)) == "image, image@+2 -> action[3]"
    assert str(Task.parse("image@-8..-2 -> text").nearest(10.0)) == "image@-2 -> text"
    assert str(task.middle(10.0)) == "image, image@+6 -> action[3]"
    task.middle(10.0).require_fixed()
    with pytest.raises(TaskError, match=r"leaves open which offset image@\+2..10 means.*image@\+2"):
        task.require_fixed()


@pytest.mark.parametrize(("text", "steps"), [("+16", 16), ("-3", -3), ("+0.4s", 4), ("-0.01s", -1)])
def test_an_offset_alone_is_read_like_one_in_an_arrow(text, steps):
    assert parse_offset(text).steps(10.0) == steps


@pytest.mark.parametrize("text", ["16", "+1..3", "+1,", "+"])
def test_an_offset_alone_is_one_offset(text):
    with pytest.raises(TaskError):
        parse_offset(text)


@pytest.mark.parametrize(
    ("arrow", "shorter"),
    [
        ("text, (image, proprio -> action[8]) * 3", "text, (image, proprio -> action[4]) * 3"),
        ("video[8], image@-9 -> action[2], image@+16", "video[4], image@-9 -> action[2], image@+4"),
        ("video[0.3s], proprio[2.5s] -> image@+1s", "video[0.3s], proprio[0.4s] -> image@+0.4s"),
        ("image, image@+2..10 -> action[4]", "image, image@+2..4 -> action[4]"),
        ("image, image@+6..10 -> text", "image, image@+4 -> text"),
        ("proprio[0.38s], image@-2 -> action[4]", "proprio[0.38s], image@-2 -> action[4]"),  # four steps already
    ],
)
def test_a_task_is_cut_to_what_an_episode_has_room_for(arrow, shorter):
    assert str(Task.parse(arrow).at_most(4, 10.0)) == shorter


def test_missing_names_what_an_episode_lacks():
    task = Task.parse("text, image.wrist, proprio -> action[4]")
    assert task.missing(["text", "image.front"]) == ["image.wrist", "proprio", "action"]
    assert task.missing(["text", "image.wrist", "proprio"], given_only=True) == []


@pytest.mark.parametrize(
    ("trained", "asked", "covered"),
    [
        ("image@-3..-1, image -> action[2]", "image@-2, image -> action[2]", True),
        ("image@-3..-1, image -> action[2]", "image@-3..-1, image -> action[2]", True),
        ("image@-3..-1, image -> action[2]", "image@-3, image -> action[2]", True),
        ("image@-3..-1, image -> action[2]", "image@-1, image -> action[2]", True),
        ("image@-3..-1, image -> action[2]", "image@-4, image -> action[2]", False),
        ("image@+2..3, image -> action[2]", "image@+4, image -> action[2]", False),
        ("image.front@+2..3 -> action[2]", "image.wrist@+2 -> action[2]", False),
        ("image@-3..-1, image -> action[2]", "(image, image -> action[2]) * 1", False),
        ("image@-3..-1, image -> action[2]", "image@-2, image -> action[4]", False),
        ("image@+0.1s..1s -> text", "image@+0.5s -> text", True),
        ("image@+0.1s..1s -> text", "image@+1 -> text", False),
        ("image@+1..9 -> text", "image, image@+2 -> text", False),
    ],
)
def test_an_offset_out_of_a_range_is_the_same_task(trained, asked, covered):
    assert Task.parse(trained).covers(Task.parse(asked)) == covered


def test_a_chunk_of_any_commands_ends_a_task_and_moves_a_group_on():
    assert str(Task.parse("image -> motion[8]").final_chunk) == "motion[8]"
    assert Task.parse("image -> motion").final_chunk is None  # one value is no chunk
    assert Task.parse("image -> proprio[8]").final_chunk is None
    assert Task.parse("(image -> motion[4]) * 3").stride(10.0) == 4
    assert [p.start for p in Task.parse("(image -> motion[4]) * 3").place(10.0)] == [0, 0, 4, 4, 8, 8]
    assert list(Task.parse("image -> motion[4]").moments(6, 10.0, pad=True)) == [0, 1, 2, 3, 4, 5]


def test_what_is_lacking_comes_with_what_there_is():
    there = ["force", "image.wrist", "image.front", "text"]
    assert lacking(["forse"], there) == "forse (did you mean 'force'? There is force, image.front, image.wrist, text)"
    assert lacking(Task.parse("image.wrst -> text").missing(there), there).startswith(
        "image.wrst (did you mean 'image.wr"
    )
    assert lacking(["motion", "plan"], ["text"]) == "motion, plan (there is text)"  # spelled as they should be
    assert lacking(["proprio"], []) == "proprio (there is nothing)"
    for stream in ("action[2]", "forse[2]"):
        with pytest.raises(TaskError, match=r"has no .*there is image.main, progress, success, text|has no forse"):
            tiny.model().predict(f"{stream}, image -> text", tiny.video(), t=3)


def test_a_repetition_takes_as_long_as_its_longest_chunk():
    assert Task.parse("text, (image, proprio -> action[2], motion[5]) * 3").stride(20) == 5
    assert Task.parse("text, (image, proprio -> action[5], motion[2]) * 3").stride(20) == 5
    assert Task.parse("text, (image, proprio[8] -> action[2]) * 3").stride(20) == 2  # what is observed moves nothing on
    assert Task.parse("text, (image -> motion) * 3").stride(20) == 1
