"""The closed loop with delays: an untrained policy, the real server, the real client and the real simulator."""

import importlib
import json
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from mmseq import plugins
from mmseq.embodiment import Axes, Camera, Embodiment, Gripper
from mmseq.errors import ConfigError
from mmseq.evaluation.closed_loop import ClosedLoopConfig, _drive, evaluate_checkpoint, splice_results
from mmseq.evaluation.results import Result
from mmseq.evaluation.splices import SpliceMeter, Splices
from mmseq.serving import Server, ServerConfig
from mmseq.serving.model_policy import ModelPolicy
from mmseq.simulation.metaworld import ACTION_NAMES, PROPRIO_NAMES, MetaWorldEnv
from mmseq.testing import tiny

mmseq_client = pytest.importorskip("mmseq_client")
pytest.importorskip("metaworld")

HORIZON = 8


def results(path: Path) -> dict[str, Result]:
    return {row["name"]: Result(**row) for row in json.loads(path.read_text())}


def axes(names, low, high) -> Axes:
    return Axes(names=names, units=("unitless",) * 4, low=low, high=high, minimum=low, maximum=high)


@pytest.fixture(scope="module")
def model():
    robot = Embodiment(
        name="sawyer",
        rate_hz=20,
        cameras=(Camera(name="front", height=64, width=64),),
        proprio=axes(PROPRIO_NAMES, (-0.8, 0.1, -0.2, -0.1), (0.8, 1.3, 1.0, 1.5)),
        action=axes(ACTION_NAMES, (-1.0,) * 4, (1.0,) * 4),
        action_form="delta",
        grippers=(Gripper(axis="gripper", open=-1.0, closed=1.0),),
    )
    return tiny.model(tiny.tokenizers((robot,)))


@pytest.fixture(scope="module")
def server(model):
    with Server(ModelPolicy(model, arrow=f"proprio -> action[{HORIZON}]"), ServerConfig(port=0)) as running:
        yield running


def drive(server, **changes):
    config = ClosedLoopConfig(tasks=["drawer-open"], episodes=1, max_steps=60, keep=0, **changes)
    return _drive((MetaWorldEnv, "policy", "drawer-open", 0, 1, asdict(config), server.port, 32))[0]


def test_without_delay_every_chunk_begins_at_once(server):
    rollout = drive(server, execute=4)
    assert (rollout.steps, rollout.requests, rollout.held) == (60, 15, 0)
    assert (
        len(rollout.splices.at_splice) == 14 == rollout.splices.splices == rollout.splices.identical
    )  # nothing was committed before any
    assert len(rollout.splices.inside) == 45
    assert rollout.seconds > 0


@pytest.mark.parametrize("mode", ["plain", "ensemble", "realtime"])
def test_with_delay_the_episode_begins_with_a_hold_and_goes_on_without(server, mode):
    rollout = drive(server, execute=4, chunking=mode, delay_ms=100)
    assert rollout.held == 2
    assert rollout.splices.splices >= 13
    if mode == "realtime":
        assert rollout.splices.identical == rollout.splices.splices
    if mode == "plain":
        assert rollout.splices.identical < rollout.splices.splices


def test_jitter_is_of_the_seed_and_realtime_stays_exact(server):
    settings = {"execute": 4, "chunking": "realtime", "delay_ms": 100, "jitter_ms": 100}
    first, second = drive(server, **settings), drive(server, **settings)
    assert first.splices == second.splices
    assert first.splices.identical == first.splices.splices > 3
    names = [result.name for result in splice_results([first, second], 0)]
    assert names == ["splice.change_mean", "splice.change_p99", "splice.committed_identical", "policy.held"]


def test_the_command_measures_a_delay(model, tmp_path, capsys):
    from mmseq.cli import main

    model.tasks = {"policy": f"proprio -> action[{HORIZON}]"}
    model.save_pretrained(tmp_path / "checkpoint")
    settings = ["--chunking", "realtime", "--execute", "4", "--delay-ms", "100", "--jitter-ms", "50"]
    where = ["--tasks", "drawer-open", "--episodes", "1", "--json", str(tmp_path / "results.json")]
    assert main(["eval", str(tmp_path / "checkpoint"), "--execute", "99", *where]) == 2
    assert "execute is 99, the policy's chunks have" in capsys.readouterr().err
    assert not main(["eval", str(tmp_path / "checkpoint"), *settings, *where])
    rows = results(tmp_path / "results.json")
    assert rows["splice.committed_identical"].value == 1
    assert rows["splice.committed_identical"].n > 10
    assert "splice.change_p99" in capsys.readouterr().out


@pytest.fixture
def simulator(tmp_path, monkeypatch):
    """The simulator of docs/extending.md, in a module of its own as a plug-in's is: workers import it anew."""
    page = Path(__file__).parents[2] / "docs/extending.md"
    (code,) = [b for b in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL) if "class Line:" in b]
    before = "import numpy as np\n\nfrom mmseq import plugins\nfrom mmseq.testing import tiny\n\n"
    code = code.replace('"line"', '"documented"')  # the page itself registers the other, where both run
    (tmp_path / "documented_simulator.py").write_text(before + code)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("documented_simulator")
    yield "documented"
    plugins._registered["simulators"].pop("documented")
    sys.modules.pop("documented_simulator")


def test_a_plug_ins_simulator_is_driven_in_its_own_tasks(simulator, tmp_path, capsys):
    from mmseq.cli import main

    made = tiny.model(tiny.tokenizers())
    made.tasks = {"policy": "image, proprio -> action[2]"}
    made.save_pretrained(tmp_path / "checkpoint")
    where = ["eval", str(tmp_path / "checkpoint"), "--simulator", simulator, "--episodes", "1"]
    assert not main([*where, "--max-steps", "7", "--baselines", "--json", str(tmp_path / "results.json")])
    rows = results(tmp_path / "results.json")
    assert "policy.success.right" in rows
    assert rows["expert_tokens.success.right"].value == 1
    assert not main([*where, "--max-steps", "3", "--baselines", "--json", str(tmp_path / "results.json")])
    rows = results(tmp_path / "results.json")
    assert rows["expert_tokens.success.right"].value == 0  # it takes six
    assert main([*where, "--tasks", "left"]) == 2
    assert "has no task 'left'" in capsys.readouterr().err


def test_a_policy_of_another_name_is_evaluated(simulator, tmp_path, capsys):
    from mmseq.cli import main

    made = tiny.model(tiny.tokenizers())
    made.tasks = {"goal": "image, image@end -> action[2]"}
    made.save_pretrained(tmp_path / "checkpoint")
    where = ["eval", str(tmp_path / "checkpoint"), "--simulator", simulator, "--episodes", "1", "--max-steps", "6"]
    assert main(where) == 2
    assert "was trained on no policy. Name one with --policy" in capsys.readouterr().err
    for policy in ("goal", "image, image@end -> action[2]"):
        assert not main([*where, "--policy", policy])
        assert "0% of 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"chunking": "rtc"}, "use one of plain, ensemble, realtime"),
        ({"delay_ms": -1.0}, "Use 0 or more"),
        ({"execute": 0}, "from 1 on"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(tmp_path, changes, words):
    config = replace(ClosedLoopConfig(tasks=["drawer-open"]), **changes)
    with pytest.raises(ConfigError, match=words):
        evaluate_checkpoint(tmp_path / "none", config)


def test_the_meter_tells_a_jump_from_a_continuation():
    contract = {"action": {"names": ["x", "g"], "low": [0.0, 0.0], "high": [2.0, 1.0]}, "gripper": {"axis": "g"}}
    meter = SpliceMeter(contract)
    first, second = np.zeros((4, 2), np.float32), np.ones((4, 2), np.float32)

    def tick(step, action, begun, sequence, asked=False):
        return mmseq_client.Tick(step, np.float32(action), False, asked, sequence, step - begun)

    meter.add(tick(0, [0, 0], 0, 1, asked=True), first)
    meter.add(tick(1, [0, 1], 0, 1), first)  # only the gripper moves
    meter.add(tick(2, [0, 1], 0, 1, asked=True), second)
    meter.add(tick(3, [1, 1], 2, 2), second)  # the new chunk begins otherwise than was executed
    meter.add(mmseq_client.Tick(4, None, True, False), second)
    meter.add(tick(5, [1, 1], 2, 2), second)
    assert meter.found == Splices(at_splice=[0.5], inside=[0.0, 0.0], splices=1, identical=0)


def test_with_a_forced_prefix_the_seam_is_after_it():
    contract = {"action": {"names": ["x"], "low": [0.0], "high": [1.0]}}
    meter = SpliceMeter(contract)
    first, second = np.zeros((4, 1), np.float32), np.float32([[0], [0], [1], [1]])
    for step, action in enumerate([0, 0, 0, 0, 1]):
        sequence, begun = (1, 0) if step < 3 else (2, 2)
        tick = mmseq_client.Tick(step, np.float32([action]), False, step in (0, 2), sequence, step - begun)
        meter.add(tick, first if step < 2 else second, 0 if step < 2 else 2)
    assert meter.found == Splices(at_splice=[1.0], inside=[0.0] * 3, splices=1, identical=1)
