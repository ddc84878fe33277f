"""The demo: bad input is refused before anything is written, and the whole loop runs, small."""

import json

import pytest

from mmseq.data.mixture import held_out, least_holdout
from mmseq.demo.config import DemoConfig
from mmseq.demo.run import run_demo
from mmseq.errors import MMSeqError


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DemoConfig(minutes=0), "minutes is 0"),
        (DemoConfig(tasks=["windw-open"]), "window-open"),
        (DemoConfig(data="nowhere"), "nowhere"),
        (DemoConfig(data="nowhere", tasks=["window-open"]), "do not go together"),
        (DemoConfig(episodes=0), "episodes is 0"),
    ],
)
def test_bad_input_leaves_nothing(tmp_path, config, message):
    config.out = str(tmp_path / "out")
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
