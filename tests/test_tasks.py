"""The arrow grammar: what is written is what is meant, and a mistake is shown where it is."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmseq.errors import TaskError
from mmseq.tasks import ALIASES, NEEDS_LENGTH, SCALAR_STREAMS, TEXT_STREAMS, Duration, Group, Segment, Task
from mmseq.testing import tiny
from mmseq.tokenization.bundle import EpisodeTokens

names = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True)
steps = st.integers(1, 4096).map(lambda n: Duration(float(n)))
seconds = st.decimals("0.0001", "4096", places=4).filter(bool).map(lambda d: Duration(float(d), seconds=True))
durations = st.one_of(steps, seconds)


@st.composite
def segments(draw, predicted: bool, durations=durations, streams=None):
    every = ("text", "plan", "image", "video", "proprio", "action", "progress", "latent")
    stream = draw(st.sampled_from(streams or (every if predicted else (*every, "demo"))))
    camera = draw(st.none() | names) if stream in ("image", "video", "demo") and streams is None else None
    length = draw(durations) if stream in NEEDS_LENGTH else None
    offset = None
    if stream not in (*TEXT_STREAMS, "demo"):
        offset = draw(st.none() | durations | (st.just("end") if stream == "image" else st.nothing()))
    return Segment(stream, predicted, camera, length, offset)


@st.composite
def tasks(draw, durations=durations, streams=None):
    given_side = draw(st.lists(segments(False, durations, streams), max_size=4))
    if draw(st.booleans()):
        side = draw(st.lists(segments(True, durations, streams), min_size=1, max_size=3))
        return Task((*given_side, *side))
    inner = draw(st.lists(segments(False, durations, streams), max_size=2))
    inner += draw(st.lists(segments(True, durations, streams), min_size=1, max_size=2))
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
    codes = tokens.vision("front", 0, 14)  # encoded once: the builder is asked thousands of times
    tokens.vision = lambda camera, start, stop: codes[start:stop]
    return tokens, bundle.builder()


@pytest.mark.parametrize("pad", [False, True])
@settings(max_examples=100, deadline=None)
@given(
    tasks(
        st.integers(1, 6).map(lambda n: Duration(float(n))),
        ("text", "image", "video", "proprio", "action", *SCALAR_STREAMS),
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


def test_missing_names_what_an_episode_lacks():
    task = Task.parse("text, image.wrist, proprio -> action[4]")
    assert task.missing(["text", "image.front"]) == ["image.wrist", "proprio", "action"]
    assert task.missing(["text", "image.wrist", "proprio"], given_only=True) == []
