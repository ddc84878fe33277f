"""HDF5 demonstrations as episodes: the layouts of robomimic (also LIBERO, MimicGen, RoboCasa) and of ALOHA (also ACT).

====================  ==================================  ==============================================
here                  robomimic, one file                 ALOHA, one file per episode
====================  ==================================  ==============================================
episode               `/data/demo_<k>`                    `episode_<k>.hdf5`
`image.<cam>`         pictures in `obs`, in any form that `pictures.py` reads: `<cam>_image`, `<cam>_rgb`,
                      `<cam>`; `/observations/images/<cam>`
`proprio`             the `robot0_...` (or `ee_...`,      `/observations/qpos`
                      `gripper_...`, `joint_...`) vectors
                      in the order of PROPRIO, or `qpos`
`action`              `actions`                           `/action`
`texts`               attributes and datasets named `language_instruction`, `instruction`, `language_raw`, ...,
                      `ep_meta` and `problem_info`; several are several phrasings
`rate_hz`             `control_freq` of the environment   attribute `fps`; else it must be given
`success`             `success`, `is_success`, ...; of robomimic also `rewards` of 0 and 1, or `dones`, where
                      they tell some demonstrations from others
action form           the controller's settings in `env_args`, else absolute, which is then said
====================  ==================================  ==============================================

`map` takes what these names do not (`data/mapping.py`), and everything unused is named in `notes`. A demonstration
without steps is left out; what one lacks, the others still have. Images stay as they are stored (LIBERO stores them
upside down).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from mmseq.data.hdf5_files import REPLACE, SPOKEN, Demo, demos_of, find_files, open_file, some
from mmseq.data.hdf5_layout import ENDS, Facts, find_streams, phrasings, texts_of, truth
from mmseq.data.mapping import Streams, taken
from mmseq.data.pictures import to_rgb
from mmseq.data.reader import DatasetReader, by_step
from mmseq.embodiment import Camera, Embodiment
from mmseq.episode import IMAGE_PREFIX, Episode, TextSpan
from mmseq.errors import DataError, did_you_mean, raise_all, require
from mmseq.streams import OWN_VECTORS


class Hdf5Reader(DatasetReader):
    """robomimic or ALOHA demonstrations: a file, or a folder of files.

    rate_hz: steps per second, where the files do not say; episodes are not resampled.
    embodiment: the contract to hold the data to; default: inferred. map: which columns fill which streams, where
    names are not the usual ones. `notes` says what was left out or assumed. Needs h5py.
    Raises: DataError when no file can be read; DependencyError without h5py. What is wrong with an episode is raised
    where that is opened.
    """

    def __init__(
        self,
        path: str | Path,
        rate_hz: float | None = None,
        embodiment: Embodiment | None = None,
        map: Streams | None = None,
    ):
        require("h5py", "hdf5")
        super().__init__(path, embodiment)
        found = [demo for file in find_files(self.path) for demo in demos_of(file, map or {})]
        if all(demo.problem for demo in found):
            raise_all([demo.problem for demo in found if demo.problem][:1])
        found = self._without(found, "no steps", lambda d: any(e.steps for e in d.entries.values()))
        self._demos = self._of_one_rate(found)
        columns = {name: entry.column for demo in reversed(self._demos) for name, entry in demo.entries.items()}
        self._fill(find_streams([d.entries for d in self._sound]), map or {}, columns, used=ENDS)
        if not any(s.startswith(IMAGE_PREFIX) or s in OWN_VECTORS for s in self.streams):
            raise DataError(
                f"{path} holds neither cameras nor states nor actions under names that are known, but "
                f"{some(self.left_out)}",
                fix="say what they are, such as --map action=NAME,proprio=NAME,image.front=NAME",
            )
        self._demos = self._without(self._demos, "none of these streams", lambda d: bool(d.arrays(self.streams)))
        self._say_what_is_missing()
        self.robot = self._one("robots", lambda facts: facts.robot)
        self._form = self._one("action forms", lambda facts: facts.action_form)
        self.rate_hz = self._rate(rate_hz)

    # ------------------------------------------------------------------ the set

    def _without(self, demos: list[Demo], why: str, wanted: Callable[[Demo], bool]) -> list[Demo]:
        """The demonstrations that are wanted; the others are named. Raises: DataError when none is."""
        kept = [demo for demo in demos if demo.problem or wanted(demo)]
        dropped = [self._name(demo) for demo in demos if not demo.problem and not wanted(demo)]
        if all(demo.problem for demo in kept):
            raise DataError(f"all {len(demos)} demonstrations of {self.path} hold {why}", fix="leave it out")
        if dropped:
            self.notes.append(f"left out, {why}: {some(dropped)}")
        return kept

    def _of_one_rate(self, demos: list[Demo]) -> list[Demo]:
        """The same, where those of another rate than more than half have are bad; a rate that is in doubt stays so."""
        rates = Counter(demo.facts.rate_hz for demo in demos if demo.facts.rate_hz is not None)
        usual, count = rates.most_common(1)[0] if rates else (None, 0)
        if 2 * count <= rates.total():
            return demos
        odd = lambda demo: DataError(
            f"{demo} runs at {demo.facts.rate_hz:g} Hz, most of {self.path} at {usual:g}",
            fix="import it separately: HDF5 is not resampled",
        )
        of_it = lambda demo: demo.facts.rate_hz in (None, usual)
        return [d if of_it(d) else Demo(d.file, d.group, {}, Facts(), odd(d)) for d in demos]

    @property
    def _sound(self) -> list[Demo]:
        return [demo for demo in self._demos if not demo.problem]

    def _say_what_is_missing(self) -> None:
        if not set(self.streams) - {"action", *SPOKEN}:
            self.notes.append("no observations; robomimic's dataset_states_to_obs.py adds them to its files")
        for stream in self.streams:
            lacking = [self._name(d) for d in self._sound if stream not in d.arrays(self.streams)]
            if lacking and stream not in SPOKEN:
                self.notes.append(f"no {stream} in {len(lacking)} of {len(self._demos)} episodes: {some(lacking)}")
        remark = next((d.facts.remark for d in self._demos if d.facts.remark), "nothing here says")
        if "action" in self.streams and not self._given and not any(d.facts.action_form for d in self._demos):
            self.notes.append(f"action_form absolute is assumed; {remark} whether actions are absolute or changes")

    def _one(self, what: str, of: Callable[[Facts], Any]) -> Any:
        """What the files say, None where none says anything. Raises: DataError where they disagree."""
        said = {of(demo.facts): demo.file.name for demo in reversed(self._demos) if of(demo.facts) is not None}
        if len(said) > 1:
            each = ", ".join(f"{value} ({name})" for value, name in said.items())
            raise DataError(f"{self.path} mixes {what}: {each}", fix="import them separately")
        return next(iter(said), None)

    def _rate(self, asked: float | None) -> float:
        own = self._given.rate_hz if self._given else None
        rate = self._one("rates", lambda facts: facts.rate_hz) or asked or own
        if rate is None:
            raise DataError(
                f"{self._demos[0].file} does not say how many steps a second has",
                fix="give rate_hz (ALOHA records at 50)",
            )
        for what, wanted in (("rate_hz", asked), ("the embodiment", own)):
            if wanted and abs(wanted - rate) > 1e-6:
                raise DataError(
                    f"{self.path} runs at {rate:g} Hz, {what} says {wanted:g}",
                    fix="leave the rate as it is: HDF5 is not resampled. Convert it to LeRobot v3 for that",
                )
        return float(rate)

    # ------------------------------------------------------------------ episodes

    def _name(self, demo: Demo) -> str:
        file = demo.file
        stem = file.stem if file == self.path else file.relative_to(self.path).with_suffix("").as_posix()
        return stem if demo.group == "/" else f"{stem}/{demo.group.removeprefix('data/')}"

    def __len__(self) -> int:
        return len(self._demos)

    def __getitem__(self, index: int) -> Episode:
        demo = self._demos[range(len(self))[index]]
        if demo.problem:
            raise demo.problem
        steps, arrays = self._steps(demo), {}
        with open_file(demo.file, demo) as root:
            group = root[demo.group]
            for stream, names in demo.arrays(self.streams).items():
                if stream.startswith(IMAGE_PREFIX):
                    arrays[stream] = partial(self._stack, index, stream.removeprefix(IMAGE_PREFIX))
                else:
                    parts = [np.asarray(group[name][:steps], dtype=np.float32).reshape(steps, -1) for name in names]
                    parts = [v[:, taken(name, v.shape[1])] for name, v in zip(names, parts)]
                    arrays[stream] = self._checked(demo, stream, np.concatenate(parts, axis=1))
            texts, spans = self._texts(demo, group, "text", steps)
            plans, stages = self._texts(demo, group, "plan", steps)
            success = self._success(demo, group)
        return Episode.from_arrays(
            self._name(demo),
            self.rate_hz,
            arrays,
            length=steps,
            texts=texts or ([] if spans else list(demo.facts.texts)),
            plans=plans,
            spans=spans + stages,
            embodiment=self._given.name if self._given else self.robot or "unknown",
            success=success,
            source=f"{demo.file}#{demo.group}",
            metadata={"format": "hdf5"},
        )

    def _steps(self, demo: Demo) -> int:
        """How many steps it has. Raises: DataError when its columns disagree."""
        streams = demo.arrays(self.streams)
        lengths = {name: demo.entries[name].steps or 0 for names in streams.values() for name in names}
        acted = {lengths[name] for name in streams.get("action", ())}
        seen = {steps for name, steps in lengths.items() if name not in streams.get("action", ())}
        if len(acted | seen) == 1 or (len(acted) == 1 and seen == {max(acted) + 1}):  # one more is seen after the last
            return max(acted or seen)
        raise DataError(f"{demo}: lengths differ: {lengths}", fix=REPLACE)

    def _texts(self, demo: Demo, group: Any, stream: str, steps: int) -> tuple[list[str], list[TextSpan]]:
        """What holds for the whole episode, and what a text per step says where it changes."""
        texts: list[str] = []
        spans: list[TextSpan] = []
        for name in self.streams.get(stream, ()):
            entry = demo.entries.get(name)
            if entry is None:
                continue
            value = group.attrs[name] if entry.attribute else group[name][()]
            per_step = entry.steps is not None and steps <= entry.steps <= steps + 1
            each = [tuple(phrasings(v)) for v in value[:steps]] if per_step else []
            if 1 < len(set(each)) < steps:
                spans += by_step(stream, each)[1]
            else:  # the same at every step; or all different, a list that is as long
                texts += texts_of(name, value)
        return list(dict.fromkeys(texts)), spans

    def _success(self, demo: Demo, group: Any) -> bool | None:
        for name in self.streams.get("success", ()):
            if name in demo.entries:
                return truth(group.attrs[name] if demo.entries[name].attribute else group[name][()])
        return self._ends.get(f"{demo}")

    @cached_property
    def _ends(self) -> dict[str, bool]:
        """Whether each demonstration was rewarded, or done. Rewards of 0 and 1 say so where there are any; `done` is
        also set when time is up, so it says so only where it is set for some and not for others."""
        for name in ENDS:
            found: dict[str, bool] = {}
            for demo in self._demos:
                if name in demo.entries:
                    with open_file(demo.file, demo) as root:
                        marks = np.asarray(root[demo.group][name], dtype=np.float64)
                    if np.isin(marks, (0, 1)).all():
                        found[f"{demo}"] = bool(marks.any())
            if any(found.values()) and (name == "rewards" or not all(found.values())):
                return found
        return {}

    def frames(self, index: int, camera: str) -> Iterator[np.ndarray]:
        """The frames of episode `index` one at a time, uint8 (H, W, 3). Raises: DataError."""
        demo = self._demos[range(len(self))[index]]
        names = demo.arrays(self.streams).get(f"{IMAGE_PREFIX}{camera}")
        if names is None:
            raise DataError(f"{demo} has no camera {camera!r}: {did_you_mean(camera, self.cameras)}")
        steps = self._steps(demo)
        with open_file(demo.file, demo) as root:
            stored = root[demo.group][names[0]]
            yield from to_rgb(lambda: (stored[step] for step in range(steps)), f"{demo}: {camera}")

    def check(self, index: int) -> None:
        """Find fault with the first picture of every camera. Raises: DataError."""
        for stream in self._demos[range(len(self))[index]].arrays(self.streams):
            if stream.startswith(IMAGE_PREFIX):
                next(self.frames(index, stream.removeprefix(IMAGE_PREFIX)))

    # ------------------------------------------------------------------ the contract

    def _infer(self) -> Embodiment:
        good = list(self._readable(self.__getitem__))
        found = {stream: [(f"episode {e.id}", e[stream]) for e in good if stream in e] for stream in self.vectors}
        axes = {stream: self._axes(stream, of, self._axis_names(stream)) for stream, of in found.items() if of}
        cameras = [self._camera(camera) for camera in self.cameras]
        return self._contract(self.robot or "unknown", cameras, axes, self._form or "absolute")

    def _checked(self, demo: Demo, stream: str, values: np.ndarray) -> np.ndarray:
        """A vector that is as wide as in most episodes, and finite. Raises: DataError."""
        if values.shape[1] != self._widths[stream]:
            raise DataError(
                f"{demo}: {stream} has {values.shape[1]} numbers, in most episodes {self._widths[stream]}",
                fix="import other robots separately",
            )
        if not np.isfinite(values).all():
            step, axis = np.argwhere(~np.isfinite(values))[0]
            raise DataError(f"{demo}: {stream} axis {axis} is {values[step, axis]} at step {step}", fix=REPLACE)
        return values

    @cached_property
    def _widths(self) -> dict[str, int]:
        """The width of each vector in most demonstrations."""
        counts: dict[str, Counter[int]] = {}
        for demo in self._demos:
            for stream, names in demo.arrays(self.streams).items():
                counts.setdefault(stream, Counter())[demo.width(names)] += 1
        return {stream: count.most_common(1)[0][0] for stream, count in counts.items()}

    def _axis_names(self, stream: str) -> list[str] | None:
        names = self.streams[stream]
        if stream == "action" and len(names) == 1:
            return None
        usual = self._widths[stream]
        holder = next(d for d in self._demos if stream in d.arrays(self.streams) and d.width(names) == usual)
        return [f"{name.rpartition('/')[2]}_{i}" for name in names for i in holder.numbers(name)]

    def _camera(self, camera: str) -> Camera:
        """A camera with the size of the first of its pictures that can be read."""
        having = [i for i, d in enumerate(self._demos) if f"{IMAGE_PREFIX}{camera}" in d.arrays(self.streams)]
        height, width = next(self._readable(lambda index: next(self.frames(index, camera)).shape[:2], having))
        return Camera(name=camera, height=height, width=width)
