"""The vocabulary: ranges lie side by side, ids and codes map one to one, and new robots move nobody."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmseq.errors import ConfigError, FingerprintError
from mmseq.streams import OUTCOME, STREAMS
from mmseq.testing import tiny
from mmseq.vocabulary import CAMERA_TOKENS, EMBODIMENT_SLOTS, STRUCTURE, Vocabulary

sizes = st.fixed_dictionaries({n: st.integers(1, 3000) for n in ("text", "vision", "action", "proprio", "progress")})


def small(embodiments=(), streams=(), **changes):
    sizes = {"text": 300, "vision": 64, "action": 32, "proprio": 32, "progress": 16, **changes}
    return Vocabulary(sizes, embodiments=embodiments, streams=streams)


@given(sizes)
def test_ranges_are_disjoint_contiguous_and_start_with_text(sizes):
    vocabulary = Vocabulary(sizes)
    ranges = list(vocabulary.ranges.values())
    assert ranges[0].name == "text"
    assert ranges[0].start == 0
    assert all(a.stop == b.start for a, b in itertools.pairwise(ranges))
    assert ranges[-1].stop <= len(vocabulary) < ranges[-1].stop + 64
    assert len(vocabulary) % 64 == 0


@given(sizes, st.data())
def test_ids_and_codes_map_one_to_one(sizes, data):
    vocabulary = Vocabulary(sizes)
    name = data.draw(st.sampled_from(list(vocabulary.ranges)))
    size = vocabulary.ranges[name].size
    codes = np.array(data.draw(st.lists(st.integers(0, size - 1), max_size=20)), dtype=np.int64)
    ids = vocabulary.encode(name, codes)
    assert np.array_equal(vocabulary.decode(name, ids), codes)
    assert all(vocabulary.range_of(int(i)) == name for i in ids)
    for bad in (-1, size):
        with pytest.raises(ConfigError, match="outside"):
            vocabulary.encode(name, np.array([bad]))
        with pytest.raises(ConfigError, match="outside"):
            vocabulary.decode(name, np.array([bad + vocabulary.ranges[name].start]))


def test_every_stream_has_a_range_and_a_header():
    vocabulary = small(motion=32, force=16, streams=["motion", "force"])
    assert all(row.range in vocabulary.ranges for row in STREAMS.values())
    headers = [vocabulary.header(s) for s in (*STREAMS, "force")]
    assert len(set(headers)) == len(STREAMS) + 1
    assert len(set(STRUCTURE)) == len(STRUCTURE)


def test_a_new_embodiment_moves_nobody():
    before = small(embodiments=["arm", "hand"])
    ids = {name: before.embodiment(name) for name in ("arm", "hand", None)}
    after = small(embodiments=["arm", "hand"])
    after.add_embodiment("car")
    assert len(after) == len(before)
    assert after.ranges == before.ranges
    assert {name: after.embodiment(name) for name in ids} == ids
    assert after.embodiment("car") not in ids.values()
    assert after.add_embodiment("car") == after.embodiment("car")


def test_embodiments_run_out_with_a_message():
    vocabulary = small(embodiments=[f"robot_{i}" for i in range(EMBODIMENT_SLOTS)])
    with pytest.raises(ConfigError, match="all 64 are taken"):
        vocabulary.add_embodiment("one_more")
    with pytest.raises(ConfigError, match="did you mean 'robot_1"):
        vocabulary.embodiment("robt_1")
    with pytest.raises(ConfigError, match="at most 16 cameras"):
        vocabulary.camera(CAMERA_TOKENS)


def test_times_grow_and_are_near():
    vocabulary = small()
    ids = [vocabulary.time(s) for s in (0.0, 0.01, 0.05, 0.4, 0.8, 10, 100, 1e6)]
    assert ids == sorted(ids)
    assert vocabulary.time(0.8) != vocabulary.time(0.9)


def test_every_id_has_a_readable_name():
    vocabulary = small(embodiments=["arm"])
    names = [vocabulary.describe(i) for i in range(len(vocabulary))]
    assert len(set(names)) == len(names)
    assert names[vocabulary.embodiment("arm")] == "<arm>"


def test_it_survives_its_dictionary_and_names_what_differs():
    one, other = small(embodiments=["arm"]), small(vision=128)
    assert Vocabulary.from_dict(one.to_dict()).fingerprint == one.fingerprint
    with pytest.raises(FingerprintError, match="vision: 64 against 128"):
        one.require_same_ranges(other, mine="a", theirs="b")
    with pytest.raises(ConfigError):
        Vocabulary.from_dict({"text": 3})


def test_every_range_of_an_outcome_has_its_tokenizer():
    bundle = tiny.tokenizers()
    for row in (row for row in STREAMS.values() if row.kind is OUTCOME):
        assert (
            bundle[row.range].size
            == bundle.vocabulary.ranges[row.range].stop - bundle.vocabulary.ranges[row.range].start
        )
