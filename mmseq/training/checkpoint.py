"""Training state on disk, independent of how it was sharded; the newest complete one wins.

checkpoints/step_00000500/rank_00000.safetensors   the fragments that a rank held (`fragments.py`)
checkpoints/step_00000500/state.json               step, data state, where each fragment lies; written last

Everything is written beside its name and renamed when it is complete, so a run that is killed at any moment
leaves the checkpoints before it as they were. Any number of ranks at any ZeRO stage can go on from it, and
the weights can be read without DeepSpeed. Nothing in it is a pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from mmseq.data.mixture import DataState
from mmseq.data.shards import replace_folder
from mmseq.errors import CheckpointError
from mmseq.files import save_tensors
from mmseq.training.distributed import agree
from mmseq.training.fragments import WEIGHT, Fragment, base_optimizer, create_states, local_fragments, refresh_weights
from mmseq.training.optimizer import AVERAGE
from mmseq.training.start import in_todays_terms

STATE_FILE = "state.json"
FORMAT = 2  # of the state file and the fragments
LATE_S = 60  # that a file of another node may take to appear
_NAME = re.compile(r"step_(\d{8})")


@dataclass
class RunState:
    """Where a run is. steps: its planned length, which `max_minutes` may have shortened.

    updates: steps that changed the weights. skipped, skipped_in_a_row: those that did not, because the loss
    or its gradient was not finite, or a spike. recent_losses: what a spike is judged by. bad_samples: samples
    that could not be read.
    """

    step: int = 0
    steps: int = 0
    seconds: float = 0.0
    fitted: bool = False  # whether max_minutes has decided `steps`
    asked: tuple[int, float] = (0, 0.0)  # the recipe's steps and max_minutes when it did
    updates: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    bad_samples: int = 0
    recent_losses: list[float] = field(default_factory=list)
    data: DataState = field(default_factory=DataState)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Oldest first. A folder without its state file was interrupted and does not count."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if _NAME.fullmatch(p.name) and (p / STATE_FILE).is_file())


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint as rank 0 sees it, once every rank sees it: file systems of networks are late.

    Raises: CheckpointError on all ranks when some do not see it.
    """
    found = complete_checkpoints(folder)
    name = [found[-1].name if found else None]
    torch.distributed.broadcast_object_list(name, 0)
    if name[0] is None:
        return None
    chosen, deadline = folder / name[0], time.monotonic() + LATE_S
    while not (chosen / STATE_FILE).is_file() and time.monotonic() < deadline:
        time.sleep(0.5)
    if agree(not (chosen / STATE_FILE).is_file()):
        raise CheckpointError(f"not every rank sees {chosen}", fix="give out= on a file system that all nodes share")
    return chosen


def _read(checkpoint: Path) -> dict[str, Any]:
    try:
        return json.loads((checkpoint / STATE_FILE).read_text())
    except (OSError, ValueError) as error:
        raise _damaged(checkpoint, str(error)) from error


def _damaged(checkpoint: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint} is damaged: {reason}", fix="remove that folder; an older one beside it is then resumed"
    )


def read_state(checkpoint: Path) -> RunState:
    data = _read(checkpoint)
    if data.get("format") != FORMAT:
        raise CheckpointError(
            f"{checkpoint} was written by another version of mmseq", fix="let that version finish the run"
        )
    try:
        state = RunState(**{**data["run"], "data": DataState(**data["run"]["data"])})
        steps, minutes = state.asked
        state.asked = (steps, minutes)
        counts = (state.step, state.steps, state.updates, state.data.block, state.data.row)
        if not all(isinstance(n, int) and 0 <= n < 1 << 62 for n in counts) or not isinstance(data["identity"], dict):
            raise ValueError(f"step, steps, updates, block and row are {counts}")
        if state.step != int(checkpoint.name.removeprefix("step_")):
            raise ValueError(f"it says step {state.step}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(checkpoint, f"{STATE_FILE}: {error}") from error
    return state


def save(
    engine: Any,
    model: nn.Module,
    state: RunState,
    folder: Path,
    *,
    identity: dict,
    keep: int,
    milestone_every: int = 0,
) -> Path:
    """Write a checkpoint from all ranks. identity: what must be the same when it is loaded.

    keep: how many to keep; those whose step is a multiple of `milestone_every` stay besides.
    Raises: CheckpointError on every rank when one cannot write; what was there before is untouched.
    """
    final = folder / f"step_{state.step:08d}"
    partial = folder / f"{final.name}.partial"
    rank = torch.distributed.get_rank()
    written: dict[str, str] = {}

    def begin() -> None:
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob("step_*.partial"):
                shutil.rmtree(leftover)
            partial.mkdir()

    def write() -> None:
        path = partial / _file_of(rank)
        _write_fragments(path, local_fragments(engine, model))
        written[path.name] = _sha256(path)

    def finish() -> None:
        everywhere: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everywhere, written)
        if rank == 0:
            sums = {name: digest for part in everywhere for name, digest in part.items()}
            shapes = {n: list(getattr(p, "ds_shape", p.shape)) for n, p in model.named_parameters() if p.requires_grad}
            index = _index([partial / _file_of(r) for r in range(torch.distributed.get_world_size())], shapes)
            _write_text(
                partial / STATE_FILE,
                json.dumps(
                    {"run": asdict(state), "identity": identity, "sha256": sums, "format": FORMAT, **index}, indent=1
                ),
            )
            replace_folder(partial, final)
            _sync(folder)
            _rotate(folder, keep, milestone_every)

    for part in (begin, write, finish):
        problem = _attempt(part)
        if agree(problem is not None):
            if rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            newest = complete_checkpoints(folder) if folder.is_dir() else []
            raise CheckpointError(
                f"the checkpoint {final} could not be written: {problem or 'another rank could not write its part'}",
                fix=f"mend that (free space, permissions), then run the same command again; {_newest(newest)}",
            )
    return final


def _newest(found: list[Path]) -> str:
    return f"it goes on from {found[-1]}" if found else "there is no earlier checkpoint"


def _attempt(part: Callable[[], None]) -> str | None:
    """Why it could not be done; None when it was."""
    try:
        part()
    except Exception as error:  # safetensors has its own for a full disk
        return str(error) or type(error).__name__
    return None


def _file_of(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_fragments(path: Path, fragments: list[Fragment]) -> None:
    tensors: dict[str, Tensor] = {}
    starts: dict[str, int] = {}
    for f in fragments:
        starts[f.name] = f.start
        for key, view in f.tensors.items():
            tensors[f"{f.name}|{key}"] = view.detach().to("cpu", torch.float32).contiguous()
    save_tensors(tensors, path, {"starts": json.dumps(starts)})
    _sync(path)


def _write_text(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Make sure that what was written survives the machine."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _index(files: list[Path], shapes: dict[str, list[int]]) -> dict[str, Any]:
    """Where each parameter lies: `fragments` {name: [[start, length, file], ...]}, and what is kept of it."""
    found: dict[str, list[list[int]]] = {name: [] for name in shapes}
    keys: dict[str, set[str]] = {name: set() for name in shapes}
    for number, path in enumerate(files):
        with safe_open(path, "pt") as file:
            starts = json.loads(file.metadata()["starts"])
            for full in file.keys():  # noqa: SIM118 (it is no dict)
                name, key = full.rsplit("|", 1)
                keys[name].add(key)
                if key == WEIGHT:
                    found[name].append([starts[name], file.get_slice(full).get_shape()[0], number])
    for name, shape in shapes.items():
        size = 1
        for n in shape:
            size *= n
        if sum(length for _, length, _ in found[name]) != size:
            raise CheckpointError(f"the ranks hold {found[name]} of {name}, which has {size} elements")
    return {
        "files": {path.name: path.stat().st_size for path in files},
        "shapes": shapes,
        "keys": {name: sorted(k) for name, k in keys.items()},
        "fragments": {name: sorted(pieces) for name, pieces in found.items()},
    }


def _rotate(folder: Path, keep: int, milestone_every: int) -> None:
    found = complete_checkpoints(folder)
    for old in found[:-keep]:
        if milestone_every and int(old.name.removeprefix("step_")) % milestone_every == 0:
            continue
        (old / STATE_FILE).unlink()  # first: from here on it does not count, whatever happens
        shutil.rmtree(old)
    for broken in folder.iterdir():  # left by a rotation that was interrupted
        if _NAME.fullmatch(broken.name) and broken not in found and not (broken / STATE_FILE).is_file():
            shutil.rmtree(broken)


class StoredTensors:
    """Reads any piece of any parameter of a checkpoint, whatever ranks wrote it."""

    def __init__(self, checkpoint: Path):
        """Raises: CheckpointError when a file is missing or cut short."""
        self.checkpoint = checkpoint
        data = _read(checkpoint)
        try:
            self.shapes: dict[str, list[int]] = data["shapes"]
            self.keys: dict[str, list[str]] = data["keys"]
            self._fragments = data["fragments"]
            files, self._sha256 = dict(data["files"]), dict(data["sha256"])
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(checkpoint, f"{STATE_FILE} lacks {error}") from error
        for name, size in files.items():
            path = checkpoint / name
            if not path.is_file() or path.stat().st_size != size:
                raise _damaged(checkpoint, f"{name} is missing or does not have its {size} bytes")
        self._paths = [checkpoint / name for name in files]
        self._open: dict[int, Any] = {}

    def _file(self, number: int) -> Any:
        """Opened once, when something of it is wanted: a rank needs few of the files that many ranks wrote."""
        if number not in self._open:
            self._open[number] = safe_open(self._paths[number], "pt")
        return self._open[number]

    def verify(self, part: int, parts: int) -> None:
        """Read every `parts`-th file from the `part`-th on. Raises: CheckpointError for one that was changed."""
        for path in self._paths[part::parts]:
            try:
                same = _sha256(path) == self._sha256.get(path.name)
            except OSError as error:
                raise _damaged(self.checkpoint, f"{path.name}: {error.strerror}") from error
            if not same:
                raise _damaged(self.checkpoint, f"{path.name} is not what was written")

    def piece(self, name: str, key: str, start: int, length: int) -> Tensor:
        """fp32 (length,): elements start .. start + length - 1 of a flattened parameter or its state."""
        out = torch.empty(length)
        filled = 0
        for first, count, number in sorted(self._fragments[name]):
            if first > start + filled:
                break  # a hole
            low, high = max(start, first), min(start + length, first + count)
            if low < high:
                try:
                    stored = self._file(number).get_slice(f"{name}|{key}")
                    out[low - start : high - start] = stored[low - first : high - first]
                except Exception as error:  # of safetensors: it has several
                    raise _damaged(self.checkpoint, f"{name} {key}: {error}") from error
                filled += high - low
        if filled != length:
            raise _damaged(self.checkpoint, f"{name} {key} has {filled} of {length} elements")
        return out

    def whole(self, name: str, key: str = WEIGHT) -> Tensor:
        shape = self.shapes[name]
        return self.piece(name, key, 0, int(torch.Size(shape).numel())).view(shape)

    def weights(self, *, averaged: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Every parameter in fp32. averaged: the moving average where one was kept."""
        for name, keys in self.keys.items():
            yield name, self.whole(name, AVERAGE if averaged and AVERAGE in keys else WEIGHT)


def _difference(key: str, there: object, here: object) -> str:
    long = max(len(str(there)), len(str(here))) > 80
    return f"the {key} differs" if long else f"{key}: {there} there, {here} here"


def load(engine: Any, model: nn.Module, checkpoint: Path, identity: dict) -> RunState:
    """Go on from a checkpoint, whatever ranks and ZeRO stage wrote it.

    Raises: CheckpointError, on all ranks together, when it is of another model, seed or mix, or damaged.
    """
    state, problem = RunState(), None
    try:
        state = _read_into(engine, model, checkpoint, identity)
    except CheckpointError as error:
        problem = error
    if agree(problem is not None):
        raise problem or CheckpointError(f"another rank could not read {checkpoint}; it says why")
    refresh_weights(engine)
    return state


def require_same(checkpoint: Path, identity: dict) -> RunState:
    """Where the run of a checkpoint is. Raises: CheckpointError when it is another run, or damaged."""
    state = read_state(checkpoint)
    stored = in_todays_terms(_read(checkpoint).get("identity", {}))
    wrong = [_difference(k, stored.get(k), v) for k, v in identity.items() if stored.get(k) != v]
    if wrong:
        raise CheckpointError(
            f"{checkpoint} belongs to another run ({'; '.join(wrong)})",
            fix="use another out= folder, or the old settings",
        )
    return state


def _read_into(engine: Any, model: nn.Module, checkpoint: Path, identity: dict) -> RunState:
    state = require_same(checkpoint, identity)
    tensors = StoredTensors(checkpoint)
    tensors.verify(torch.distributed.get_rank(), torch.distributed.get_world_size())
    unwanted = {WEIGHT} if base_optimizer(engine).average_decay else {WEIGHT, AVERAGE}
    create_states(engine, model, {name: set(keys) - unwanted for name, keys in tensors.keys.items()}, state.updates)
    for f in local_fragments(engine, model, replicas=True):
        for key, view in f.tensors.items():
            if key in tensors.keys.get(f.name, ()):
                view.copy_(tensors.piece(f.name, key, f.start, f.length))
    return state
