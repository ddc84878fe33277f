"""The benchmark of learning from video: the same on every machine, refused in time, and whole on its smallest size."""

import json
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("metaworld")

from mmseq.cli import main
from mmseq.data.sources import open_source
from mmseq.errors import ConfigError
from mmseq.evaluation.lfv import run as lfv
from mmseq.evaluation.lfv.manifest import (
    LADDER,
    MW7,
    ROBOT_TASKS,
    VIDEO_TASKS,
    Config,
    cells,
    fingerprint,
    layouts,
)
from mmseq.evaluation.lfv.record import Recorder
from mmseq.evaluation.lfv.report import summarise
from mmseq.evaluation.lfv.rows import Row
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
    assert {*ROBOT_TASKS, *VIDEO_TASKS, *MW7} <= set(TASKS)
    said = lambda tasks: {text for task in tasks for text in task_language(task).instructions}
    assert not said(ROBOT_TASKS) & said(VIDEO_TASKS)


def test_a_manifest_is_the_same_on_every_machine():
    assert fingerprint(Config()) == fingerprint(Config(out="elsewhere", seeds=[1, 2], methods=["model"]))
    assert fingerprint(Config()) != fingerprint(Config(steps=501))
    assert fingerprint(Config(**SMALL)) == "f1fbff5c7ab31494"
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
        ({"demonstrations": [0]}, r"demonstrations \[0\]"),
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
        assert (data.truth is None) == (LADDER[rung].body != "robot")
    seen = {rung: open_source(data.video)[0]["image.front"] for rung, data in ladder.items()}
    truth = open_source(ladder["V0"].truth)[0]
    assert truth["action"].shape == (len(seen["V0"]), 4)
    np.testing.assert_array_equal(truth["image.front"], seen["V0"])
    plain = seen["V0"].astype(int)
    for rung in ("V1", "V2", "V3", "V4"):  # the same layouts and motions, filmed otherwise
        assert len(seen[rung]) == len(plain)
        assert np.abs(seen[rung] - plain).mean() > 1
    robot = open_source(ladder["V0"].robot)
    assert {text for e in robot for text in e.texts} == set(task_language("coffee-button").instructions)
    assert len(list(open_source(ladder["V0"].play))) == 2


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


@pytest.mark.parametrize(
    "methods",
    [["cloning"], pytest.param(["model", "labelled", "true_labels", "cloning"], marks=pytest.mark.slow)],
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
