"""Files of LeRobot datasets, as recorders, editors and downloads leave them: read, or why not and what to do."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmseq.errors import DataError

REFETCH = "fetch the dataset again: hf download <repo> --repo-type dataset --local-dir <path>"
NOT_FINALIZED = (
    "a recording that ended before LeRobot's finalize() leaves this, and so does a broken download. Fetch the dataset "
    "again where there is a repository. Otherwise what was finished before it can be saved: files that have a footer, "
    "with their videos, are imported by --skip-bad N, and LeRobotDataset.resume() goes on recording from them"
)
_SHOWN = 8  # of a list in a message


def whole(value: Any) -> int | None:
    """A whole number as pandas, JSON and editors leave it: 3, 3.0, "3"; None for anything else."""
    try:
        number = float(value)
        return int(number) if math.isfinite(number) and number == int(number) else None
    except (TypeError, ValueError):
        return None


def listed(items: Any) -> str:
    """The first few of a list, and how many more there are."""
    items = [str(item) for item in items]
    return ", ".join(items[:_SHOWN]) + (f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else "")


def absent(path: Path) -> DataError | None:
    """What is wrong when a file, or what it stands for, is not there."""
    if not path.is_file():
        return DataError(f"{path} is missing", fix=REFETCH)
    with path.open("rb") as file:
        if file.read(24).startswith(b"version https://git-lfs"):
            return DataError(f"{path} is a pointer of Git LFS, not the data", fix="run git lfs pull there")
    return None


def unreadable(path: Path, error: Exception | str) -> DataError:
    """Why a parquet file cannot be read, with the way out that fits the cause."""
    if problem := absent(path):
        return problem
    with path.open("rb") as file:
        begin = file.read(4)
        file.seek(max(0, path.stat().st_size - 4))
        end = file.read()
    if not begin or (begin == b"PAR1" and end != b"PAR1"):
        return DataError(f"{path} is truncated or corrupt, it has no footer", fix=NOT_FINALIZED)
    return DataError(f"{path} is truncated or corrupt: {str(error).strip().partition(chr(10))[0]}", fix=REFETCH)


def read_parquet(path: Path, columns: Collection[str] | None = None) -> pa.Table:
    """The columns of a file, those of `columns` that it has. Raises: DataError that says why it cannot be read."""
    try:
        file = pq.ParquetFile(path)
        return file.read(None if columns is None else [n for n in file.schema_arrow.names if n in columns])
    except (OSError, pa.ArrowException) as error:
        raise unreadable(path, error) from error


def scalars(array: pa.Array) -> np.ndarray:
    """One value per row, also of a column that holds lists of one; what is null becomes NaN or None."""
    return (array.flatten() if pa.types.is_nested(array.type) else array).to_numpy(zero_copy_only=False)


def is_text(type_: pa.DataType) -> bool:
    """Whether a column holds texts, in any of the forms that arrow has for them."""
    inner = type_.value_type if pa.types.is_dictionary(type_) else type_
    return pa.types.is_string(inner) or pa.types.is_large_string(inner) or pa.types.is_string_view(inner)


def joined(column: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines. Raises: DataError naming the line."""
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if line.strip():
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("no object")
            except ValueError as error:
                raise DataError(f"{path} line {number} is corrupt: {error}", fix=REFETCH) from error
            yield row
