"""The demo: bad input is refused before anything is written, and the whole loop runs, small."""

import json
from dataclasses import replace

import pytest

from mmseq.data.mixture import held_out, least_holdout
from mmseq.demo import stages as demo_stages
from mmseq.demo.config import DemoConfig
from mmseq.demo.run import _mix, run_demo
from mmseq.demo.stages import Stages, speed_here
from mmseq.errors import MMSeqError
from mmseq.testing import tiny


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DemoConfig(minutes=0), "minutes is 0"),
        (DemoConfig(tasks=["windw-open"]), "window-open"),
        (DemoConfig(data="nowhere"), "nowhere"),
        (DemoConfig(data="nowhere", tasks=["window-open"]), "do not go together"),
        (DemoConfig(episodes=0), "episodes is 0"),
        (DemoConfig(swap_colours=["front"]), "swap_colours would change how data is read"),
    ],
)
def test_bad_input_leaves_nothing(tmp_path, config, message):
    config = replace(config, out=str(tmp_path / "out"))
    with pytest.raises(MMSeqError, match=message):
        run_demo(config)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_somebody_else_is_kept(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(MMSeqError, match="not made by a demo"):
        run_demo(DemoConfig(out=str(tmp_path), minutes=1))
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("count", [4, 9, 25, 400])
@pytest.mark.parametrize("name", ["robot", "human", "other"])
def test_a_small_dataset_holds_something_out_and_keeps_something(name, count):
    names = [f"{name}/episode-{i}" for i in range(count)]
    share = least_holdout(names)
    held = sum(held_out(episode, share) for episode in names)
    assert 1 <= held <= max(4, count // 10)
    assert held < count


@pytest.mark.parametrize(
    ("minutes", "sizes"), [(0.5, (55, 5, 2, 40)), (10, (1100, 100, 24, 800)), (30, (3300, 300, 72, 800))]
)
def test_minutes_choose_a_size_and_nothing_else_does(minutes, sizes):
    config = DemoConfig(minutes=minutes)
    assert (config.steps, config.demonstrations, config.videos, config.vision_steps) == sizes


def test_progress_says_what_is_counted(capsys, monkeypatch):
    stages = Stages()
    with stages.stage("Recording 2 expert episodes", "episodes") as update:
        update(2, 2)
    assert "recording: 2 of 2 episodes" in capsys.readouterr().err
    assert stages.seconds.keys() == {"Recording 2 expert episodes"}


def test_the_speed_of_this_machine_is_a_multiple(monkeypatch):
    monkeypatch.setattr(demo_stages, "TRIAL_S", 0.05)
    monkeypatch.setattr(demo_stages, "TRIALS_PER_S", 1.0)
    assert speed_here() > 1


def test_chunks_of_a_mix_fit_into_the_users_own_episodes(tmp_path):
    tiny.write_episodes(tmp_path / "data/episodes/robot", [tiny.episode(i, 10) for i in range(4)], (tiny.embodiment(),))
    mix = _mix(DemoConfig(data="mine"), tmp_path, ["robot"])
    arrows = {task.name: task.task for task in mix.tasks}
    assert arrows["policy"] == "text, image, proprio -> action[5]"
    assert arrows["forward_dynamics"] == "image, action[5] -> image@+5"
    assert arrows["inverse_dynamics"] == "image, image@+4 -> action[4]"


@pytest.mark.slow
def test_the_whole_loop(tmp_path):
    report = run_demo(DemoConfig(out=str(tmp_path / "demo"), minutes=0.5, tasks=["window-open"], episodes=2))
    rows = json.loads((report.parent / "results.json").read_text())
    names = {row["name"] for row in rows}
    assert {"policy.success", "forward_dynamics.psnr", "inverse_dynamics.action_error"} <= names
    assert {"value.rank_correlation", "caption.accuracy"} <= names
    keys = {"name", "value", "unit", "better", "baseline_name", "baseline_value", "n", "seed"}
    assert all(set(row) == keys for row in rows)
    text = report.read_text()
    assert "policy.success" in text or "success" in text
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert (report.parent / "checkpoint/config.json").is_file()
