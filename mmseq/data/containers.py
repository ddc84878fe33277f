"""Whether a video file is whole, by the sizes that its container states: MP4 and MOV, Matroska and WebM, AVI."""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO

_EBML, _SEGMENT = 0x1A45DFA3, 0x18538067
_BOXES = (b"ftyp", b"moov", b"mdat", b"moof", b"free", b"skip", b"wide", b"styp", b"sidx", b"mfra", b"meta", b"uuid")


def missing_bytes(source: str | Path | bytes) -> int:
    """How many bytes the file lacks of those that it says it has; 0 for one that does not say, or is something else."""
    with io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        head = file.read(12)
        file.seek(0)
        if head[:4] == b"RIFF":
            stated = int.from_bytes(head[4:8], "little")
            end = 8 + stated if stated < 0xFFFFFFFF else 0
        elif head[:4] == _EBML.to_bytes(4, "big"):
            end = _matroska_end(file)
        else:
            end = _boxes_end(file, size)
        return max(0, end - size)


def _boxes_end(file: BinaryIO, size: int) -> int:
    """Where the last box of an MP4 ends; what follows the boxes does not count."""
    at = 0
    while at + 8 <= size:
        file.seek(at)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        if head[4:8] not in _BOXES or length == 0:  # 0: as far as the file goes
            return at
        at += int.from_bytes(head[8:16], "big") if length == 1 else length
    return at


def _matroska_end(file: BinaryIO) -> int:
    """Where the segment of a Matroska file ends; 0 where that is not known, as in a recording that was not closed."""
    for wanted in (_EBML, _SEGMENT):
        found, length = _number(file, keep_marker=True), _number(file)
        if found != wanted or length is None:
            return 0
        end = file.tell() + length
        file.seek(end)
    return end


def _number(file: BinaryIO, *, keep_marker: bool = False) -> int | None:
    """A number of EBML, whose leading zeros say how long it is; None where all its bits are set: unknown."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    count = 9 - first[0].bit_length()
    value = int.from_bytes(first + file.read(count - 1), "big")
    if keep_marker:
        return value
    value &= (1 << 7 * count) - 1
    return None if value == (1 << 7 * count) - 1 else value
