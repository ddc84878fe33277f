"""The demonstrations in HDF5 files: one per group of robomimic's `data`, one per file in ALOHA's layout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmseq.data.hdf5_layout import ACTIONS, Entry, Facts, columns_of, facts_of, natural
from mmseq.data.mapping import Slice, Streams, base_of
from mmseq.errors import DataError, MMSeqError, require
from mmseq.streams import OUTCOME, STREAMS, TEXT

HDF5_SUFFIXES = (".hdf5", ".h5", ".hdf")
SPOKEN = [row.name for row in STREAMS.values() if row.kind in (TEXT, OUTCOME)]  # no array with a value per step
REPLACE = "fetch or record the file again, or take it out"


@dataclass(frozen=True)
class Demo:
    """One demonstration: where it lies ("/" is the whole file), what it holds, and what its file says."""

    file: Path
    group: str
    entries: Mapping[str, Entry]
    facts: Facts
    problem: MMSeqError | None = None  # why its file cannot be read

    def __str__(self) -> str:
        return f"{self.file}, {self.group}" if self.group != "/" else str(self.file)

    def arrays(self, streams: Streams) -> Streams:
        """Those of the set's streams that this demonstration holds whole, and not empty."""
        whole = lambda names: all(name in self.entries and self.entries[name].steps for name in names)
        return {s: names for s, names in streams.items() if s not in SPOKEN and whole(names)}

    def width(self, names: tuple[str, ...]) -> int:
        return sum(len(self.numbers(name)) for name in names)

    def numbers(self, name: str) -> range:
        """Which numbers of a column fill a stream, as far as it has them."""
        part = slice(name.start, name.stop) if isinstance(name, Slice) else slice(None)
        return range(self.entries[name].width)[part]


def find_files(path: Path) -> list[Path]:
    """The HDF5 files at or below a path, `episode_10` behind `episode_9`. Raises: DataError when there is none."""
    suited = lambda p: p.suffix.lower() in HDF5_SUFFIXES and not p.name.startswith(".") and p.is_file()
    files = [path] if path.is_file() else list(filter(suited, path.rglob("*")))
    if not files:
        raise DataError(f"{path} holds no HDF5 files", fix=f"give files ending in {', '.join(HDF5_SUFFIXES)}")
    return sorted(files, key=lambda p: natural(p.as_posix()))


@contextmanager
def open_file(file: Path, where: object = "") -> Iterator[Any]:
    """The root of a file, with whatever h5py finds wrong in it as a DataError."""
    try:
        root = require("h5py", "hdf5").File(file, "r")
    except OSError as error:
        raise DataError(f"{file} is truncated or no HDF5 file: {error}", fix=REPLACE) from error
    try:
        with root:
            yield root
    except (OSError, LookupError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise DataError(f"{where or file} cannot be read: {error}", fix=REPLACE) from error


def demos_of(file: Path, given: Streams) -> list[Demo]:
    """The demonstrations of a file; one with a `problem` for a file that cannot be read.

    given: the owner's map, which makes any layout the one episode of its file.
    """
    try:
        with open_file(file) as root:
            return _demos(file, root, given)
    except MMSeqError as error:
        return [Demo(file, "/", {}, Facts(), error)]


def _demos(file: Path, root: Any, given: Streams) -> list[Demo]:
    data = root.get("data")
    items = {n: _item(data, n) for n in sorted(data, key=natural)} if is_group(data) else {}
    if groups := {n: item for n, item in items.items() if item is None or is_group(item)}:
        facts = facts_of(data, root)
        return [
            Demo(
                file,
                f"data/{n}",
                {},
                Facts(),
                DataError(f"{file}, data/{n} is a link to nothing, or damaged", fix=REPLACE),
            )
            if item is None
            else Demo(file, f"data/{n}", columns_of(item), facts)
            for n, item in groups.items()
        ]
    entries = columns_of(root)
    aloha = any(name in root for name in ("observations", "obs", *ACTIONS))
    if not aloha and not any(base_of(name, entries) in entries for names in given.values() for name in names):
        raise DataError(
            f"{file} is laid out neither as robomimic nor as ALOHA: it holds {some(entries) or 'nothing'}",
            fix="say what is what, such as --map action=NAME,proprio=NAME,image.front=NAME, or convert it to "
            "LeRobot v3 (LeRobotDataset.create, add_frame, save_episode, finalize)",
        )
    facts = facts_of(root)  # whose texts are those of the one episode
    return [Demo(file, "/", entries, replace(facts, robot=facts.robot or ("aloha" if aloha else None), texts=()))]


def _item(group: Any, name: str) -> Any:
    """What a group holds under a name, None where it cannot be opened: mostly a link to nothing."""
    try:
        return group[name]
    except (KeyError, OSError):
        return None


def is_group(item: Any) -> bool:
    return hasattr(item, "keys")


def some(names: Iterable[str]) -> str:
    """The first few names, for people."""
    names = list(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
