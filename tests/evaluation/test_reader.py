"""Reading the robot's state off pictures: near in true ones, and a robot that is not there is not found."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from mmseq.embodiment import Axes, Embodiment
from mmseq.episode import Episode
from mmseq.evaluation import reader as module
from mmseq.evaluation.reader import Readers, found

AXES = Axes(names=("x", "y"), units=("m", "m"), low=(0.0, 0.0), high=(1.0, 1.0), minimum=(0.0, 0.0), maximum=(1.0, 1.0))
ROBOT = Embodiment(
    name="dot", rate_hz=10, cameras=(), proprio=AXES, action=AXES, action_form="absolute", grippers=(), streams={}
)


def pictures(states: np.ndarray, size: int = 16) -> np.ndarray:
    """A bright square where the robot is, over a grey table: uint8 (N, size, size, 3)."""
    frames = np.full((len(states), size, size, 3), 90, np.uint8)
    for frame, (x, y) in zip(frames, (states * (size - 4)).round().astype(int)):
        frame[y : y + 4, x : x + 4] = (30, 230, 240)
    return frames


def episodes(count: int, seed: int, **more) -> list[Episode]:
    rng = np.random.default_rng(seed)
    out = []
    for i in range(count):
        states = rng.uniform(0, 1, (20, 2)).astype(np.float32)
        arrays = {"image.front": pictures(states), "proprio": states, "action": states}
        arrays = {name: arrays[name] for name in arrays if name not in more.get("without", ())}
        out.append(Episode.from_arrays(id=f"{seed}-{i}", rate_hz=10, arrays=arrays, embodiment="dot"))
    return out


@pytest.fixture(scope="module")
def readers():
    return Readers(episodes(40, 0), {"dot": ROBOT}, lambda frames: frames, steps=150)


def test_the_state_is_read_where_the_robot_is(readers):
    (held,) = episodes(1, 1)
    read = readers.of("dot", "front").label(held["image.front"]).state
    assert np.abs(read - held["proprio"]).mean() < 0.05
    assert np.mean([found(t, r, AXES) for t, r in zip(held["proprio"], read)]) > 0.8


def test_a_robot_that_vanished_or_stands_elsewhere_is_not_found(readers):
    states = np.random.default_rng(2).uniform(0, 1, (40, 2)).astype(np.float32)
    table = np.full((40, 16, 16, 3), 90, np.uint8)
    for wrong in (table, pictures(1 - states)):
        read = readers.of("dot", "front").label(wrong).state
        assert np.mean([found(t, r, AXES) for t, r in zip(states, read)]) < 0.25


def test_nothing_is_read_of_what_no_training_episode_shows(readers):
    assert readers.of("dot", "wrist") is None
    assert readers.of("another", "front") is None
    for lacking in ("proprio", "action", "image.front"):
        blind = Readers(episodes(2, 0, without=(lacking,)), {"dot": ROBOT}, lambda frames: frames, steps=1)
        assert blind.of("dot", "front") is None


def test_a_robot_whose_contract_has_no_state_is_not_read():
    stateless = replace(ROBOT, proprio=None)
    assert Readers(episodes(2, 0), {"dot": stateless}, lambda frames: frames, steps=1).of("dot", "front") is None


def test_a_reader_is_taught_once_by_no_more_frames_than_fit_into_memory(monkeypatch):
    taught = []
    monkeypatch.setattr(module, "teach", lambda chosen, *_: taught.append(chosen))
    monkeypatch.setattr(module, "MOST_BYTES", 100 * 8 * 8 * 3)  # of 200 frames
    decoded = []

    def decode(frames):
        decoded.append(len(frames))
        return frames

    some = episodes(10, 0)
    for episode in some:
        stream = episode.streams["image.front"]
        stream.values = partial(decode, stream.values)
    readers = Readers(some, {"dot": ROBOT}, lambda frames: frames[:, ::2, ::2], steps=1)
    for _ in range(2):
        assert readers.of("dot", "front") is None
    (chosen,) = taught
    assert [len(e) for e in chosen] == [10] * 10
    for whole, part in zip(some, chosen, strict=True):
        np.testing.assert_array_equal(part["proprio"], whole["proprio"][::2])
        np.testing.assert_array_equal(part["image.front"], pictures(whole["proprio"])[::2, ::2, ::2])
        assert callable(whole.streams["image.front"].values)  # frames are not kept


def test_teaching_a_reader_leaves_the_random_numbers_of_others_alone(readers):
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    assert Readers(episodes(2, 0), {"dot": ROBOT}, lambda frames: frames, steps=1).of("dot", "front") is not None
    assert torch.rand(1) == wanted


@pytest.mark.parametrize(("off", "near"), [(0.0999, True), (0.1001, False)])
def test_near_is_a_tenth_of_every_axis(off, near):
    axes = Axes(names=("x", "y"), units=("m", "m"), low=(0.0, -5.0), high=(1.0, 5.0), minimum=(0, -5), maximum=(1, 5))
    for axis in (0, 1):
        span = np.eye(2)[axis] * (1, 10)
        assert found(np.zeros(2), off * span, axes) is near
        assert found(np.zeros(2), -off * span, axes) is near
    still = Axes(names=("x",), units=("m",), low=(0.3,), high=(0.3,), minimum=(0.3,), maximum=(0.3,))
    assert found(np.array([0.3]), np.array([0.3 + off]), still) is near  # an axis that never moves: its own unit
