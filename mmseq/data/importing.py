"""Import: any supported dataset becomes episode shards, the form that everything after it reads.

    mmseq data import SRC OUT [--rate-hz 5] [--size 128] [--map action=actions] [--skip-bad 3]

    from mmseq.data.importing import EpisodeShardReader, import_episodes
    import_episodes("path/to/lerobot", "shards", size=128)
    episode = EpisodeShardReader("shards")[0]

One sample of a shard holds:

====================  =======================================================================
`json`                id, rate_hz, length, texts, plans, spans, embodiment, success, source, metadata
`<stream>.npy`        float32 (steps, axes): `proprio`, `action` and further vectors of the embodiment
`image.<camera>.mp4`  h264 4:4:4 at 40 dB or more, one frame per step
====================  =======================================================================

The embodiments stand beside them as `embodiments/<name>.json`, their fingerprints in the manifest, with `map` (what
its owner said of columns), `left_out` (columns that nothing uses), `notes`, and `skipped` (episodes that are bad).
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmseq.data.changed import Successful, SwappedColours
from mmseq.data.contract import complete, doubts_about, read_contract
from mmseq.data.hdf5_files import HDF5_SUFFIXES
from mmseq.data.reader import EpisodeSource
from mmseq.data.shards import ShardReader, ShardWriter, decode_npy, holds_shards
from mmseq.data.video import VideoDecoder, decode_video
from mmseq.data.video_folder import VIDEO_SUFFIXES
from mmseq.embodiment import Camera, Embodiment
from mmseq.episode import IMAGE_PREFIX, Episode, TextSpan
from mmseq.errors import DataError, DependencyError, EpisodeError, FingerprintError, MMSeqError, did_you_mean
from mmseq.mp4 import encode_video
from mmseq.plugins import GROUPS, find, names
from mmseq.reading import AS_IT_IS, Reading
from mmseq.streams import TEXT, of_kind

log = logging.getLogger("mmseq")

MOST_BAD = 20  # episodes that are looked for, and listed, before an import is given up
SKIP = "--skip-bad {count}"  # how to leave out so many
_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_TO_LEROBOT = "convert it to LeRobot first (LeRobotDataset.create, add_frame, save_episode, finalize) and import that"


def detect_format(src: str | Path) -> str:
    """The name of a reader. Raises: DataError that says what was found instead, and the way out."""
    src = Path(src)
    for name in names("readers") if src.exists() else ():
        if name in GROUPS["readers"]:  # known by what lies there, below, without being imported
            continue
        try:
            reader = find("readers", name)
        except DependencyError as error:
            log.warning("%s", error)
            continue
        if hasattr(reader, "detects") and reader.detects(src):
            return name
    if not src.exists():
        raise DataError(f"{src} does not exist", fix="give a LeRobot dataset, HDF5 files or a folder of videos")
    if src.is_file():
        suffix = src.suffix.lower()
        if suffix in VIDEO_SUFFIXES:
            return "video"
        if suffix in HDF5_SUFFIXES:
            return "hdf5"
        raise DataError(f"{src} is neither a video nor HDF5", fix=_TO_LEROBOT)
    if (src / "meta" / "info.json").is_file() or (src / "meta_data" / "info.json").is_file():
        return "lerobot"
    if holds_shards(src):
        raise DataError(f"{src} holds shards already", fix="use it as it is")
    inner = [p.parent.parent.name for p in sorted(src.glob("*/meta/info.json"))]
    inner += [p.name for p in sorted(src.iterdir()) if holds_shards(p)]
    if inner:
        raise DataError(f"{src} is a folder of datasets", fix=f"name one of them: {', '.join(inner[:8])}")
    found = {"lerobot": 0, "hdf5": 0, "video": 0, "rlds": 0}
    for path in src.rglob("*"):
        found["hdf5"] += path.suffix.lower() in HDF5_SUFFIXES
        found["video"] += path.suffix.lower() in VIDEO_SUFFIXES
        found["rlds"] += ".tfrecord" in path.name
    if found["rlds"]:
        raise DataError(f"{src} is RLDS (tfrecord files), which is not supported yet", fix=_TO_LEROBOT)
    if found["hdf5"] and found["video"]:
        raise DataError(f"{src} holds both HDF5 files and videos", fix="say which with format='hdf5' or format='video'")
    if found["hdf5"] or found["video"]:
        return "hdf5" if found["hdf5"] else "video"
    raise DataError(
        f"{src} holds no dataset that is known", fix="give a LeRobot dataset, HDF5 files or a folder of videos"
    )


def open_episodes(
    src: str | Path,
    reading: Reading = AS_IT_IS,
    *,
    format: str | None = None,
    rate_hz: float | None = None,
    embodiment: Embodiment | None = None,
) -> EpisodeSource:
    """A reader of the dataset at `src`; format: its name among the readers, default: what is found there.

    Raises: DataError for an unknown format, or what the reader finds wrong.
    """
    format = format or detect_format(src)
    if format == "rlds":
        raise DataError("RLDS is not supported yet", fix=_TO_LEROBOT)
    if format not in names("readers"):
        raise DataError(f"format {format!r} is unknown: {did_you_mean(format, names('readers'))}")
    found = find("readers", format)(src, rate_hz=rate_hz, embodiment=embodiment, map=reading.map)
    found = SwappedColours(found, reading.swap_colours) if reading.swap_colours else found
    return Successful(found) if reading.assume_success else found


def square(frame: np.ndarray, size: int) -> np.ndarray:
    """Crop the largest centred square of uint8 (H, W, 3) and scale it to (size, size, 3), as `fitted` does."""
    return fitted(frame, size, size)


def fitted(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """Crop the largest centred part of that shape of uint8 (H, W, 3) and scale it to (height, width, 3).

    Shrinking averages areas; enlarging interpolates bicubically. As `mmseq_client.images.fit` has it, on robots.
    """
    if frame.shape[:2] == (height, width):
        return frame
    scale = min(frame.shape[0] / height, frame.shape[1] / width)
    crop_h, crop_w = round(scale * height), round(scale * width)
    top, left = (frame.shape[0] - crop_h) // 2, (frame.shape[1] - crop_w) // 2
    how = Image.Resampling.BOX if scale >= 1 else Image.Resampling.BICUBIC
    box = (left, top, left + crop_w, top + crop_h)
    return np.asarray(Image.fromarray(frame).resize((width, height), how, box=box))


def import_episodes(
    src: str | Path,
    out: str | Path,
    reading: Reading = AS_IT_IS,
    *,
    format: str | None = None,
    rate_hz: float | None = None,
    embodiment: Embodiment | str | Path | None = None,
    size: int | None = None,
    name: str | None = None,
    overwrite: bool = False,
    skip_bad: int = 0,
    say: Callable[[str], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write the episodes of `src` as shards to `out`, and return their manifest.

    rate_hz: steps per second, see the reader of the format; default: the source's. embodiment: the contract to hold the
    data to, with the cameras of the source, or the file of one, or of the answers of a form (`contract.py`). size: crop
    every frame to its largest centred square and scale it to size x size; the stored contract says so. name: of it;
    default: the name of `src`. skip_bad: leave out up to so many episodes that are bad. say: is told what is odd, what
    is left out, and what is bad as it is found. on_progress: called as (episodes done, episodes in all).
    Raises: DataError for a broken source, an existing `out`, or more bad episodes than `skip_bad`, all named: an
    episode is bad when it cannot be read, or has a value that is not finite or outside the embodiment's limits.
    """
    if size is not None and size < 8:
        raise DataError(f"size is {size} pixels", fix="give at least 8")
    if rate_hz is not None and not 0.01 <= rate_hz <= 10_000:
        raise DataError(f"rate_hz is {rate_hz:g}", fix="give steps per second, 0.01 to 10000")
    if skip_bad < 0:
        raise DataError(f"skip_bad is {skip_bad}", fix="give how many bad episodes may be left out")
    open_as = partial(open_episodes, src, reading, format=format, rate_hz=rate_hz)
    answers = read_contract(embodiment) if isinstance(embodiment, (str, Path)) else embodiment
    if isinstance(answers, dict):
        source = open_as()
        inferred = source.embodiment()
        if inferred is None:
            raise DataError(f"{src} has no robot that {embodiment} could describe", fix="leave the embodiment out")
        held = complete(inferred, answers, where=str(embodiment), values=values_of(source, inferred))
    else:
        held = answers
    source = open_as(embodiment=held)
    name = name or Path(src).resolve().name
    said = {"swap_colours": reading.swap_colours, "assume_success": reading.assume_success}
    said["map"] = {stream: list(columns) for stream, columns in reading.map.items()}
    options = {"size": size, "overwrite": overwrite, "skip_bad": skip_bad, "say": say, "on_progress": on_progress}
    options["stated"] = held is not None or (Path(src) / "meta" / "embodiment.json").is_file()
    return write_episodes(source, out, {"name": name, "source": str(src), **said}, **options)


def write_episodes(
    source: EpisodeSource,
    out: str | Path,
    manifest: dict[str, Any],
    *,
    size: int | None = None,
    overwrite: bool = False,
    skip_bad: int = 0,
    stated: bool = True,
    say: Callable[[str], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write the episodes of a reader as shards to `out`, and return their manifest: `manifest` (its `name`, its
    `source`, ...) and what was found. stated: whether somebody has said what the contract is; of an inferred one is
    noted what it takes for granted. The other arguments, and what it raises, are those of `import_episodes`."""
    say = say or (lambda _: None)
    with ShardWriter(out, {"kind": "episodes", "tokenizers": {}, **manifest}, overwrite=overwrite) as writer:
        robot = source.embodiment()
        for note in notes_of(source):
            say(note)
        _, bad = survey(source, robot, skip_bad, manifest["source"], say)
        doubts = [] if stated or robot is None else doubts_about(robot)
        for note in doubts:
            say(note)
        stored = stored_contract(robot, size)
        if stored is not None:
            data = json.dumps(stored.to_dict(), indent=2) + "\n"
            writer.add_file(f"embodiments/{_file_name(stored.name)}.json", data.encode())
        total = len(source)
        for index in range(total):
            if index not in bad.found:
                bad.attempt(index, lambda index=index: _import_one(writer, source, index, robot, size))
            if on_progress is not None:
                on_progress(index + 1, total)
        bad.settle()
        writer.manifest |= {
            "embodiments": {stored.name: stored.fingerprint} if stored else {},
            "left_out": sorted(getattr(source, "left_out", ())),
            "notes": [*notes_of(source), *doubts],
            "skipped": {str(index): reason for index, reason in bad.found.items()},
        }
        return writer.close()


class EpisodeList:
    """Episodes at hand, as a reader. contract: of the robot that they are of; None for video."""

    def __init__(self, episodes: Sequence[Episode], contract: Embodiment | None = None):
        self.episodes, self._contract = list(episodes), contract

    def __len__(self) -> int:
        return len(self.episodes)

    def __getitem__(self, index: int) -> Episode:
        return self.episodes[index]

    def embodiment(self) -> Embodiment | None:
        return self._contract

    def frames(self, index: int, camera: str) -> Iterator[np.ndarray]:
        return iter(self.episodes[index][f"{IMAGE_PREFIX}{camera}"])


def values_of(source: EpisodeSource, robot: Embodiment) -> dict[str, np.ndarray]:
    """The values of each vector stream in the episodes that can be read."""
    found: dict[str, list[np.ndarray]] = {}
    for index in range(len(source)):
        with suppress(MMSeqError):
            episode = source[index]
            for stream in robot.vectors:
                if stream in episode:
                    found.setdefault(stream, []).append(episode[stream])
    return {stream: np.concatenate(values) for stream, values in found.items()}


def notes_of(source: EpisodeSource) -> list[str]:
    """What a reader has to say: columns that nothing uses, and what is odd. Complete after `embodiment()`."""
    return list(getattr(source, "notes", ()))


def stored_contract(robot: Embodiment | None, size: int | None) -> Embodiment | None:
    """The contract of episodes whose frames are scaled to size x size."""
    if robot is None or size is None:
        return robot
    return replace(robot, cameras=tuple(Camera(name=c.name, height=size, width=size) for c in robot.cameras))


def survey(
    source: EpisodeSource,
    robot: Embodiment | None,
    skip_bad: int,
    where: str,
    say: Callable[[str], None],
    how: str = SKIP,
) -> tuple[list[dict[str, Any]], BadEpisodes]:
    """What the index of shards would know of each episode that is not bad, found without decoding pictures.

    how: to leave out `{count}` of them.
    Raises: DataError for more than `skip_bad` episodes that are bad, all named.
    """
    notes: list[dict[str, Any]] = []
    bad = BadEpisodes(len(source), skip_bad, where, say, how)
    for index in range(len(source)):
        bad.attempt(index, lambda index=index: notes.append(_check_one(source, index, robot)))
    bad.settle()
    return notes, bad


class BadEpisodes:
    """The episodes that cannot be read, by number, and why; a budget of them may be left out."""

    def __init__(self, total: int, budget: int, where: str, say: Callable[[str], None], how: str = SKIP):
        self.total, self.budget, self.where, self.say, self.how = total, budget, where, say, how
        self.found: dict[int, str] = {}

    def attempt(self, index: int, work: Callable[[], None]) -> None:
        """Do the work on an episode, and take it for bad when that fails. Raises: DataError when there are too many."""
        try:
            work()
        except MMSeqError as error:
            self.found[index] = str(error)
            self.say(f"bad, {'left out' if len(self.found) <= self.budget else 'looking for more'}: {error}")
            if len(self.found) > max(self.budget, MOST_BAD):
                self.settle()

    def settle(self) -> None:
        """Raises: DataError that lists what was found, when that is more than may be left out, or all there is."""
        count = len(self.found)
        if not count or (count <= self.budget and count < self.total):
            return
        reasons = " / ".join(reason.rstrip(".") for reason in list(self.found.values())[:MOST_BAD])
        if self.total == 1 or (count == self.total and len(set(self.found.values())) == 1):
            raise DataError(f"no episode of {self.where} can be read: {reasons.split(' / ')[0]}")
        leave = f"leave them out with {self.how.format(count=count)}"
        fix = leave if count < self.total else "not one is left: correct the data"
        raise DataError(f"{count} of {self.total} episodes of {self.where} are bad: {reasons}", fix=fix)


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)


def _vectors(source: EpisodeSource, index: int, robot: Embodiment | None) -> tuple[Episode, str, dict[str, Any]]:
    """An episode, what errors call it, and its vectors as members, held to the contract."""
    episode = source[index]
    where = f"episode {episode.id!r} ({episode.source})"
    members: dict[str, Any] = {}
    for stream in episode.streams:
        if stream.startswith(IMAGE_PREFIX):
            continue
        axes = robot.vectors.get(stream) if robot else None
        if axes is None:
            raise EpisodeError(f"{where} has {stream}, its embodiment has none", fix="correct the embodiment")
        members[f"{stream}.npy"] = axes.check(episode[stream], what=stream, where=where)
    return episode, where, members


def _check_one(source: EpisodeSource, index: int, robot: Embodiment | None) -> dict[str, Any]:
    """Everything that can be known of an episode without decoding its pictures, and what the index says of it."""
    episode, where, members = _vectors(source, index, robot)
    acts = members or episode.embodiment is not None  # else it is video, of any rate
    if robot and acts and abs(episode.rate_hz - robot.rate_hz) > 1e-6:  # the robot would move at another speed
        raise EpisodeError(
            f"{where} has {episode.rate_hz:g} steps per second, its embodiment {robot.name!r} says {robot.rate_hz:g}",
            fix="let the reader resample it to that rate, or correct rate_hz in the embodiment",
        )
    for camera in episode.cameras:
        if not _NAME.fullmatch(camera):
            raise DataError(
                f"{where}: camera {camera!r} has a name that cannot be stored",
                fix="name it with --map image.NAME=COLUMN",
            )
    if check := getattr(source, "check", None):
        check(index)
    return _note(episode)


def _note(episode: Episode) -> dict[str, Any]:
    """What the index of shards says of an episode."""
    note = {key: getattr(episode, key) for key in ("id", "rate_hz", "embodiment", "success")}
    note |= {"length": len(episode), "streams": list(episode.streams)}
    note |= {f"{name}s": 1 for name in of_kind(TEXT) if name in episode.metadata}  # a question, and its answer
    note |= {"texts": len(episode.texts), "plans": len(episode.plans)}
    return note | {"spans": sorted({span.stream for span in episode.spans})}


def _import_one(
    writer: ShardWriter, source: EpisodeSource, index: int, robot: Embodiment | None, size: int | None
) -> None:
    episode, where, members = _vectors(source, index, robot)
    sizes = {camera.name: (camera.height, camera.width) for camera in robot.cameras} if robot and not size else {}
    for camera in episode.cameras:
        frames = _checked(source.frames(index, camera), sizes.get(camera), f"{where}, camera {camera!r}")
        data, count = encode_video((square(f, size) for f in frames) if size else frames, episode.rate_hz)
        if count != len(episode):
            raise DataError(
                f"{where}: camera {camera!r} has {count} frames for {len(episode)} steps", fix="repair the dataset"
            )
        members[f"{IMAGE_PREFIX}{camera}.mp4"] = data
    fields = ("id", "rate_hz", "texts", "plans", "embodiment", "success", "source", "metadata")
    head = {field: getattr(episode, field) for field in fields} | {"length": len(episode)}
    head["spans"] = [[span.stream, span.start, span.stop, list(span.texts)] for span in episode.spans]
    writer.add(f"{index:08d}", {"json": head} | members, metadata=_note(episode))


def _checked(frames: Iterator[np.ndarray], expected: tuple[int, int] | None, where: str) -> Iterator[np.ndarray]:
    for frame in frames:
        if expected is not None and frame.shape[:2] != expected:
            raise DataError(
                f"{where}: frames have (height, width) {frame.shape[:2]}, the embodiment says {expected}",
                fix="import with --size, which makes all of them equal, or correct the sizes in the embodiment",
            )
        yield frame


class EpisodeShardReader:
    """Episode shards as episodes: `len()`, `[i] -> Episode`, iteration. Streams are read when first used.

    `embodiments` holds the contracts by name; `metadata[i]` says what the index knows of an episode
    (id, length, rate_hz, embodiment, success, streams, numbers of texts and plans) without opening it.
    Raises: DataError for a directory that is broken or holds something else.
    """

    def __init__(self, directory: str | Path):
        self.shards = ShardReader(directory, kind="episodes")
        self.directory = self.shards.directory
        self.embodiments: dict[str, Embodiment] = {}
        listed = self.shards.manifest.get("embodiments") or {}
        if not isinstance(listed, dict):
            raise DataError(
                f"{self.directory}: the manifest lists embodiments as {listed!r:.80}", fix="import it again"
            )
        for name, fingerprint in listed.items():
            file = f"embodiments/{_file_name(name)}.json"
            try:
                robot = Embodiment.from_dict(json.loads(self.shards.read_file(file)))
            except ValueError as error:
                raise DataError(f"{self.directory / file} is corrupt: {error}", fix="write the shards again") from error
            if robot.fingerprint != fingerprint:
                raise FingerprintError(
                    f"{self.directory / file} has fingerprint {robot.fingerprint}, the manifest says {fingerprint}",
                    fix="write the shards again",
                )
            self.embodiments[name] = robot

    @property
    def manifest(self) -> dict[str, Any]:
        return self.shards.manifest

    @property
    def metadata(self) -> list[dict[str, Any]]:
        return self.shards.metadata

    def embodiment(self) -> Embodiment | None:
        """The only contract, or None. Raises: DataError when there are several."""
        if len(self.embodiments) > 1:
            raise DataError(
                f"{self.directory} holds several embodiments: {sorted(self.embodiments)}", fix="use .embodiments"
            )
        return next(iter(self.embodiments.values()), None)

    def __len__(self) -> int:
        return len(self.shards)

    def __iter__(self) -> Iterator[Episode]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Episode:
        index = range(len(self))[index]
        shards = self.shards
        head = shards.read(index, ["json"])["json"]
        arrays: dict[str, Any] = {}
        try:
            length = int(head["length"])
            for extension in shards.members(index):
                if extension.endswith(".mp4"):
                    arrays[extension.removesuffix(".mp4")] = lambda extension=extension: decode_video(
                        shards.read_bytes(index, extension), length, shards.where(index, extension)
                    )
                elif extension.endswith(".npy"):
                    arrays[extension.removesuffix(".npy")] = lambda extension=extension: decode_npy(
                        shards.read_bytes(index, extension), shards.where(index, extension)
                    )
            fields = ("texts", "plans", "embodiment", "success", "source", "metadata")
            kept: dict[str, Any] = {field: head[field] for field in fields}
            kept["spans"] = [TextSpan(s, int(a), int(b), tuple(texts)) for s, a, b, texts in head.get("spans", ())]
            return Episode.from_arrays(head["id"], float(head["rate_hz"]), arrays, length=length, **kept)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{shards.where(index, 'json')} is incomplete: {error!r}", fix="write the shards again"
            ) from error

    def frames(self, index: int, camera: str) -> Iterator[np.ndarray]:
        """The frames of episode `index` one at a time, uint8 (H, W, 3)."""
        extension = f"{IMAGE_PREFIX}{camera}.mp4"
        with VideoDecoder(self.shards.read_bytes(index, extension), self.shards.where(index, extension)) as decoder:
            yield from decoder.all_frames()
