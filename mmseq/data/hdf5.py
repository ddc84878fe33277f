"""HDF5 demonstrations as episodes: the layouts of robomimic (also LIBERO, MimicGen) and of ALOHA (also ACT).

====================  ==================================  ==============================================
here                  robomimic, one file                 ALOHA, one file per episode
====================  ==================================  ==============================================
episode               `/data/demo_<k>`                    `episode_<k>.hdf5`
`image.<cam>`         `obs/<cam>_image`, `obs/<cam>_rgb`  `/observations/images/<cam>`, raw or JPEG
`proprio`             the `robot0_...` (or `ee_...`,      `/observations/qpos`
                      `gripper_...`, `joint_...`) vectors
                      listed in PROPRIO, in that order
`action`              `actions`                           `/action`
`texts`               `language_instruction`              attribute `language_instruction`
`rate_hz`             `control_freq` of the environment   attribute `fps`; else it must be given
`success`             whether any `rewards` is positive   attribute `success`
====================  ==================================  ==============================================

Images stay as they are stored (LIBERO stores them upside down).
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmseq.embodiment import Axes, Camera, Embodiment
from mmseq.episode import Episode
from mmseq.errors import DataError, EmbodimentError, require

SUFFIXES = (".hdf5", ".h5")
PROPRIO = (
    "robot0_eef_pos",
    "robot0_eef_quat",
    "robot0_gripper_qpos",
    "robot1_eef_pos",
    "robot1_eef_quat",
    "robot1_gripper_qpos",
    "ee_pos",
    "ee_ori",
    "joint_states",
    "gripper_states",
)
_REPLACE = "fetch or record the file again, or take it out"


def _natural(name: str) -> list[Any]:
    """Sort `demo_10` behind `demo_9`."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


class Hdf5Reader:
    """robomimic or ALOHA demonstrations: a file, or a folder of files.

    rate_hz: steps per second, where the files do not say; episodes are not resampled.
    embodiment: the contract to hold the data to; default: inferred. Needs h5py.
    Raises: DataError for files of neither layout, or that are broken; DependencyError without h5py.
    """

    def __init__(self, path: str | Path, rate_hz: float | None = None, embodiment: Embodiment | None = None):
        self._h5py = require("h5py", "hdf5")
        self.path = Path(path)
        files = (
            [self.path] if self.path.is_file() else [p for p in self.path.rglob("*") if p.suffix.lower() in SUFFIXES]
        )
        files.sort(key=lambda p: _natural(p.as_posix()))
        if not files:
            raise DataError(f"{path} holds no HDF5 files", fix=f"give files ending in {', '.join(SUFFIXES)}")
        self._where: list[tuple[Path, str]] = []  # file and group of each episode; "/" for ALOHA
        self._given, self._embodiment = embodiment, None
        rates: dict[float | None, Path] = {}
        self.robot = None
        for file in files:
            with self._open(file) as root:
                if "data" in root and any(name.startswith("demo") for name in root["data"]):
                    self._where += [(file, f"data/{name}") for name in sorted(root["data"], key=_natural)]
                    stated = self._environment(root["data"])
                elif "action" in root and "observations" in root:
                    self._where.append((file, "/"))
                    fps = root.attrs.get("fps")
                    stated, self.robot = (None if fps is None else float(fps)), self.robot or "aloha"
                else:
                    raise DataError(
                        f"{file} is laid out neither as robomimic nor as ALOHA: it holds {sorted(root)[:8]}",
                        fix="convert it to LeRobot v3 (LeRobotDataset.create, add_frame, save_episode, finalize)",
                    )
                rates.setdefault(stated, file)
        stated_rates = [rate for rate in rates if rate is not None]
        if len(stated_rates) > 1:
            raise DataError(f"{self.path} mixes rates: {sorted(stated_rates)} Hz", fix="import them separately")
        stated = stated_rates[0] if stated_rates else None
        rate = stated or rate_hz or (embodiment.rate_hz if embodiment else None)
        if rate is None:
            raise DataError(
                f"{files[0]} does not say how many steps a second has", fix="give rate_hz (ALOHA records at 50)"
            )
        self.rate_hz = float(rate)
        for what, rate in (("rate_hz", rate_hz), ("the embodiment", embodiment and embodiment.rate_hz)):
            if rate and abs(rate - self.rate_hz) > 1e-6:
                raise DataError(
                    f"{self.path} runs at {self.rate_hz:g} Hz, {what} says {rate:g}",
                    fix="leave the rate as it is: HDF5 is not resampled. Convert it to LeRobot v3 for that",
                )

    def _open(self, file: Path) -> Any:
        try:
            return self._h5py.File(file, "r")
        except OSError as error:
            raise DataError(f"{file} is truncated or no HDF5 file: {error}", fix=_REPLACE) from error

    def _environment(self, data: Any) -> float | None:
        """The control rate, and as `robot` the name of the robot."""
        try:
            arguments = json.loads(data.attrs.get("env_args", "{}"))
        except ValueError:
            arguments = {}
        options = arguments.get("env_kwargs", {})
        robots = options.get("robots") or []
        name = robots if isinstance(robots, str) else "_".join(robots)
        self.robot = self.robot or name or arguments.get("env_name")
        return float(options["control_freq"]) if options.get("control_freq") else None

    def _layout(self, root: Any, group: str) -> tuple[dict[str, str], list[str], str]:
        """Paths of the cameras, of the parts of proprio, and of the actions."""
        if group == "/":
            images = root["observations"].get("images", {})
            cameras = {camera: f"observations/images/{camera}" for camera in sorted(images)}
            return cameras, ["observations/qpos"] if "qpos" in root["observations"] else [], "action"
        observed = root[group].get("obs", {})
        cameras = {}
        for name in sorted(observed):
            match = re.fullmatch(r"(.+)_(image|rgb)", name)
            if match and observed[name].ndim == 4:
                cameras[match[1]] = f"{group}/obs/{name}"
        return cameras, [f"{group}/obs/{name}" for name in PROPRIO if name in observed], f"{group}/actions"

    def _name(self, index: int) -> str:
        file, group = self._where[index]
        stem = file.stem if file == self.path else file.relative_to(self.path).with_suffix("").as_posix()
        return stem if group == "/" else f"{stem}/{group.removeprefix('data/')}"

    def __len__(self) -> int:
        return len(self._where)

    def __iter__(self) -> Iterator[Episode]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Episode:
        index = range(len(self))[index]
        file, group = self._where[index]
        with self._open(file) as root:
            try:
                cameras, proprio, action = self._layout(root, group)
                values = np.asarray(root[action], dtype=np.float32)
                parts = [np.asarray(root[part], dtype=np.float32).reshape(len(root[part]), -1) for part in proprio]
                attributes = dict(root[group].attrs) if group != "/" else dict(root.attrs)
                problem = json.loads(root["data"].attrs.get("problem_info", "{}")) if group != "/" else {}
                rewards = root[group].get("rewards") if group != "/" else None
                success = None if rewards is None else bool(np.any(np.asarray(rewards) > 0))
            except (OSError, KeyError, ValueError) as error:
                raise DataError(f"{file}, {group}: {error}", fix=_REPLACE) from error
        lengths = {"action": len(values)} | {p: len(v) for p, v in zip(proprio, parts, strict=True)}
        if len(set(lengths.values())) > 1:
            raise DataError(f"{file}, {group}: lengths differ: {lengths}", fix=_REPLACE)
        if "success" in attributes:
            success = bool(attributes["success"])
        text = attributes.get("language_instruction") or problem.get("language_instruction")
        arrays: dict[str, Any] = {}
        for camera in cameras:
            arrays[f"image.{camera}"] = lambda camera=camera: np.stack(list(self.frames(index, camera)))
        if parts:
            arrays["proprio"] = np.concatenate(parts, axis=1)
        arrays["action"] = values
        return Episode.from_arrays(
            self._name(index),
            self.rate_hz,
            arrays,
            length=len(values),
            texts=[_text(text)] if text is not None and len(text) else [],
            embodiment=self._given.name if self._given else self.robot or "unknown",
            success=success,
            source=f"{file}#{group}",
            metadata={"format": "hdf5"},
        )

    def frames(self, index: int, camera: str) -> Iterator[np.ndarray]:
        """The frames of episode `index` one at a time, uint8 (H, W, 3). Raises: DataError."""
        file, group = self._where[range(len(self))[index]]
        with self._open(file) as root:
            images = root[self._layout(root, group)[0][camera]]
            for step in range(len(images)):
                image = images[step]
                if image.ndim == 1:  # JPEG bytes, padded with zeros
                    try:
                        with Image.open(io.BytesIO(np.asarray(image, dtype=np.uint8).tobytes())) as stored:
                            image = np.asarray(stored.convert("RGB"))
                    except OSError as error:
                        raise DataError(f"{file}: {camera} of step {step} is no image", fix=_REPLACE) from error
                if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                    raise DataError(
                        f"{file}: {camera} of step {step} is {image.dtype} {image.shape}, expected uint8 RGB"
                    )
                yield image

    def embodiment(self) -> Embodiment:
        """The given contract, else one inferred with statistics over every episode."""
        if self._embodiment is None:
            self._embodiment = self._given or self._infer()
        return self._embodiment

    def _infer(self) -> Embodiment:
        file, group = self._where[0]
        with self._open(file) as root:
            cameras, proprio, _ = self._layout(root, group)
            names = [f"{p.rsplit('/', 1)[1]}_{i}" for p in proprio for i in range(int(np.prod(root[p].shape[1:])))]
        sizes = [
            Camera(name=c, height=f.shape[0], width=f.shape[1]) for c in cameras for f in [next(self.frames(0, c))]
        ]
        episodes = list(self)
        widths = {tuple(e[s].shape[1] for s in ("proprio", "action") if s in e) for e in episodes}
        if len(widths) > 1:
            raise EmbodimentError(
                f"{self.path} mixes robots: vectors of widths {sorted(widths)}", fix="import them separately"
            )
        for episode in episodes:
            for stream in ("proprio", "action"):
                if stream in episode and not np.isfinite(episode[stream]).all():
                    step, axis = np.argwhere(~np.isfinite(episode[stream]))[0]
                    value = episode[stream][step, axis]
                    raise DataError(f"{episode.source}: {stream} axis {axis} is {value} at step {step}", fix=_REPLACE)
        stack = lambda stream: np.concatenate([e[stream] for e in episodes])
        return Embodiment(
            name=self.robot or "unknown",
            rate_hz=self.rate_hz,
            cameras=tuple(sizes),
            proprio=Axes.from_values(stack("proprio"), names) if "proprio" in episodes[0] else None,
            action=Axes.from_values(stack("action")),
        )
