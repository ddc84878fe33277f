"""The benchmark of learning from video: the same on every machine, refused in time, and whole on its smallest size."""

import json
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("metaworld")

from mmseq import plugins
from mmseq.cli import main
from mmseq.data.sources import open_source
from mmseq.errors import ConfigError
from mmseq.evaluation.lfv import run as lfv
from mmseq.evaluation.lfv.manifest import (
    LADDER,
    MW7,
    MW7_TASKS,
    ROBOT_TASKS,
    VIDEO_TASKS,
    Config,
    cells,
    fingerprint,
    layouts,
    there_is,
    training_fingerprint,
)
from mmseq.evaluation.lfv.record import Recorder
from mmseq.evaluation.lfv.report import summarise, write_page
from mmseq.evaluation.lfv.rows import Row, read_rows
from mmseq.evaluation.lockstep import Layout, Seen
from mmseq.evaluation.results import wilson
from mmseq.simulation.experts import TASKS, task_language

SMALL = {
    "robot_tasks": ["coffee-button"],
    "video_tasks": ["handle-press"],
    "demonstrations": [2],
    "videos": 3,
    "play": 2,
    "episodes": 2,
    "steps": 3,
    "vision_steps": 3,
    "labeller_steps": 3,
    "max_steps": 4,
}


def test_tasks_are_known_and_words_of_video_tasks_are_heard_nowhere_else():
    assert len(ROBOT_TASKS) == 12
    assert len(VIDEO_TASKS) == 8
    assert not set(ROBOT_TASKS) & set(VIDEO_TASKS)
    assert {*ROBOT_TASKS, *VIDEO_TASKS} <= set(TASKS)
    said = lambda tasks: {text for task in tasks for text in task_language(task).instructions}
    assert not said(ROBOT_TASKS) & said(VIDEO_TASKS)


def test_a_manifest_is_the_same_on_every_machine():
    assert fingerprint(Config()) == fingerprint(Config(out="elsewhere", seeds=[1, 2], methods=["model"]))
    assert fingerprint(Config()) != fingerprint(Config(steps=501))
    assert fingerprint(Config(**SMALL)) == "83b4936003f0c5c2"
    taught = training_fingerprint(Config())
    assert taught == training_fingerprint(Config(episodes=3, shifts=["light"], execute=2, max_steps=9, reworded=True))
    others = ({"steps": 501}, {"videos": 3}, {"play": 0}, {"vision_steps": 3}, {"labeller_steps": 3})
    assert taught not in [training_fingerprint(Config(**other)) for other in others]
    ordered = [str(cell) for cell in cells(Config(methods=["model", "labelled"], seeds=[0, 1]))]
    assert ordered == ["model-d50-V0-s0", "labelled-d50-V0-s0", "model-d50-V0-s1", "labelled-d50-V0-s1"]
    driven = layouts(Config(episodes=2), ["door-open", "door-close"], "light")
    assert [(one.task, one.seed) for one in driven] == [
        *(("door-open", 500_000), ("door-open", 500_001)),
        *(("door-close", 500_000), ("door-close", 500_001)),
    ]
    assert {one.options for one in driven} == {(("shift", "light"), ("spread", 1.5))}


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"methods": ["labeled"]}, "did you mean 'labelled'"),
        ({"video": ["V9"]}, "video: no 'V9'"),
        ({"shifts": ["dark"]}, "shifts: no 'dark'"),
        ({"episodes": 0}, "episodes is 0"),
        ({"seeds": []}, "seeds is empty"),
        ({"video": []}, "video is empty"),
        ({"seeds": [0, 1000]}, "seeds are .*below 1000"),
        ({"seeds": [0, 0]}, r"seeds names something twice: \[0, 0\]"),
        ({"execute": 3}, "execute is 3"),
        ({"robot_tasks": ["door-opne"]}, "did you mean 'door-open'"),
        (
            {"methods": ["true_labels"], "video": ["V5"]},
            "true_labels-d50-V5-s0: there is no truth.*V0, V1, V2, V3, V4, V6",
        ),
        ({"methods": ["true_labels"], "video_tasks": []}, "no truth.*Give video_tasks or videos_taught, or"),
        ({"methods": ["tracked"], "play": 0}, "there is no poses.*Give play, or compare"),
        ({"methods": ["tracked"], "play": 0, "video_tasks": []}, "no video and no poses.*videos_taught and give play"),
        ({"methods": ["labelled"], "video_tasks": []}, "there is no video.*Give video_tasks or videos_taught"),
        ({"demonstrations": [0]}, r"demonstrations \[0\]"),
        ({"videos_taught": -1}, "videos_taught -1"),
        ({"spread": 0.0}, "spread is 0"),
        ({"spread": float("nan")}, "spread is nan"),
        ({"video_tasks": ["door-open"]}, "robot_tasks and video_tasks"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_recorded(tmp_path, wrong, told):
    with pytest.raises(ConfigError, match=told):
        lfv.run(Config(out=str(tmp_path / "out"), **wrong))
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    recorder = Recorder(Config(out=str(tmp_path_factory.mktemp("lfv")), **SMALL), 0, lambda _: None)
    return {rung: recorder.data(rung, 2) for rung in LADDER}


def test_video_has_no_actions_and_only_the_ceiling_knows_better(ladder):
    for rung, data in ladder.items():
        videos = list(open_source(data.video))
        assert len(videos) == 3
        assert all(set(e.streams) == {"image.front"} and e.embodiment is None and e.success is None for e in videos)
        assert (data.truth is None) == (rung == "V5")
        poses = list(open_source(data.poses))
        assert len(poses) == 2
        assert all(set(e.streams) == {"image.front", "proprio"} and e.texts == ["play"] for e in poses)
    seen = {rung: open_source(data.video)[0]["image.front"] for rung, data in ladder.items()}
    truth = open_source(ladder["V0"].truth)[0]
    assert truth["action"].shape == (len(seen["V0"]), 4)
    np.testing.assert_array_equal(truth["image.front"], seen["V0"])
    plain = seen["V0"].astype(int)
    for rung in ("V1", "V2", "V3", "V4"):  # the same layouts and motions, filmed otherwise
        assert len(seen[rung]) == len(plain)
        assert np.abs(seen[rung] - plain).mean() > 1
    robot = open_source(ladder["V0"].robot)
    assert {text for e in robot for text in e.texts} == set(task_language("coffee-button").instructions[:-1])
    asked = lfv._reworded(Layout("handle-press", 0), task_language("handle-press").instructions)
    assert asked in task_language("handle-press").instructions
    for data in ladder.values():
        assert asked not in {text for e in (*open_source(data.video), *open_source(data.robot)) for text in e.texts}
    assert len(list(open_source(ladder["V0"].play))) == 2


def test_taught_tasks_can_be_filmed_too(tmp_path):
    config = Config(out=str(tmp_path), **SMALL | {"videos_taught": 2})
    videos = list(open_source(Recorder(config, 0, lambda _: None).data("V0", 2).video))
    assert [e.metadata["task"] for e in videos] == [*["coffee-button"] * 2, *["handle-press"] * 3]
    taught = [e.metadata["seed"] for e in open_source(Recorder(config, 0).data("V0", 2).robot)]
    assert not {e.metadata["seed"] for e in videos} & set(taught)
    alone = Config(out=str(tmp_path), **SMALL | {"videos_taught": 2, "video_tasks": []})
    assert there_is(alone, "V0")["video"]
    assert len(list(open_source(Recorder(alone, 0, lambda _: None).data("V0", 2).video))) == 2


def record_nothing(monkeypatch) -> list:
    """Where episodes would have been written."""
    written = []
    monkeypatch.setattr(Recorder, "_write", lambda self, path, *_: written.append(path))
    monkeypatch.setattr(Recorder, "_film", lambda *_: [])
    monkeypatch.setattr(Recorder, "_demonstrations", lambda *_: [])
    monkeypatch.setattr("mmseq.evaluation.lfv.record.record_play", lambda *_, **__: [])
    return written


def test_as_many_videos_of_taught_tasks_are_other_videos(tmp_path, monkeypatch):
    """In one folder, video without the taught tasks is not taken for video with them."""
    record_nothing(monkeypatch)
    named = lambda **changed: Recorder(Config(out=str(tmp_path), **SMALL | changed), 0).data("V0", 2).video.name
    assert named() == "V0-3"
    assert named(videos_taught=2) == "V0-2-3"
    assert named(videos_taught=3) == "V0-3-3"
    assert named(videos_taught=2, video_tasks=[]) == "V0-2"


def test_the_published_tasks_are_driven_as_published():
    config = MW7()
    config.check()
    assert len(config.robot_tasks) == 7
    assert (config.demonstrations, config.episodes, config.spread, config.video_tasks) == ([5], 25, 1.0, [])
    assert config.filmed == dict.fromkeys(MW7_TASKS, 50)
    assert {one.options for one in layouts(config, ["door-open"], "plain")} == {(("shift", "plain"), ("spread", 1.0))}
    assert config.published["AVDC"] == 0.589
    assert not MW7(robot_tasks=["door-open"]).published  # theirs are means over all seven
    assert MW7(robot_tasks=sorted(MW7_TASKS)).published


def test_speed_failures_and_wrong_words(tmp_path):
    config = replace(Config(out=str(tmp_path), **SMALL), videos=24)
    recorder = Recorder(config, 0, lambda _: None)
    lengths = {rung: [len(e) for e in recorder._film(rung)] for rung in ("V4", "V5")}
    assert len({a / b for a, b in zip(lengths["V4"], lengths["V5"])}) > 12
    last = list(recorder._film("V6"))
    stopped = sum(len(e) < length for e, length in zip(last, lengths["V4"]))
    wrong = sum(e.texts[0] not in task_language("handle-press").instructions for e in last)
    assert 2 <= stopped <= 12
    assert 2 <= wrong <= 12
    shuffled = list(recorder._film("V4-shuffled"))
    assert not [e for e in shuffled if e.texts[0] in task_language("handle-press").instructions]
    np.testing.assert_array_equal(shuffled[0]["image.front"], next(iter(recorder._film("V4")))["image.front"])


@pytest.mark.parametrize(
    "methods",
    [["cloning"], pytest.param(["model", "labelled", "tracked", "true_labels", "cloning"], marks=pytest.mark.slow)],
    ids=["cloning", "all"],
)
def test_a_cell_of_each_method_from_seeds_to_rows(tmp_path, capsys, methods):
    settings = [f"{k}={json.dumps(v)}" for k, v in SMALL.items()]
    settings += [
        f"out={tmp_path / 'out'}",
        f"methods={json.dumps(methods)}",
        "floors=[cloning]",
        "shifts=[plain,light]",
    ]
    rows = tmp_path / "rows.json"
    assert main(["bench", "lfv", *settings, "--json", str(rows)]) == 0
    table = capsys.readouterr().out
    found = json.loads(rows.read_text())
    assert {row["method"] for row in found} == {*methods, "blanked_images", "random", "other_words"}
    assert {(row["group"], row["task"]) for row in found} == {("robot", "coffee-button"), ("video", "handle-press")}
    assert {row["shift"] for row in found} == {"plain", "light"}
    assert {len(row["outcomes"]) for row in found} == {2}
    assert all(method in table for method in methods)
    page = (tmp_path / "out/report.html").read_text()
    assert all(said in page for said in (*methods, "handle-press", "Tasks that were seen as video only", "V6"))
    assert main(["bench", "lfv", *settings, "--json", str(rows)]) == 0  # everything is there
    assert json.loads(rows.read_text()) == found


def test_gains_are_over_the_same_layouts():
    common = {"demonstrations": 5, "video": "V0", "group": "video", "shift": "plain", "minutes": 1.0}
    common |= {"manifest": "m", "machine": "x"}
    row = lambda method, seed, task, *outcomes: Row(
        method=method, seed=seed, task=task, outcomes=[bool(o) for o in outcomes], **common
    )
    rows = [
        row("model", 0, "a", 0, 0, 1),
        row("model", 1, "a", 0, 1, 0),
        row("labelled", 0, "a", 1, 1, 1),
        row("labelled", 1, "a", 1, 0, 1),
        row("random", 0, "b", 0, 0, 0),  # no such row of the model
    ]
    model, labelled, random = summarise(rows)
    assert (model["successes"], model["episodes"], model["seeds"], model["gain"]) == (2, 6, 2, None)
    assert labelled["share"] == pytest.approx(5 / 6)
    gain, low, high = labelled["gain"]
    assert gain == pytest.approx(3 / 6)
    assert low <= gain <= high
    assert (labelled["low"], labelled["high"]) == pytest.approx(wilson(5, 6))
    assert random["gain"] is None


def test_floors_of_two_methods_are_two(tmp_path):
    common = {"demonstrations": 5, "video": "V0", "group": "video", "shift": "plain", "minutes": 1.0, "seed": 0}
    common |= {"manifest": "m", "machine": "x", "task": "a", "method": "blanked_images"}
    rows = [Row(floor_of=name, outcomes=[name == "model"] * 2, **common) for name in ("model", "cloning")]
    assert [(row["successes"], row["episodes"]) for row in summarise(rows)] == [(2, 2), (0, 2)]
    write_page(tmp_path / "page.html", rows, Config(), "command")
    page = (tmp_path / "page.html").read_text()
    assert all(page.count(f"blanked_images of {name}") == 2 for name in ("model", "cloning"))


def test_rows_from_before_floors_named_their_method_are_read(tmp_path):
    row = {"method": "model", "demonstrations": 50, "video": "V0", "seed": 0, "group": "robot", "task": "door-open"}
    row |= {"shift": "plain", "outcomes": [True], "minutes": 1.0, "machine": "x", "manifest": fingerprint(Config())}
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row]))
    assert read_rows(path, Config(), "model") == [Row(**row)]
    assert read_rows(path, Config(steps=501), "model") is None
    assert read_rows(path, Config(floors=["model"]), "model") is None  # they are yet to be driven
    path.write_text(json.dumps([row, row | {"method": "random"}]))
    assert len(read_rows(path, Config(floors=["model"]), "model") or ()) == 2


def test_other_words_are_never_those_of_the_task():
    heard = []
    recording = type("Recording", (), {"act": lambda self, seen: heard.extend(one.text for one in seen) or []})
    seen = lambda task: Seen(Layout(task, 0), {}, task_language(task).instructions[0], 0)
    lfv.OtherWords(recording()).act([seen(task) for task in (*TASKS, *ROBOT_TASKS)])
    for task, text in zip((*TASKS, *ROBOT_TASKS), heard, strict=True):
        assert text not in task_language(task).instructions


class Still:
    """A method that keeps a file, and never moves."""

    needs = ("truth",)

    def __init__(self, config, say):
        pass

    def train(self, data, out, seed):
        out.mkdir(parents=True, exist_ok=True)
        (out / "checkpoint").touch()
        return self

    def act(self, seen):
        return [np.zeros((1, 4)) for _ in seen]


def test_what_was_made_of_another_configuration_is_not_used(tmp_path, monkeypatch):
    """Other tasks of the same number, other steps: neither data nor checkpoints are those of another run."""
    plugins.register("methods", "still", Still)
    made, said = record_nothing(monkeypatch), []
    monkeypatch.setattr(lfv, "drive", lambda *_, **__: [])
    small = Config(**SMALL, out=str(tmp_path), methods=["still"], video=["V0", "V5"], floors=[])
    run = lambda config: lfv.run(config, said.append)
    monkeypatch.setattr(lfv, "write_page", lambda *_: None)
    run(small)
    assert said == ["still-d2-V0-s0", "still-d2-V5-s0 is left out: there is no truth"]
    run(replace(small, robot_tasks=["door-open"]))
    run(replace(small, steps=4))
    assert len({path.parent for path in made}) == 2
    trained = [path.name for path in (tmp_path / "trained").iterdir()]
    assert len(trained) == 3
    assert all(name.startswith("still-d2-V0-s0-") for name in trained)


@pytest.mark.parametrize(("needs", "there"), [((), False), (("robot", "video", "contract"), False), (("poses",), True)])
def test_poses_are_recorded_for_those_that_need_them(tmp_path, monkeypatch, needs, there):
    written = record_nothing(monkeypatch)
    monkeypatch.setitem(plugins._registered["methods"], "learner", type("Learner", (Still,), {"needs": needs}))
    monkeypatch.setattr(lfv, "drive", lambda *_, **__: [])
    monkeypatch.setattr(lfv, "write_page", lambda *_: None)
    lfv.run(Config(**SMALL, out=str(tmp_path), methods=["learner"], floors=[]), lambda _: None)
    assert [path.name for path in written] == [
        "robot2",
        "play2",
        "V0-3-true",
        "V0-3",
        *["poses2-robot-front-plain"] * there,
    ]


def test_a_method_that_needs_what_never_is_there_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(plugins._registered["methods"], "dreamer", type("Dreamer", (Still,), {"needs": ("vidoe",)}))
    with pytest.raises(ConfigError, match="methods: 'dreamer' needs 'vidoe': did you mean 'video'"):
        lfv.run(Config(out=str(tmp_path / "out"), methods=["dreamer"]))


def test_video_whose_recording_was_killed_is_recorded_again(tmp_path, monkeypatch):
    recorder = Recorder(Config(out=str(tmp_path), **SMALL), 0, lambda _: None)
    real, written = Recorder._write, []

    def dies(self, path, *args):
        written.append(path.name)
        if len(written) == 4:  # the demonstrations, the play, the truth, and then the video
            raise KeyboardInterrupt
        real(self, path, *args)

    monkeypatch.setattr(Recorder, "_write", dies)
    with pytest.raises(KeyboardInterrupt):
        recorder.data("V0", 2)
    data = recorder.data("V0", 2)
    assert written[2:] == ["V0-3-true", "V0-3", "V0-3-true", "V0-3", "poses2-robot-front-plain"]
    assert len(list(open_source(data.video))) == len(list(open_source(data.truth))) == 3
