"""Training state on disk: written beside its name and renamed when complete; the newest complete one wins.

checkpoints/step_00000500/deepspeed/...   what DeepSpeed needs to go on (ranks write their shards)
checkpoints/step_00000500/state.json      step, data state, total steps; written last
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mmseq.data.mixture import DataState
from mmseq.data.shards import replace_folder
from mmseq.errors import CheckpointError

STATE_FILE = "state.json"
_NAME = re.compile(r"step_(\d{8})")


@dataclass
class RunState:
    """Where a run is. steps: its planned length, which `max_minutes` may have shortened."""

    step: int = 0
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    fitted: bool = False  # whether max_minutes has decided `steps`
    data: DataState = field(default_factory=DataState)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Oldest first. A folder without its state file was interrupted and does not count."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if _NAME.fullmatch(p.name) and (p / STATE_FILE).is_file())


def read_state(checkpoint: Path) -> RunState:
    try:
        data = json.loads((checkpoint / STATE_FILE).read_text())
        return RunState(**{**data["run"], "data": DataState(**data["run"]["data"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint / STATE_FILE} is damaged: {error}", fix="remove that folder") from error


def save(engine, state: RunState, folder: Path, *, rank: int, barrier, keep: int, identity: dict) -> Path:
    """Write a checkpoint from all ranks. identity: what must be the same when it is loaded."""
    final = folder / f"step_{state.step:08d}"
    partial = folder / f"{final.name}.partial"
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    engine.save_checkpoint(str(partial / "deepspeed"), tag="state", save_latest=False)
    barrier()
    if rank == 0:
        text = json.dumps({"run": asdict(state), "identity": identity}, indent=2)
        with (partial / STATE_FILE).open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        replace_folder(partial, final)
        for old in complete_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    barrier()
    return final


def _difference(key: str, there: object, here: object) -> str:
    long = max(len(str(there)), len(str(here))) > 80
    return f"the {key} differs" if long else f"{key}: {there} there, {here} here"


def load(engine, checkpoint: Path, identity: dict) -> RunState:
    """Raises: CheckpointError when the checkpoint is of another model, seed or mix."""
    read_state(checkpoint)  # a damaged file has its own message
    stored = json.loads((checkpoint / STATE_FILE).read_text()).get("identity", {})
    wrong = [_difference(k, stored.get(k), v) for k, v in identity.items() if stored.get(k) != v]
    if wrong:
        raise CheckpointError(
            f"{checkpoint} belongs to another run ({'; '.join(wrong)})",
            fix="use another out= folder, or the old settings",
        )
    try:
        path, _ = engine.load_checkpoint(str(checkpoint / "deepspeed"), tag="state")
    except Exception as error:  # whatever torch and DeepSpeed make of a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{checkpoint} is damaged: {reason}", fix="remove that folder; an older one beside it is then resumed"
        ) from error
    if path is None:
        raise CheckpointError(f"{checkpoint} could not be loaded by DeepSpeed", fix="remove that folder")
    return read_state(checkpoint)
