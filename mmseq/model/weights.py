"""Weights on disk: safetensors, in one file or in shards with an index, as Hugging Face lays them out.

model.safetensors, or model-00001-of-00003.safetensors ... and model.safetensors.index.json. No pickle is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mmseq.errors import CheckpointError
from mmseq.files import save_tensors

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
_SAMPLES = 256  # places of a file that its fingerprint reads
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


class StoredWeights(Mapping[str, Tensor]):
    """The tensors of a directory by name, each read when it is asked for.

    Raises: CheckpointError when the files are absent, damaged or do not hold what the index says.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self._open: dict[Path, Any] = {}
        if (self.directory / FILE).is_file():
            path = self.directory / FILE
            self._file_of = dict.fromkeys(self._keys(path), path)
        elif (self.directory / INDEX).is_file():
            self._file_of = self._read_index(self.directory / INDEX)
        elif any((self.directory / name).is_file() for name in _PICKLED):
            raise CheckpointError(
                f"{self.directory} holds its weights as a pickle, which can run code and is not read",
                fix="load it with transformers where you trust it, and `save_pretrained` it as safetensors",
            )
        else:
            raise CheckpointError(f"{self.directory} has no {FILE} and no {INDEX}", fix="copy all files of the model")

    def _keys(self, path: Path) -> list[str]:
        try:
            self._open[path] = file = safe_open(path, framework="pt")
            return list(file.keys())
        except Exception as error:  # safetensors raises its own kinds for damaged files
            raise CheckpointError(f"{path} cannot be read: {error}") from error

    def _read_index(self, index: Path) -> dict[str, Path]:
        try:
            shards = {str(k): str(v) for k, v in json.loads(index.read_text())["weight_map"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is damaged: {error}") from error
        outside = [name for name in shards.values() if Path(name).name != name]
        if outside:
            raise CheckpointError(f"{index} names a file outside its folder: {outside[0]!r}")
        held = {name: set(self._keys(self.directory / name)) for name in sorted(set(shards.values()))}
        absent = [name for name, file in shards.items() if name not in held[file]]
        if absent:
            raise CheckpointError(
                f"{self.directory / shards[absent[0]]} lacks {absent[0]!r}, which {index} says it has"
            )
        return {name: self.directory / file for name, file in shards.items()}

    def fingerprint(self) -> str:
        """Of names, shapes and a sample of the values: other weights in the same files are noticed."""
        found = hashlib.sha256()
        for path in sorted(set(self._file_of.values())):
            size = path.stat().st_size
            found.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                for place in range(0, size, max(1, size // _SAMPLES)):
                    file.seek(place)
                    found.update(file.read(4096))
        return found.hexdigest()[:16]

    def __getitem__(self, name: str) -> Tensor:
        path = self._file_of[name]
        try:
            return self._open[path].get_tensor(name)
        except Exception as error:
            raise CheckpointError(f"{path}: {name} cannot be read: {error}") from error

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def save_weights(
    weights: Mapping[str, Tensor],
    directory: Path,
    *,
    metadata: dict[str, str],
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write tensors in order, in shards of at most shard_bytes where they are more than that.

    dtype: convert to it, shard by shard. Weights that stood in the directory before are removed.
    """
    for old in (*directory.glob("model*.safetensors"), directory / INDEX):
        old.unlink(missing_ok=True)
    shards: list[list[str]] = [[]]
    room, total = shard_bytes, 0
    for name, tensor in weights.items():
        size = tensor.numel() * (dtype or tensor.dtype).itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
        total += size
    files = (
        [FILE]
        if len(shards) == 1
        else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    )
    for file, names in zip(files, shards):
        part = {name: weights[name].to(dtype or weights[name].dtype).contiguous() for name in names}
        try:
            save_tensors(part, directory / file, metadata)
        except Exception as error:  # a full disk is an error of safetensors' own
            raise CheckpointError(f"{directory / file} could not be written: {error}", fix="free space") from error
    if len(shards) > 1:
        where = {name: file for file, names in zip(files, shards) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
