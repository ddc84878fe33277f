"""Export: a checkpoint as a policy directory of LeRobot, for its commands with the plug-in in serve/lerobot/.

    mmseq export runs/robot/checkpoint lerobot exported
    mmseq export runs/robot/checkpoint lerobot exported --server gpu:8000       # without the weights

`config.json policy_preprocessor.json policy_postprocessor.json embodiment.json README.md`, and the checkpoint itself
in `checkpoint/` unless a server answers.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mmseq_client.contract import reads_prompt

from mmseq.embodiment import Embodiment
from mmseq.errors import ConfigError
from mmseq.model.export import require_new
from mmseq.serving.keys import IMAGES, STATE
from mmseq.serving.model_policy import ModelPolicy, required_keys
from mmseq.streams import TEXT


def export_lerobot(
    checkpoint: str | Path,
    out: str | Path,
    *,
    policy: str | None = None,
    embodiment: str | None = None,
    server: str | None = None,
    execute: int | None = None,
    passes: int | None = None,
) -> Path:
    """Write a policy directory to the new folder `out`, complete or not at all.

    policy, embodiment: as for `mmseq serve`; a LeRobot policy drives one robot. server: `HOST:PORT` that will answer.
    execute: control steps from one chunk to the next (default: half a chunk). passes: as for `mmseq serve`; a server
    has its own.
    Raises: ConfigError for what LeRobot cannot drive, CheckpointError when `out` exists.
    """
    from mmseq.data.shards import partial_folder, replace_folder

    out = Path(out).resolve()
    require_new(out)
    if server is not None:
        _require_address(server)
        if passes is not None:
            raise ConfigError("passes is the server's, which answers here", fix="give it to `mmseq serve`")
    served = ModelPolicy.from_pretrained(checkpoint, arrow=policy, embodiment=embodiment, passes=passes)
    if len(served.robots) > 1:
        raise ConfigError(
            f"the checkpoint drives several robots, and a policy of LeRobot one: {', '.join(served.robots)}",
            fix="name yours with --embodiment",
        )
    robot = next(iter(served.robots.values()))
    wanted = required_keys(served.arrow, robot)
    if unknown := [key for key in wanted if "@" in key]:
        raise ConfigError(
            f"LeRobot has no {', '.join(unknown)}, which {served.arrow} is given", fix="choose another --policy"
        )
    execute = max(1, served.horizon // 2) if execute is None else execute
    if not 1 <= execute <= served.horizon:
        raise ConfigError(f"execute is {execute}", fix=f"give 1 to {served.horizon}, the chunk's length")
    partial = partial_folder(out)
    config = policy_config(served, robot, wanted, server=server, execute=execute)
    for name, data in (("config", config), *processors(config["device"] or "cpu").items()):
        (partial / f"{name}.json").write_text(json.dumps(data, indent=2) + "\n")
    robot.save(partial / "embodiment.json")
    (partial / "README.md").write_text(_readme(served, robot, wanted, server))
    if server is None:
        shutil.copytree(checkpoint, partial / "checkpoint")
    replace_folder(partial, out)
    return out


def _require_address(server: str) -> None:
    host, _, port = server.rpartition(":")
    if not host or "/" in server or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"server is {server!r}", fix="write HOST:PORT, such as gpu:8000")


def policy_config(
    served: ModelPolicy, robot: Embodiment, wanted: list[str], *, server: str | None, execute: int
) -> dict[str, Any]:
    """`config.json`, as `lerobot_policy_mmseq.MmseqConfig` reads it."""
    assert robot.action is not None
    inputs: dict[str, Any] = {
        key: {"type": "VISUAL", "shape": [3, camera.height, camera.width]}
        for camera in robot.cameras
        if (key := IMAGES + camera.name) in wanted
    }
    told = any(segment.stream == TEXT.name for segment in served.arrow.given)
    looks = reads_prompt({"policy": str(served.arrow)})  # to plug-ins of before, which know no such setting
    if STATE in wanted and robot.proprio is not None:
        inputs[STATE] = {"type": "STATE", "shape": [len(robot.proprio)]}
    return {
        "type": "mmseq",
        "n_obs_steps": 1,
        "input_features": inputs,
        "output_features": {"action": {"type": "ACTION", "shape": [len(robot.action)]}},
        "device": None if server is None else "cpu",
        "push_to_hub": False,
        "server": server,
        "arrow": str(served.arrow),
        **({} if told == looks else {"reads_prompt": told}),
        "passes": served.passes,
        "horizon": served.horizon,
        "n_action_steps": execute,
        "rate_hz": robot.rate_hz,
        "action_feature_names": list(robot.action.names),
    }


def processors(device: str) -> dict[str, Any]:
    """LeRobot's pipelines before and after the policy, by the names of their files. Nothing is normalised in them."""
    place = lambda where: {"registry_name": "device_processor", "config": {"device": where, "float_dtype": None}}
    before = [
        {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
        {"registry_name": "to_batch_processor", "config": {}},
        place(device),
    ]
    return {
        "policy_preprocessor": {"name": "policy_preprocessor", "steps": before},
        "policy_postprocessor": {"name": "policy_postprocessor", "steps": [place("cpu")]},
    }


def _readme(served: ModelPolicy, robot: Embodiment, wanted: list[str], server: str | None) -> str:
    assert robot.action is not None
    sizes = {IMAGES + c.name: f"RGB, {c.height} x {c.width} or larger" for c in robot.cameras}
    rows = [f"| `{key}` | {sizes.get(key) or list(robot.proprio.names if robot.proprio else ())} |" for key in wanted]
    lines = [
        f"# {served.name}: a policy of mmseq for LeRobot",
        "",
        "    pip install lerobot_policy_mmseq        # serve/lerobot/ of mmseq",
        f"    lerobot-rollout --policy.path=. --fps={robot.rate_hz:g} --robot.type=... --task=...",
        "",
        f"The server at {server} answers." if server else "Runs in process, or on `--policy.server=HOST:PORT`.",
        f"Robot `{robot.name}`, {robot.rate_hz:g} Hz, chunks of {served.horizon} steps, `{served.arrow}`.",
        "",
        "| feature | |",
        "| --- | --- |",
        *rows,
        f"| `action` | {list(robot.action.names)}, {robot.action_form} |",
        "",
        "LeRobot tells a policy neither the robot's names of axes nor its rate. Before the first motion:",
        "",
        f"    python -m lerobot_policy_mmseq.check --policy=. --fps={robot.rate_hz:g} --robot.type=...",
    ]
    return "\n".join(lines) + "\n"
