"""Pictures that stand in the rows of a LeRobot dataset themselves, as {"bytes", "path"}."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mmseq.data.lerobot_layout import REFETCH, Record, unreadable
from mmseq.errors import DataError

_DEEP = ("I", "F")  # of Pillow's modes, also I;16: one channel of more than 8 bits


def stored_images(root: Path, record: Record, feature: str, steps: np.ndarray) -> Iterator[np.ndarray]:
    """The pictures of these rows of an episode; only the row groups in question are read."""
    before = 0
    for path, start, end in record.parts:
        inside = steps[(steps >= before) & (steps < before + end - start)] - before + start
        before += end - start
        try:
            file = pq.ParquetFile(path)
            first = 0
            for group in range(file.metadata.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                wanted = inside[(inside >= first) & (inside < first + count)] - first
                if len(wanted):
                    column = file.read_row_group(group, columns=[feature])[feature]
                    for row in wanted:
                        yield _decode(column[int(row)].as_py(), root, f"{path}: {feature} of row {first + int(row)}")
                first += count
        except (OSError, pa.ArrowException) as error:
            raise unreadable(path, error) from error
        except KeyError as error:
            raise DataError(f"{path} lacks the column {feature!r}", fix=REFETCH) from error


def _open(value: Any, root: Path) -> Image.Image:
    if isinstance(value, bytes):
        value = {"bytes": value}
    return Image.open(io.BytesIO(value["bytes"]) if value.get("bytes") else root / value["path"])


def _decode(value: Any, root: Path, where: str) -> np.ndarray:
    try:
        with _open(value, root) as image:
            if image.mode.startswith(_DEEP):
                raise DataError(
                    f"{where} is a picture of distances ({image.mode}), which has no colours",
                    fix="leave the camera out: --map image.NAME=",
                )
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{where} is no image: {error}", fix=REFETCH) from error


def stored_depth(root: Path, path: Path, feature: str) -> bool:
    """Whether the first picture of a file holds distances."""
    try:
        batch = next(pq.ParquetFile(path).iter_batches(batch_size=1, columns=[feature]))
        with _open(batch.column(0)[0].as_py(), root) as image:
            return image.mode.startswith(_DEEP)
    except (OSError, pa.ArrowException, StopIteration, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return False
