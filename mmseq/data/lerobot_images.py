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

from mmseq.data.lerobot_files import REFETCH, unreadable
from mmseq.data.lerobot_layout import Record
from mmseq.data.pictures import decode_picture
from mmseq.errors import DataError


def stored_images(root: Path, record: Record, feature: str, steps: np.ndarray) -> Iterator[np.ndarray]:
    """The pictures of these frames of an episode; only the row groups in question are read."""
    if record.order is None:
        found = _values(record, feature, steps)
    else:  # rows are read as they lie, so what is encoded waits for its turn
        rows = record.order[steps]
        lying = np.unique(rows)
        held = dict(zip(lying.tolist(), _values(record, feature, lying)))
        found = (held[row] for row in rows.tolist())
    for value, where in found:
        yield _decode(value, root, where)


def _values(record: Record, feature: str, rows: np.ndarray) -> Iterator[tuple[Any, str]]:
    """What these rows (not decreasing) of an episode hold, each with the place that errors name."""
    before = 0
    for path, start, end in record.parts:
        inside = rows[(rows >= before) & (rows < before + end - start)] - before + start
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
                        yield column[int(row)].as_py(), f"{path}: {feature} of row {first + int(row)}"
                first += count
        except (OSError, pa.ArrowException) as error:
            raise unreadable(path, error) from error
        except KeyError as error:
            raise DataError(f"{path} lacks the column {feature!r}", fix=REFETCH) from error


def _stored(value: Any, root: Path) -> bytes:
    """The bytes of a picture: of the row, or of the file that it names."""
    value = {"bytes": value} if isinstance(value, bytes) else {"path": value} if isinstance(value, str) else value
    return value.get("bytes") or (root / value["path"]).read_bytes()


def _decode(value: Any, root: Path, where: str) -> np.ndarray:
    try:
        return decode_picture(_stored(value, root), where)
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{where} is no picture: {error!r}", fix=REFETCH) from error


def stored_depth(root: Path, path: Path, feature: str) -> bool:
    """Whether the first picture of a file has one channel of more than 8 bits: distances, not colours."""
    try:
        batch = next(pq.ParquetFile(path).iter_batches(batch_size=1, columns=[feature]))
        with Image.open(io.BytesIO(_stored(batch.column(0)[0].as_py(), root))) as image:
            return image.mode.startswith(("I", "F"))
    except (OSError, pa.ArrowException, StopIteration, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return False
