"""Recorded demonstrations: the same for any number of workers, readable by LeRobot, and videos without actions."""

import json

import numpy as np
import pytest

from mmseq.embodiment import Embodiment
from mmseq.errors import DataError

pytest.importorskip("metaworld")

from mmseq.simulation.human import write_human_videos
from mmseq.simulation.record import embodiment, record_episodes

TASKS = ("handle-press", "plate-slide")


@pytest.fixture(scope="module")
def episodes():
    return list(record_episodes(TASKS, 3, seed=7, workers=1))


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / max(np.mean((a.astype(float) - b.astype(float)) ** 2), 1e-9))


def test_workers_do_not_change_the_episodes(episodes):
    progress = []
    again = list(record_episodes(TASKS, 3, seed=7, workers=2, on_progress=lambda *p: progress.append(p)))
    assert progress == [(n, 6) for n in range(1, 7)]
    for a, b in zip(episodes, again, strict=True):
        assert (a.task, a.seed, a.texts) == (b.task, b.seed, b.texts)
        np.testing.assert_array_equal(a.images, b.images)
        np.testing.assert_array_equal(a.proprio, b.proprio)
        np.testing.assert_array_equal(a.action, b.action)


def test_episodes_hold_what_was_executed(episodes):
    from mmseq.simulation.metaworld import MetaWorldEnv

    episode = episodes[0]
    assert len(episode.images) == len(episode.proprio) == len(episode.action)
    assert episode.action.dtype == np.float32
    assert np.abs(episode.action).max() <= 1
    with MetaWorldEnv(episode.task, seed=episode.seed) as env:
        for image, proprio, action in zip(episode.images, episode.proprio, episode.action):
            np.testing.assert_array_equal(env.proprio(), proprio)
            np.testing.assert_array_equal(env.render(), image)
            env.act(action)
        assert env.succeeded
    episode = episode.to_episode()
    assert episode.cameras == ["front"]
    assert len(episode["action"]) == len(episode)


def test_a_lower_gain_is_slower_and_the_expert_goes_on_after_success():
    settings = {"seed": 7, "workers": 1, "noise": 0.0}
    (slow,) = record_episodes(["coffee-button"], 1, gain=0.25, after_success=16, **settings)
    (fast,) = record_episodes(["coffee-button"], 1, after_success=0, **settings)
    assert slow.seed == fast.seed
    assert len(slow) - 16 > len(fast)
    assert np.abs(slow.action[: len(fast), :3]).mean() < np.abs(fast.action[:, :3]).mean()


def test_the_contract_states_units_limits_and_gripper(episodes):
    contract = embodiment(episodes)
    assert contract.proprio.names == ("x", "y", "z", "gripper")
    assert contract.proprio.units[:3] == ("m",) * 3
    assert contract.action.minimum == (-1.0,) * 4
    assert contract.action.maximum == (1.0,) * 4
    assert [(g.open, g.closed) for g in contract.grippers] == [(-1.0, 1.0)]
    assert contract.action_form == "delta"
    for episode in episodes:
        contract.proprio.check(episode.proprio, what="proprio", where=episode.task)
        contract.action.check(episode.action, what="action", where=episode.task)


def test_lerobot_reads_what_was_written(episodes, tmp_path, capfd):
    pytest.importorskip("lerobot")
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    from mmseq.simulation.dataset import write_lerobot

    capfd.readouterr()
    path = write_lerobot(iter(episodes), tmp_path / "dataset")
    assert "".join(capfd.readouterr()) == ""
    dataset = LeRobotDataset("mmseq/metaworld", root=path, video_backend="pyav")
    assert dataset.num_episodes == len(episodes)
    assert dataset.fps == 20
    assert dataset.meta.robot_type == "metaworld_sawyer"
    assert dataset.meta.features["action"]["names"] == ["dx", "dy", "dz", "gripper"]
    first = 0
    for episode in episodes:
        for step in (0, len(episode) // 2, len(episode) - 1):
            frame = dataset[first + step]
            image = (frame["observation.images.front"].numpy().transpose(1, 2, 0) * 255).round()
            assert psnr_db(image, episode.images[step]) > 40
            np.testing.assert_array_equal(frame["observation.state"].numpy(), episode.proprio[step])
            np.testing.assert_array_equal(frame["action"].numpy(), episode.action[step])
            assert frame["task"] == episode.texts[0]
        first += len(episode)
    meta = json.loads((path / "meta" / "mmseq.json").read_text())
    assert set(meta["tasks"]) == {episode.texts[0] for episode in episodes}
    assert [e["seed"] for e in meta["episodes"]] == [episode.seed for episode in episodes]
    assert Embodiment.load(path / "meta" / "embodiment.json") == embodiment(episodes)
    with pytest.raises(DataError, match="already exists"):
        write_lerobot(episodes, path)


def test_human_videos_have_captions_and_no_actions(tmp_path):
    import av

    files = write_human_videos(tmp_path, ["plate-slide", "drawer-close"], 2, workers=1)
    assert len(files) == len(list(tmp_path.glob("*.mp4"))) == 4
    lines = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == [file.name for file in files]
    for line in lines:
        assert set(line) == {"file", "caption", "captions", "plan", "task", "success"}
        assert line["caption"] in line["captions"]
        with av.open(str(tmp_path / line["file"])) as container:
            assert [stream.type for stream in container.streams] == ["video"]
            assert container.streams.video[0].average_rate == 20
            images = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(images) > 5
        assert images[0].shape == (64, 64, 3)
    with pytest.raises(DataError, match="already holds"):
        write_human_videos(tmp_path, ["plate-slide"], 1, workers=1)
