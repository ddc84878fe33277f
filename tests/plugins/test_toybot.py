"""A distribution of somebody else's, installed beside mmseq: a format, a stream, a tokenizer and a policy of its own go
from a file to a robot without one edit in mmseq."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FORCES = ["fx", "fy"]


def write_log(path: Path, episodes: int = 6, steps: int = 14) -> Path:
    rng = np.random.default_rng(0)
    names = {"joints": ["j0", "j1"], "command": ["j0", "j1"], "force": FORCES}
    head = {"robot": "toybot", "size": 16, "task": "press the button", **{k: {"names": v} for k, v in names.items()}}
    lines = [json.dumps(head)]
    for episode in range(episodes):
        for step in range(steps):
            joints = np.sin([episode + 0.3 * step, 0.2 * step])
            force = rng.normal(0, 2, 2) if step > 7 else np.zeros(2)
            row = {"joints": joints, "command": np.cos(joints), "force": force}
            row = {key: value.tolist() for key, value in row.items()}
            lines.append(json.dumps({"episode": episode, "grey": 10 * step, **row}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The distribution, installed where only this test looks."""
    root = tmp_path_factory.mktemp("toybot")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target"]
    copy = root / "source"
    copy.mkdir()
    for file in (HERE / "toybot").iterdir():
        if file.is_file():
            (copy / file.name).write_text(file.read_text())
    subprocess.run([*install, str(root / "site"), str(copy)], check=True, timeout=300)
    return root


def environment(root: Path) -> dict[str, str]:
    paths = [str(root / "site"), str(ROOT), str(ROOT / "serve/client"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p), "CUDA_VISIBLE_DEVICES": ""}


def mmseq(root: Path, *arguments: object) -> str:
    command = [sys.executable, "-m", "mmseq", *map(str, arguments)]
    done = subprocess.run(
        command, env=environment(root), cwd=root, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_example_is_small():
    assert sum(len(file.read_text().splitlines()) for file in (HERE / "toybot").iterdir() if file.is_file()) <= 150


def test_from_a_file_to_a_robot(place):
    write_log(place / "toy.toylog")
    out = mmseq(place, "data", "import", "toy.toylog", "shards")
    assert "6 episodes of toybot" in out
    found = mmseq(place, "doctor")
    for part in ("toylog of mmseq-toybot", "force-levels of", "gentle of", "(mmseq_toybot:ToyReader)"):
        assert part in found
    contract = json.loads((place / "shards/embodiments/toybot.json").read_text())
    assert contract["streams"]["force"]["names"] == FORCES
    vision = {"size": 16, "patch": 4, "levels": [4, 4], "width": 16, "hidden": 16, "steps": 3, "augment": ["shift"]}
    recipe = {
        "out": "tokenizers",
        "sources": {"toy": {"path": "shards"}},
        "vision": vision,
        "vectors": {"force": {"kind": "force-levels", "levels": 9}},
        "text": {"vocab_size": 280},
        "holdout": 0.4,
    }
    (place / "tokenizers.yaml").write_text(yaml.safe_dump(recipe))
    mmseq(place, "tokenizer", "train", "tokenizers.yaml")
    stored = json.loads((place / "tokenizers/tokenizers.json").read_text())["tokenizers"]["force"]
    assert stored["kind"] == "force-levels"
    assert stored["levels"] == 9
    assert stored["largest"] > 1  # it was trained on what was felt
    arrow = "text, image, proprio, force[2] -> action[4]"
    tasks = [{"name": "policy", "task": arrow}, {"name": "feel", "task": "image, action[4] -> force[4]"}]
    mix = {"sources": {"toy": {"path": "shards"}}, "tasks": tasks, "holdout": 0.4}
    (place / "mix.yaml").write_text(yaml.safe_dump(mix))
    mmseq(place, "data", "tokenize", "mix.yaml", "tokens", "--tokenizers", "tokenizers")
    train = {
        "out": "run",
        "steps": 4,
        "data": {"mix": "mix.yaml", "tokens": "tokens", "tokenizers": "tokenizers", "row_tokens": 256, "workers": 0},
        "model": {"width": 32, "layers": 1, "heads": 2, "kv_heads": 1, "head_size": 16, "mlp": 32},
        "deepspeed": {"dtype": "fp32"},
        "range_weights": {"force": 0.5},
    }
    (place / "train.yaml").write_text(yaml.safe_dump(train))
    mmseq(place, "train", "train.yaml")
    mmseq(place, "predict", "run/checkpoint", "feel", "--episode", "shards:0", "--t", 3, "--out", "predicted")
    record = json.loads(next((place / "predicted").glob("*.json")).read_text())["streams"]["force"]
    assert record["axes"] == FORCES
    assert np.shape(record["value"]) == (4, 2)
    assert "mean_absolute_error" in record


def test_its_policy_is_served(place):
    from mmseq_client import Client

    if not (place / "run/checkpoint").is_dir():
        pytest.skip("nothing was trained")
    log = place / "serve.log"
    arguments = ["serve", "run/checkpoint", "port=0", "policy_class=gentle", "device=cpu"]
    with log.open("w") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", "mmseq", *arguments], env=environment(place), cwd=place, stdout=file, stderr=file
        )
    try:
        port = wait_for_port(server, log)
        with Client("127.0.0.1", port) as client:
            metadata = client.metadata
            assert metadata["history"] == 2
            assert "observation.force" in metadata["required_keys"]["toybot"]
            observation = {
                "prompt": "press the button",
                "observation.images.eye": np.full((16, 16, 3), 40, np.uint8),
                "observation.state": np.zeros(2, np.float32),
            }
            soft = client.infer({**observation, "observation.force": np.zeros(2, np.float32)})["actions"]
            assert soft.shape == (4, 2)
            hard = {**observation, "observation.force": np.array([2.0, 0.0], np.float32), "step": 9, "reset": True}
            assert np.isfinite(client.infer(hard)["actions"]).all()
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0


def wait_for_port(server: subprocess.Popen, log: Path) -> int:
    import re

    until = time.monotonic() + 120
    while time.monotonic() < until:
        found = re.search(r"127\.0\.0\.1:(\d+)", log.read_text())
        if found and "ready" in log.read_text():
            return int(found[1])
        assert server.poll() is None, log.read_text()
        time.sleep(0.2)
    raise AssertionError(log.read_text())
