import numpy as np
import pytest

from mmseq.serving import GateConfig, RequestError
from mmseq.serving.safety import SafetyGate


def chunk(value=0.0) -> np.ndarray:
    return np.full((8, 4), value, np.float32)


def test_clamp_limits_and_counts(embodiment):
    gate, actions = SafetyGate(GateConfig()), chunk()
    actions[2, 1], actions[7, 3] = 5, -9
    checked, clamped = gate.check(actions, embodiment, horizon=8)
    assert (checked[2, 1], checked[7, 3], clamped) == (2, -2, 2)
    assert actions[2, 1] == 5  # the policy's own array is left alone
    gate.check(chunk(), embodiment, horizon=8)
    assert (gate.counts.chunks, gate.counts.chunks_clamped, gate.counts.values_clamped) == (2, 1, 2)


def test_refuse_names_axis_and_step(embodiment):
    gate, actions = SafetyGate(GateConfig(out_of_range="refuse")), chunk()
    actions[3, 2] = 2.5
    with pytest.raises(RequestError, match=r"axis 'z' is 2.5 at step 3, outside -2..2 m") as caught:
        gate.check(actions, embodiment, horizon=8)
    assert caught.value.code == "unsafe_action"
    assert gate.counts.chunks_refused == 1
    assert gate.check(chunk(2.00001), embodiment, horizon=8)[0].max() == 2  # rounding is not a breach


@pytest.mark.parametrize("mode", ["clamp", "refuse"])
@pytest.mark.parametrize(
    ("actions", "words"),
    [
        (chunk(np.nan), "axis 'x' is nan"),
        (chunk(np.inf), "inf"),
        (np.full((8, 4), 1e300), "inf"),
        (chunk()[:7], r"\(7, 4\), expected \(8, 4\)"),
        (chunk()[:, :3], r"\(8, 3\)"),
        (chunk()[0], r"\(4,\)"),
        (chunk().tolist(), "list"),
        (chunk().astype(object), "ndarray"),
    ],
)
def test_nothing_broken_passes(embodiment, mode, actions, words):
    with pytest.raises(RequestError, match=words):
        SafetyGate(GateConfig(out_of_range=mode)).check(actions, embodiment, horizon=8)


def test_the_chunk_begins_with_exactly_the_prefix(embodiment):
    prefix = np.full((3, 4), 0.123, np.float32)
    checked, _ = SafetyGate(GateConfig()).check(chunk(), embodiment, horizon=8, prefix=prefix)
    np.testing.assert_array_equal(checked[:3], prefix)
    np.testing.assert_array_equal(checked[3:], 0)
