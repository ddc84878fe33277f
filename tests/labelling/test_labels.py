"""Labels for video: learned from play, written as a LeRobot dataset, gone on with after a kill, and refused in time."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("metaworld")
pytest.importorskip("lerobot")

from safetensors.numpy import load_file

from mmseq.cli import main
from mmseq.data.importing import EpisodeList, import_episodes, write_episodes
from mmseq.data.lerobot_writer import LeRobotWriter
from mmseq.data.sources import open_source
from mmseq.embodiment import Axes, Camera
from mmseq.episode import Episode, TextSpan
from mmseq.errors import CheckpointError, ConfigError, DataError, EpisodeError, FingerprintError
from mmseq.labelling.labels import CONFIDENCE, LabelConfig, PixelLabeller, label_episode, label_source, open_labeller
from mmseq.labelling.network import LabellerNetwork, to_windows
from mmseq.labelling.parts import Parts
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
    other = tmp_path / "labeller"
    shutil.copytree(folder / "labeller", other)
    for labeller, source in ((folder / "labeller", folder / "play"), (other, folder / "videos")):
        with pytest.raises(DataError, match="labels of another run"):
            label_source(labeller, source, tmp_path / "out")
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
    for inside in ("videos/out", "labeller/out"):
        with pytest.raises(DataError, match="which is read"):
            label_source(folder / "labeller", folder / "videos", folder / inside)
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
    np.testing.assert_array_equal(found.action[-1], found.action[-2])  # nothing shows what the last step did
    held = [chunks[step - 3 + i][3 - i] for i in range(4)]
    at = labeller.contract.action.names.index(gripper[0])
    assert found.action[step][at] in [np.float32(vote[at]) for vote in held]
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


def video(path, episodes, **changes):
    """Shards of the pictures of episodes."""
    seen = lambda e: {k: v for k, v in e.streams.items() if k.startswith("image.")}
    return stored(path, [replace(e, streams=seen(e), embodiment=None, success=None, **changes) for e in episodes], None)


def test_a_labeller_that_was_trained_again_is_another_run_and_is_read_again(work, tmp_path, monkeypatch):
    folder, new, _ = work
    filmed, mine = video(tmp_path / "filmed", new[:2]), tmp_path / "labeller"
    shutil.copytree(folder / "labeller", mine)
    label_source(mine, filmed, tmp_path / "before")
    monkeypatch.setattr(LeRobotWriter, "add", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        label_source(mine, filmed, tmp_path / "out")
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()  # half a dataset is none
    network = LabellerNetwork.load(mine)
    network.centre += 0.05
    network.save(mine, {})
    with pytest.raises(DataError, match="labels of another run"):
        label_source(mine, filmed, tmp_path / "out")
    label_source(mine, filmed, tmp_path / "after")
    before, after = (open_source(tmp_path / name)[0]["proprio"] for name in ("before", "after"))
    assert np.abs(after - before).mean() > 0.03


def test_a_run_that_was_killed_while_it_wrote_goes_on(work, tmp_path, monkeypatch):
    folder, new, _ = work
    filmed, real, added = video(tmp_path / "filmed", new[:2]), LeRobotWriter.add, []

    def dies(self, *args):
        added.append(args)
        if len(added) == 2:
            raise KeyboardInterrupt
        real(self, *args)

    monkeypatch.setattr(LeRobotWriter, "add", dies)
    with pytest.raises(KeyboardInterrupt):
        label_source(folder / "labeller", filmed, tmp_path / "out")
    assert label_source(folder / "labeller", filmed, tmp_path / "out")["episodes"] == 2
    assert len(open_source(tmp_path / "out")) == 2
    assert not (tmp_path / "out.labels").exists()


def test_video_of_another_rate_is_refused(work, tmp_path):
    """At 5 Hz the frames around a step lie four times as far apart as the labeller knows them."""
    folder, new, _ = work
    slow = [Episode.from_arrays("slow", 5, {"image.front": new[0]["image.front"]})]
    with pytest.raises(DataError, match="5 Hz, asked for 20"):
        label_source(folder / "labeller", stored(tmp_path / "slow", slow, None), tmp_path / "out")
    with pytest.raises(DataError, match=r"'slow' has 5 steps per second.*20.*--rate-hz 20"):
        label_episode(PixelLabeller(folder / "labeller"), EpisodeList(slow), 0, None)


def test_video_that_was_filmed_at_a_lower_rate_is_refused(work, tmp_path):
    """Its frames would be repeated: a robot that stands still at every other step."""
    folder, new, _ = work
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos/slow.mp4", new[0]["image.front"], 10)
    with pytest.raises(DataError, match=r"'slow.mp4' was filmed at 10 frames per second.*has 20 steps"):
        label_source(folder / "labeller", tmp_path / "videos", tmp_path / "out")
    quick = replace(new[0], metadata={"source_rate_hz": 19.98})
    label_episode(PixelLabeller(folder / "labeller"), EpisodeList([quick]), 0, None)


def test_missing_frames_are_told(work):
    folder, new, _ = work
    source = EpisodeList(new[:1])
    source.frames = lambda index, camera: iter(new[0]["image.front"][:-1])
    with pytest.raises(DataError, match=f"has {LENGTH - 1} frames for {LENGTH} steps"):
        label_episode(PixelLabeller(folder / "labeller"), source, 0, None)


def test_a_robot_with_further_streams_gets_the_labels_that_there_are(work, tmp_path):
    folder, new, _ = work
    network = LabellerNetwork.load(folder / "labeller")
    network.contract = replace(network.contract, streams={"force": Axes.from_values(np.zeros((2, 1)))})
    network.save(tmp_path / "labeller", {})
    label_source(tmp_path / "labeller", video(tmp_path / "filmed", new[:1]), tmp_path / "out")
    assert set(open_source(tmp_path / "out")[0].streams) == {"image.front", "action", "proprio"}


def test_video_of_another_shape_is_cropped_as_on_a_robot(work):
    from mmseq_client.images import fit

    folder, new, _ = work
    network = LabellerNetwork.load(folder / "labeller")

    class Wide:  # a labeller whose camera is no square
        contract = replace(robot(), cameras=(Camera(name="front", height=24, width=40),))
        camera, origin = "front", {}
        label = staticmethod(lambda frames: network.label(new[0]["image.front"]))

    labelled, _ = label_episode(Wide, EpisodeList(new[:1]), 0, None)
    frames = new[0]["image.front"]
    np.testing.assert_array_equal(labelled["image.front"], np.stack([fit(f, 24, 40) for f in frames]))
    assert labelled["image.front"].shape[1:] == (24, 40, 3)


def test_what_is_said_of_a_task_in_several_episodes_is_kept(tmp_path):
    arrays = {"image.front": np.zeros((4, 16, 16, 3), np.uint8), "proprio": np.full((4, 4), 0.3, np.float32)}
    arrays["action"] = np.zeros((4, 4), np.float32)
    with LeRobotWriter(tmp_path / "out", robot(size=16)) as writer:
        for name, texts, plans in (("a", ["A", "B"], ["first this"]), ("b", ["A", "C"], [])):
            writer.add(Episode.from_arrays(name, 20, arrays, texts=texts, plans=plans))
    assert [(e.texts, e.plans) for e in open_source(tmp_path / "out")] == [(["A", "B", "C"], ["first this"])] * 2


def test_a_long_video_comes_in_parts(work, tmp_path, monkeypatch):
    folder, new, _ = work
    spans = [TextSpan("text", 0, 10, ("reach",)), TextSpan("text", 10, LENGTH, ("turn",))]
    whole = replace(new[0], spans=spans, success=True)
    parts = Parts(EpisodeList([whole, new[1]]), 16)
    assert [len(e) for e in (parts[i] for i in range(len(parts)))] == [13, 13, 14] * 2
    assert [parts[i].id for i in range(3)] == [f"{whole.id}#{n}" for n in (1, 2, 3)]
    assert [parts[i].success for i in range(3)] == [None, None, True]
    said = [parts[step // 13 if step < 39 else 2].texts_of("text", step % 13)[0] for step in range(39)]
    assert said == ["reach"] * 10 + ["turn"] * 29
    frames = np.concatenate([np.stack(list(parts.frames(i, "front"))) for i in range(3)])
    np.testing.assert_array_equal(frames, whole["image.front"])
    np.testing.assert_array_equal(parts[1]["image.front"], whole["image.front"][13:26])
    assert Parts(EpisodeList([whole]), LENGTH)[0] is whole
    from mmseq.labelling import labels

    monkeypatch.setattr(labels, "MAX_EPISODE_STEPS", 25)
    report = label_source(folder / "labeller", video(tmp_path / "filmed", new[:1]), tmp_path / "out")
    assert report["episodes"] == 2
    assert [len(e) for e in open_source(tmp_path / "out")] == [20, 20]


def test_what_a_writer_would_lose_is_refused(tmp_path):
    contract = robot()
    with pytest.raises(DataError, match=r"12\.5 steps per second, LeRobot writes whole numbers"):
        LeRobotWriter(tmp_path / "a", replace(contract, rate_hz=12.5))
    arrays = {
        "image.front": np.zeros((5000, 1, 1, 3), np.uint8),
        **dict.fromkeys(("proprio", "action"), np.ones((5000, 4))),
    }
    writer = LeRobotWriter(tmp_path / "a", contract)
    with pytest.raises(EpisodeError, match="has 5000 steps"):
        writer.add(Episode.from_arrays("long", 20, arrays))
    with pytest.raises(EpisodeError, match="has 10 steps per second, the dataset 20"):
        writer.add(Episode.from_arrays("slow", 10, {k: v[:5] for k, v in arrays.items()}))
    assert not (tmp_path / "a").exists()


def test_axes_that_hardly_move_are_no_switches_and_those_that_never_do_teach_nothing(tmp_path):
    """One that is always 500 is labelled so; one that leaves its end for a moment stays what it is."""
    contract, random, episodes = robot(size=16), np.random.default_rng(0), []
    axes = lambda **limits: replace(contract.action, **limits)
    wide = {"minimum": (-1.0, -1.0, 0.0, 0.0), "maximum": (1.0, 1.0, 600.0, 1.0)}
    contract = replace(contract, action=axes(**wide, low=wide["minimum"], high=wide["maximum"]), grippers=())
    for number in range(8):
        action = random.uniform(-1, 1, (40, 4)).astype(np.float32)
        action[:, 1] = np.sign(action[:, 1])  # a switch that is no gripper
        action[:, 2] = 500
        action[:, 3] = 0
        action[:3, 3] = (0.3, 0.8, 0.5) if number == 0 else 0
        arrays = {"image.front": random.integers(0, 255, (40, 16, 16, 3), np.uint8), "action": action}
        arrays["proprio"] = np.zeros((40, 4), np.float32) + 0.3
        episodes.append(Episode.from_arrays(f"e{number}", 20, arrays, embodiment=contract.name))
    path = stored(tmp_path / "shards", episodes, contract)
    config = LabellerConfig(sources=[str(path)], out=str(tmp_path / "l"), steps=30, batch=16, holdout=0.4)
    report = train_labeller(config)
    assert report["held_out"]["switches"] == ["action.dy"]
    told = report["held_out"]["labels"]
    assert not {"action.dz", "proprio.x"} & set(told)
    assert all(np.isfinite(value) for value in told.values())
    found = PixelLabeller(tmp_path / "l").label(episodes[0]["image.front"])
    np.testing.assert_allclose(found.action[:, 2], 500, atol=5)
    assert set(found.action[:, 1]) <= {-1.0, 1.0}
    with pytest.raises(DataError, match="all 8 episodes are held out"):
        train_labeller(replace(config, holdout=0.999999))
    spoilt = replace(contract, rate_hz=10)
    other = stored(tmp_path / "other", [Episode.from_arrays("o", 10, arrays, embodiment=contract.name)], spoilt)
    with pytest.raises(FingerprintError, match="rate_hz"):
        train_labeller(replace(config, sources=[str(path), str(other)]))


def test_values_that_are_not_finite_do_not_become_a_labeller():
    from mmseq.labelling.training import _stack

    arrays = {"image.front": np.zeros((5, 64, 64, 3), np.uint8), "proprio": np.full((5, 4), 0.3)}
    bad = Episode.from_arrays("bad", 20, arrays | {"action": np.full((5, 4), np.nan)})
    with pytest.raises(EpisodeError, match="'dx' is nan at step 0"):
        _stack([bad], "front", robot())
