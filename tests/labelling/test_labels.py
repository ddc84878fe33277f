"""Labels for video: learned from play, written as a LeRobot dataset, gone on with after a kill, and refused in time."""

import json
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("metaworld")
pytest.importorskip("lerobot")

from safetensors.numpy import load_file

from mmseq.cli import main
from mmseq.data.importing import EpisodeList, import_episodes, write_episodes
from mmseq.data.sources import open_source
from mmseq.episode import TextSpan
from mmseq.errors import CheckpointError, ConfigError, DataError
from mmseq.labelling.labels import CONFIDENCE, LabelConfig, PixelLabeller, label_source, open_labeller
from mmseq.labelling.network import LabellerNetwork, to_windows
from mmseq.labelling.training import LabellerConfig, measure, train_labeller
from mmseq.mp4 import write_video
from mmseq.simulation.metaworld import robot
from mmseq.simulation.play import record_play

STEPS, LENGTH = 150, 40


def played(count: int, seed: int, task: str = "window-open") -> list:
    return [e.to_episode() for e in record_play([task], count, steps=LENGTH, seed=seed, workers=1)]


def stored(path, episodes, contract):
    write_episodes(EpisodeList(episodes, contract), path, {"name": path.name, "source": "test"})
    return path


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Shards of play, video of another scene without actions, and a labeller of the first."""
    work = tmp_path_factory.mktemp("labels")
    stored(work / "play", [*played(10, 0), *played(10, 0, "door-lock")], robot())
    new = played(3, 1, "dial-turn")
    (work / "videos").mkdir()
    captions = []
    for number, episode in enumerate(new):
        write_video(work / f"videos/{number}.mp4", episode["image.front"], 20)
        captions.append({"file": f"{number}.mp4", "caption": f"turn dial {number}"})
    (work / "videos/captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in captions))
    options = {"steps": STEPS, "batch": 32, "holdout": 0.2}
    report = train_labeller(LabellerConfig(sources=[str(work / "play")], out=str(work / "labeller"), **options))
    return work, new, report


def test_it_learns_what_carries_over_to_another_scene(work):
    folder, new, report = work
    assert report["held_out"]["switches"] == ["action.gripper"]
    labels = measure(LabellerNetwork.load(folder / "labeller"), new)
    arm = [f"{stream}.{axis}" for stream, axis in (("proprio", "x"), ("proprio", "y"), ("proprio", "z"))]
    known = np.mean([report["held_out"]["labels"][name] for name in arm])
    assert known > 0.5
    guessed = np.mean([labels["shuffled"][name] for name in arm])
    assert np.mean([labels["labels"][name] for name in arm]) > guessed + 0.4
    assert labels["labels"]["action.gripper"] > labels["shuffled"]["action.gripper"]


def test_a_saved_labeller_reads_the_same(work):
    folder, new, _ = work
    reader, again = PixelLabeller(folder / "labeller"), PixelLabeller(folder / "labeller")
    frames = new[0]["image.front"]
    a, b = reader.label(frames), again.label(frames)
    np.testing.assert_array_equal(a.values, b.values)
    assert a.action.shape == a.state.shape == (LENGTH, 4)
    assert set(a.action[:, 3]) <= {-1.0, 1.0}
    assert ((a.confidence >= 0) & (a.confidence <= 1)).all()
    with pytest.raises(DataError, match=r"\(64, 64, 3\).*\(32, 32, 3\)"):
        reader.label(frames[:, ::2, ::2])


def test_the_window_of_a_step_is_what_lies_around_it(work):
    folder, new, _ = work
    labeller = LabellerNetwork.load(folder / "labeller")
    at = labeller.window_indices(5)
    np.testing.assert_array_equal(at[2], [0, 1, 2, 3, 4, 4])
    np.testing.assert_array_equal(at[0], [0, 0, 0, 1, 2, 3])
    frames = new[0]["image.front"].copy()
    before = labeller.label(frames).values
    frames[20:] = 0  # out of the window of every step up to 16
    after = labeller.label(frames).values
    np.testing.assert_allclose(after[:17], before[:17], atol=1e-5)
    assert np.abs(after[17] - before[17]).max() > 1e-3


def test_windows_keep_frames_and_channels_in_order():
    import torch

    pixels = torch.arange(2 * 6 * 4 * 5 * 3, dtype=torch.int64).remainder(256).to(torch.uint8).view(2, 6, 4, 5, 3)
    windows = to_windows(pixels)
    assert windows.shape == (2, 18, 4, 5)
    assert windows[1, 3 * 4 + 2, 3, 1].item() == pytest.approx(pixels[1, 4, 3, 1, 2].item() / 255 - 0.5)


def test_video_becomes_a_dataset_that_lerobot_reads(work, tmp_path):
    folder, _, _ = work
    report = label_source(folder / "labeller", folder / "videos", tmp_path / "out", LabelConfig(workers=2))
    assert (report["episodes"], report["left_out"]) == (3, [])
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset("mmseq/labelled", root=tmp_path / "out", video_backend="pyav")
    assert (len(dataset), dataset.num_episodes) == (3 * LENGTH, 3)
    item = dataset[LENGTH + 4]
    expected = PixelLabeller(folder / "labeller").label(open_source(folder / "videos")[1]["image.main"])
    np.testing.assert_allclose(item["action"].numpy(), expected.action[4], atol=1e-5)
    assert item[CONFIDENCE].item() == pytest.approx(float(expected.confidence[4]), abs=1e-5)
    assert item["task"] == "turn dial 1"
    said = json.loads((tmp_path / "out/meta/mmseq.json").read_text())["labels"]
    assert said["labelled_by"]["labeller"] == str(folder / "labeller")
    import_episodes(tmp_path / "out", tmp_path / "shards")
    again = open_source(tmp_path / "shards")[1]
    assert again.embodiment == robot().name
    limits = robot().proprio
    np.testing.assert_allclose(again["proprio"], np.clip(expected.state, limits.minimum, limits.maximum), atol=1e-5)
    assert again.texts[0] == "turn dial 1"


def test_video_is_read_as_its_owner_says(work, tmp_path):
    folder, _, _ = work
    swapped = LabelConfig(swap_colours=["main"])
    label_source(folder / "labeller", folder / "videos", tmp_path / "out", swapped)
    frames = open_source(folder / "videos")[1]["image.main"][..., ::-1]
    expected = PixelLabeller(folder / "labeller").label(frames)
    np.testing.assert_allclose(open_source(tmp_path / "out")[1]["action"], expected.action, atol=1e-5)
    options = {"out": str(tmp_path / "l"), "steps": 1, "swap_colours": ["front"]}
    with pytest.raises(DataError, match="holds shards, which swap_colours does not change"):
        train_labeller(LabellerConfig(sources=[str(folder / "play")], **options))


def test_it_goes_on_after_a_kill_and_notices_another_run(work, tmp_path, monkeypatch):
    folder, _, _ = work
    from mmseq.labelling import labels

    seen = []
    real = labels.label_episode

    def dies(reader, source, index, camera):
        seen.append(index)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(reader, source, index, camera)

    monkeypatch.setattr(labels, "label_episode", dies)
    with pytest.raises(KeyboardInterrupt):
        label_source(folder / "labeller", folder / "videos", tmp_path / "out")
    kept = tmp_path / "out.labels"
    assert sorted(p.name for p in kept.glob("*.safetensors")) == ["0.safetensors", "1.safetensors"]
    before = load_file(kept / "0.safetensors")["action"]
    with pytest.raises(DataError, match="labels of another run"):
        label_source(folder / "labeller", folder / "play", tmp_path / "out")
    assert (kept / "0.safetensors").is_file()
    label_source(folder / "labeller", folder / "videos", tmp_path / "out")
    assert seen == [0, 1, 2, 2]
    assert not kept.exists()
    np.testing.assert_allclose(open_source(tmp_path / "out")[0]["action"], before, atol=1e-6)


def test_unsure_episodes_are_left_out(work, tmp_path):
    folder, _, _ = work
    found = [
        PixelLabeller(folder / "labeller").label(e["image.main"]).confidence.mean()
        for e in open_source(folder / "videos")
    ]
    most = float(np.sort(found)[1]) + 1e-6
    report = label_source(folder / "labeller", folder / "videos", tmp_path / "out", LabelConfig(min_confidence=most))
    assert report["episodes"] == 1
    assert len(report["left_out"]) == 2
    with pytest.raises(DataError, match="no episode has a confidence"):
        label_source(folder / "labeller", folder / "videos", tmp_path / "none", LabelConfig(min_confidence=1))
    assert not (tmp_path / "none").exists()


def test_bad_input_is_refused_before_work(work, tmp_path):
    folder, new, _ = work
    with pytest.raises(DataError, match="already exists"):
        label_source(folder / "labeller", folder / "videos", folder / "play")
    with pytest.raises(CheckpointError, match="neither a labeller nor a checkpoint"):
        open_labeller(folder / "play")
    with pytest.raises(ConfigError, match="of 'metaworld_sawyer', not of 'panda'"):
        open_labeller(folder / "labeller", "panda")
    with pytest.raises(ConfigError, match=r"cameras main, not 'wrist'.*--camera"):
        label_source(folder / "labeller", folder / "videos", tmp_path / "a", LabelConfig(camera="wrist"))
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (folder / "labeller").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "labeller.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(CheckpointError, match="damaged"):
        open_labeller(broken)
    blind = [replace(e, streams={k: v for k, v in e.streams.items() if k != "proprio"}) for e in new]
    contract = replace(robot(), proprio=None)
    stored(tmp_path / "stateless", blind, contract)
    for sources, error in (
        ([], "sources is empty"),
        ([str(tmp_path / "stateless")], "no proprio to be labelled"),
        ([str(folder / "videos")], "of none"),
    ):
        with pytest.raises((ConfigError, DataError), match=error):
            train_labeller(LabellerConfig(sources=sources, out=str(tmp_path / "l")))
    assert not (tmp_path / "l").exists()


def test_the_commands(work, tmp_path, capsys):
    folder, _, _ = work
    assert (
        main(["labeller", "train", f"sources=[{folder / 'play'}]", f"out={tmp_path / 'l'}", "steps=3", "batch=8"]) == 0
    )
    assert "taught by" in capsys.readouterr().out
    assert main(["label", str(tmp_path / "l"), str(folder / "videos"), str(tmp_path / "out")]) == 0
    assert "3 episodes, confidence" in capsys.readouterr().out
    assert main(["labeller", "train", f"out={tmp_path / 'l'}", "step=3"]) == 2
    assert "did you mean 'steps'" in capsys.readouterr().err


def test_a_checkpoint_labels_with_its_arrows(tmp_path):
    """What it says is what its arrows predict: a step's action is the mean over the pairs of frames around it."""
    from mmseq.testing import tiny

    model = tiny.model(tiny.tokenizers())
    arrows = {"inverse": "image, image@+4 -> action[4]", "state": "image -> proprio"}
    model.save_pretrained(tmp_path / "without")
    model.tasks = arrows
    model.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match=r"not trained on 'image, image@\+4 -> action\[4\]'"):
        open_labeller(tmp_path / "without")
    labeller = open_labeller(tmp_path / "checkpoint")
    episode = tiny.episode(1, robot=tiny.embodiment())
    camera = f"image.{labeller.camera}"
    found = labeller.label(episode[camera])
    chunks = [model.predict(arrows["inverse"], episode, t=t)["action"] for t in range(len(episode) - 4)]
    step = 6
    votes = [chunks[start][step - start] for start in range(step - 3, step + 1)]
    gripper = [g.axis for g in labeller.contract.grippers]
    plain = [i for i, name in enumerate(labeller.contract.action.names) if name not in gripper]
    np.testing.assert_allclose(found.action[step][plain], np.mean(votes, 0)[plain], atol=1e-4)
    np.testing.assert_allclose(
        found.state[step], model.predict(arrows["state"], episode, t=step)["proprio"][-1], atol=1e-4
    )
    assert found.confidence.shape == (len(episode),)
    with pytest.raises(DataError, match="too short"):
        labeller.label(episode[camera][:4])


def test_words_of_each_step_stay_and_outcomes_are_of_all_or_none(work, tmp_path):
    folder, new, _ = work
    spans = (TextSpan("text", 0, 10, ("reach the dial",)), TextSpan("text", 10, LENGTH, ("turn it",)))
    told = [replace(e, spans=spans if i == 1 else (), success=(True, None)[i]) for i, e in enumerate(new[:2])]
    filmed = [
        replace(e, embodiment=None, streams={k: v for k, v in e.streams.items() if k == "image.front"}) for e in told
    ]
    stored(tmp_path / "filmed", filmed, None)
    label_source(folder / "labeller", tmp_path / "filmed", tmp_path / "out")
    back = open_source(tmp_path / "out")
    assert [e.success for e in (back[0], back[1])] == [None, None]
    assert [back[1].texts_of("text", step) for step in (9, 10)] == [["reach the dial"], ["turn it"]]
