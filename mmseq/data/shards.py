"""Shards: standard webdataset tars with an index beside them, for random access without reading through.

A directory holds `manifest.json` (kind, counts, checksums, fingerprints of the tokenizers and
embodiments), `index.parquet` (where every member of every sample lies) and `shard-000000.tar` ...
One sample is a group of members with one key: `00000007.json`, `00000007.action.npy`,
`00000007.image.main.mp4`. It appears under its name only when it is complete.

    with ShardWriter("out", {"kind": "tokens", "tokenizers": {"vision": "3f2a..."}}) as writer:
        writer.add("00000000", {"json": {"id": "a"}, "tokens.npy": ids}, metadata={"length": 35})
    reader = ShardReader("out", kind="tokens")
    reader.read(0)["tokens.npy"]
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmseq.errors import DataError, FingerprintError, did_you_mean

FORMAT = "mmseq-shards"
VERSION = 1
KINDS = ("episodes", "tokens")
_RESERVED = ("format", "version", "samples", "shards", "index", "files")
_KEY = re.compile(r"[A-Za-z0-9_-]{1,60}")  # webdataset ends the key at the first dot
_EXTENSION = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_RESTORE = "restore the file from where it was copied, or write the shards again"
_OPEN_FILES = 64
_INDEX = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.int32()),
        ("names", pa.list_(pa.string())),
        ("offsets", pa.list_(pa.int64())),
        ("sizes", pa.list_(pa.int64())),
        ("metadata", pa.string()),
    ]
)


def encode_member(extension: str, value: Any) -> bytes:
    """The bytes of one member, by the last part of its extension: json, npy, txt, or bytes as they are.

    Raises: DataError for a value that does not fit, or an array of objects.
    """
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    kind = extension.rsplit(".", 1)[-1]
    if kind == "json":
        try:
            return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise DataError(f"member {extension!r} cannot be written as JSON: {error}") from error
    if kind == "npy":
        array = np.asarray(value)
        if array.dtype.hasobject:
            raise DataError(
                f"member {extension!r} has dtype object", fix="give an array of numbers or fixed-width text"
            )
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, array, allow_pickle=False)
        return buffer.getvalue()
    if kind == "txt" and isinstance(value, str):
        return value.encode()
    raise DataError(
        f"member {extension!r} cannot hold a {type(value).__name__}",
        fix="end its name in .json, .npy or .txt, or give bytes",
    )


def decode_npy(data: bytes, where: str) -> np.ndarray:
    """The array in the bytes of an npy file. Nothing is unpickled, and nothing larger than `data` allocated.

    Raises: DataError that begins with `where`.
    """
    buffer = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(buffer)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(buffer, max_header_size=10_000)  # type: ignore[call-arg]
        elif version == (2, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(buffer, max_header_size=10_000)  # type: ignore[call-arg]
        else:
            raise ValueError(f"npy version {version}")
    except (ValueError, EOFError, TypeError, SyntaxError, KeyError) as error:
        raise DataError(f"{where} is not a valid npy array: {error}", fix=_RESTORE) from error
    start, count = buffer.tell(), 1
    for size in shape:
        count *= int(size)
    if dtype.hasobject:
        raise DataError(f"{where} holds Python objects, which are never unpickled", fix="write it as numbers")
    if min(shape, default=0) < 0 or count * dtype.itemsize != len(data) - start:
        raise DataError(f"{where} says {shape} of {dtype}, but holds {len(data) - start} bytes", fix=_RESTORE)
    array = np.frombuffer(bytearray(memoryview(data)[start:]), dtype=dtype)
    return array.reshape(shape, order="F" if fortran else "C")


def decode_member(extension: str, data: bytes, where: str) -> Any:
    """The inverse of `encode_member`; members of other kinds stay bytes. Raises: DataError."""
    kind = extension.rsplit(".", 1)[-1]
    try:
        if kind == "json":
            return json.loads(data)
        if kind == "txt":
            return data.decode()
    except ValueError as error:
        raise DataError(f"{where} is corrupt: {error}", fix=_RESTORE) from error
    return decode_npy(data, where) if kind == "npy" else data


class _HashedFile:
    """A file that hashes what is written to it."""

    def __init__(self, path: Path):
        self._file = path.open("xb")
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        self.size += len(data)
        return self._file.write(data)

    def close(self) -> str:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._hash.hexdigest()


def partial_folder(final: Path) -> Path:
    """An empty folder beside `final` (or beside what it links to) to write to before `replace_folder`."""
    final = final.resolve()
    partial = final.with_name(f".{final.name}.mmseq-partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def replace_folder(new: Path, final: Path) -> None:
    """Put a complete folder in the place of another, which is gone only once the new one stands there."""
    final = final.resolve()
    old = final.with_name(f".{final.name}.mmseq-old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    new.rename(final)
    shutil.rmtree(old, ignore_errors=True)


class ShardWriter:
    """Writes a directory of shards. Until `close()` everything stands in `<directory>.partial`.

    manifest: `kind` ("episodes" or "tokens"), and anything else to keep, usually `tokenizers` and
    `embodiments` as {name: fingerprint}. samples_per_shard, bytes_per_shard: a shard is closed when it
    reaches either. overwrite: replace an existing directory of shards when the new one is complete.
    As a context manager it closes at the end, and throws everything away after an exception.
    Raises: DataError when the directory exists or another process is writing it.
    """

    def __init__(
        self,
        directory: str | Path,
        manifest: dict[str, Any],
        *,
        samples_per_shard: int = 1000,
        bytes_per_shard: int = 256 << 20,
        overwrite: bool = False,
    ):
        self.directory = Path(directory)
        self.partial = self.directory.with_name(self.directory.name + ".partial")
        self.manifest = dict(manifest)
        if self.manifest.get("kind") not in KINDS:
            raise DataError(f"kind is {self.manifest.get('kind')!r}", fix=f"set manifest['kind'] to one of {KINDS}")
        for name in _RESERVED:
            if name in self.manifest:
                raise DataError(f"manifest[{name!r}] is written by the shard writer", fix="use another name")
        if samples_per_shard < 1 or bytes_per_shard < 1:
            raise DataError(f"a shard of {samples_per_shard} samples and {bytes_per_shard} bytes holds nothing")
        self.samples_per_shard, self.bytes_per_shard = samples_per_shard, bytes_per_shard
        self._overwrite = overwrite
        self._check_target()
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        self._lock_path = self.directory.with_name(self.directory.name + ".lock")
        self._lock = self._lock_path.open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise DataError(
                f"another process is writing {self.directory}", fix="wait for it, or choose another directory"
            ) from error
        shutil.rmtree(self.partial, ignore_errors=True)  # left by a writer that died
        self.partial.mkdir()
        self._shards: list[dict[str, Any]] = []
        self._files: dict[str, str] = {}
        self._rows: dict[str, list[Any]] = {name: [] for name in _INDEX.names}
        self._keys: set[str] = set()
        self._file: _HashedFile | None = None
        self._closed = False

    def _check_target(self) -> None:
        if not self.directory.exists() or (self.directory.is_dir() and not any(self.directory.iterdir())):
            return
        if not self._overwrite:
            raise DataError(f"{self.directory} exists already", fix="choose another directory, or pass overwrite=True")
        if not (self.directory / "manifest.json").is_file():
            raise DataError(
                f"{self.directory} exists and holds no shards, so it is not replaced", fix="remove it yourself"
            )

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, key: str, members: dict[str, Any], metadata: dict[str, Any] | None = None) -> None:
        """Append one sample.

        members: values by extension: `json` (a dict), `<name>.npy` (an array), `<name>.mp4` (bytes).
        metadata: what a plan over the samples needs without opening them (length in steps, rate_hz,
        embodiment, streams, token counts); it stands in the index.
        Raises: DataError for a repeated or unusable key, extension or value.
        """
        if self._closed:
            raise DataError(f"{self.directory} is closed: nothing can be added to it")
        if not _KEY.fullmatch(key):
            raise DataError(f"key {key!r} is not usable", fix="use up to 60 letters, digits, '-' and '_'")
        if key in self._keys:
            raise DataError(f"key {key!r} was added twice", fix="give every sample its own key")
        if not members:
            raise DataError(f"sample {key!r} has no members")
        encoded = {}
        for extension, value in members.items():
            if not _EXTENSION.fullmatch(extension) or len(key) + len(extension) > 98:
                raise DataError(
                    f"sample {key!r}: extension {extension!r} is not usable",
                    fix="use letters, digits, '-', '_' and single dots, 98 characters with the key",
                )
            encoded[extension] = encode_member(extension, value)
        note = json.dumps(metadata or {}, ensure_ascii=False, allow_nan=False)
        if self._file is None:
            self._file = _HashedFile(self.partial / f"shard-{len(self._shards):06d}.tar")
            self._in_shard = 0
        offsets = []
        for extension, data in encoded.items():
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size, info.mode = len(data), 0o644
            self._file.write(info.tobuf(tarfile.USTAR_FORMAT))
            offsets.append(self._file.size)
            self._file.write(data)
            self._file.write(bytes(-len(data) % tarfile.BLOCKSIZE))
        row = (key, len(self._shards), list(encoded), offsets, [len(data) for data in encoded.values()], note)
        for name, value in zip(_INDEX.names, row, strict=True):
            self._rows[name].append(value)
        self._keys.add(key)
        self._in_shard += 1
        if self._in_shard >= self.samples_per_shard or self._file.size >= self.bytes_per_shard:
            self._close_shard()

    def add_file(self, name: str, data: bytes) -> None:
        """A file of its own in the directory, with its checksum in the manifest: `embodiments/arm.json`."""
        path = self.partial / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DataError(f"{name!r} lies outside the shard directory")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        self._files[name] = hashlib.sha256(data).hexdigest()

    def _close_shard(self) -> None:
        if self._file is None:
            return
        self._file.write(bytes(2 * tarfile.BLOCKSIZE))  # the end of a tar
        size = self._file.size
        self._shards.append(
            {
                "name": f"shard-{len(self._shards):06d}.tar",
                "samples": self._in_shard,
                "bytes": size,
                "sha256": self._file.close(),
            }
        )
        self._file = None

    def close(self) -> dict[str, Any]:
        """Finish, make the directory appear under its name, and return the manifest.

        Raises: DataError when no sample was added.
        """
        if self._closed:
            return self.manifest
        if not self._keys:
            self.abort()
            raise DataError(f"{self.directory}: no sample was added, so nothing is written")
        self._close_shard()
        index = self.partial / "index.parquet"
        pq.write_table(pa.table(self._rows, schema=_INDEX), index, compression="zstd")
        self.manifest = {
            "format": FORMAT,
            "version": VERSION,
            **self.manifest,
            "samples": len(self._keys),
            "shards": self._shards,
            "index": {"name": index.name, "sha256": hashlib.sha256(index.read_bytes()).hexdigest()},
            "files": self._files,
        }
        (self.partial / "manifest.json").write_text(json.dumps(self.manifest, indent=2, ensure_ascii=False) + "\n")
        self._check_target()
        replace_folder(self.partial, self.directory)
        self._release()
        return self.manifest

    def abort(self) -> None:
        """Throw away everything written so far."""
        if self._closed:
            return
        if self._file is not None:
            self._file.close()
            self._file = None
        shutil.rmtree(self.partial, ignore_errors=True)
        self._release()

    def _release(self) -> None:
        self._closed = True
        self._lock_path.unlink(missing_ok=True)
        self._lock.close()


def holds_shards(path: str | Path) -> bool:
    return (Path(path) / "manifest.json").is_file() and (Path(path) / "index.parquet").is_file()


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / "manifest.json"
    if not path.is_file():
        partial = directory.with_name(directory.name + ".partial")
        hint = (
            "the writer did not finish: run it again"
            if partial.exists()
            else "write them with mmseq data import or tokenize"
        )
        raise DataError(f"{directory} holds no shards (no manifest.json)", fix=hint)
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is corrupt: {error}", fix=_RESTORE) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(
            f"{path} is not a manifest of {FORMAT}", fix="write the shards with mmseq data import or tokenize"
        )
    if manifest.get("version") != VERSION:
        raise DataError(
            f"{path} has format version {manifest.get('version')!r}, this mmseq reads {VERSION}",
            fix="write the shards again with this version, or install the mmseq that wrote them",
        )
    try:
        numbers = [manifest["samples"], *(shard["bytes"] for shard in manifest["shards"])]
        texts = [manifest["kind"], manifest["index"]["name"], *(shard["sha256"] for shard in manifest["shards"])]
        if not all(isinstance(n, int) for n in numbers) or not all(isinstance(t, str) for t in texts):
            raise ValueError("counts are whole numbers, names and checksums texts")
        for shard in manifest["shards"]:
            if Path(shard["name"]).name != shard["name"]:
                raise ValueError(f"shard name {shard['name']!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is incomplete: {error!r}", fix=_RESTORE) from error
    return manifest


class ShardReader:
    """Random access to a directory of shards, from any thread or process.

    kind: what the shards must hold, "episodes" or "tokens"; default: either.
    Raises: DataError when a file is missing, truncated or of another version or kind. Contents are
    checked where they are read; `verify()` checks all of them.
    """

    def __init__(self, directory: str | Path, kind: str | None = None):
        self.directory = Path(directory)
        self.manifest = _read_manifest(self.directory)
        if kind is not None and self.manifest["kind"] != kind:
            raise DataError(
                f"{self.directory} holds {self.manifest['kind']}, expected {kind}", fix=f"give a directory of {kind}"
            )
        self._names = [shard["name"] for shard in self.manifest["shards"]]
        self._bytes = [int(shard["bytes"]) for shard in self.manifest["shards"]]
        for name, size in zip(self._names, self._bytes, strict=True):
            path = self.directory / name
            if not path.is_file():
                raise DataError(f"shard {path} is missing", fix=_RESTORE)
            if path.stat().st_size != size:
                raise DataError(f"shard {path} has {path.stat().st_size} bytes, written were {size}", fix=_RESTORE)
        self._load_index()
        self._metadata: list[dict[str, Any]] | None = None
        self._open_state()

    def _load_index(self) -> None:
        path = self.directory / str(self.manifest["index"]["name"])
        try:
            table = pq.read_table(path, schema=_INDEX)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"the index {path} cannot be read: {error}", fix=_RESTORE) from error
        if len(table) != self.manifest["samples"]:
            raise DataError(
                f"the index {path} has {len(table)} samples, the manifest {self.manifest['samples']}", fix=_RESTORE
            )
        table = table.combine_chunks()
        column = lambda name: table.column(name).combine_chunks()
        self._key = column("key")
        self._shard = column("shard").to_numpy()
        self._note = column("metadata")
        names = column("names")
        self._start = names.offsets.to_numpy().astype(np.int64)
        coded = names.values.dictionary_encode()
        self._extensions: list[str] = coded.dictionary.to_pylist()
        self._code = coded.indices.to_numpy()
        self._offset, self._size = (column(name).values.to_numpy() for name in ("offsets", "sizes"))
        counts = [np.diff(column(name).offsets.to_numpy()) for name in ("offsets", "sizes")]
        limits = np.asarray(self._bytes, dtype=np.int64)
        valid = all((count == np.diff(self._start)).all() for count in counts)
        valid = valid and ((self._shard >= 0) & (self._shard < len(limits))).all()
        if valid:
            limit = np.repeat(limits[self._shard], np.diff(self._start))
            valid = ((self._offset >= 0) & (self._size >= 0) & (self._offset + self._size <= limit)).all()
        if not valid:
            raise DataError(f"the index {path} points outside its shards", fix=_RESTORE)

    def _open_state(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._handles: OrderedDict[int, io.FileIO] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_handles", "_pid")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open_state()

    def __len__(self) -> int:
        return len(self._shard)

    @property
    def kind(self) -> str:
        return str(self.manifest["kind"])

    @property
    def keys(self) -> list[str]:
        return self._key.to_pylist()

    @property
    def metadata(self) -> list[dict[str, Any]]:
        """What the index says of each sample, without opening a shard."""
        if self._metadata is None:
            self._metadata = [self.note(i) for i in range(len(self))]
        return self._metadata

    def note(self, index: int) -> dict[str, Any]:
        """What the index says of one sample. Raises: DataError."""
        try:
            return json.loads(self._note[index].as_py())
        except ValueError as error:
            raise DataError(f"the index of {self.directory} is corrupt: {error}", fix=_RESTORE) from error

    def require_fingerprints(self, field: str, expected: dict[str, str]) -> None:
        """field: "tokenizers" or "embodiments". Raises: FingerprintError that names what differs."""
        stored = self.manifest.get(field) or {}
        for name, fingerprint in expected.items():
            if stored.get(name) != fingerprint:
                raise FingerprintError(
                    f"{self.directory}: {field} {name!r} is {stored.get(name)!r}, expected {fingerprint!r}",
                    fix="use the one these shards were written with, or write them again",
                )

    def members(self, index: int) -> dict[str, tuple[int, int]]:
        """Offset and size in bytes, within its tar, of each member of a sample."""
        index = range(len(self))[index]
        span = range(int(self._start[index]), int(self._start[index + 1]))
        return {self._extensions[self._code[k]]: (int(self._offset[k]), int(self._size[k])) for k in span}

    def _handle(self, shard: int) -> io.FileIO:
        if self._pid != os.getpid():  # after a fork the lock may be held by a thread that is not here
            self._open_state()
        with self._lock:
            handle = self._handles.pop(shard, None)
            if handle is None:
                path = self.directory / self._names[shard]
                try:
                    handle = io.FileIO(path, "rb")
                except OSError as error:
                    raise DataError(f"shard {path} cannot be opened: {error.strerror}", fix=_RESTORE) from error
            self._handles[shard] = handle
            if len(self._handles) > _OPEN_FILES:
                self._handles.popitem(last=False)  # closes when its last reader lets go of it
            return handle

    def read_bytes(self, index: int, extension: str) -> bytes:
        """One member as it stands in the tar. Raises: DataError."""
        index = range(len(self))[index]
        members = self.members(index)
        if extension not in members:
            raise DataError(f"sample {self._key[index]} has no {extension!r}: {did_you_mean(extension, members)}")
        offset, size = members[extension]
        shard = int(self._shard[index])
        handle = self._handle(shard)
        parts = []
        while size > 0:
            part = os.pread(handle.fileno(), size, offset)
            if not part:
                raise DataError(f"shard {self.directory / self._names[shard]} is truncated", fix=_RESTORE)
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def where(self, index: int, extension: str) -> str:
        """How errors name a member."""
        index = range(len(self))[index]
        return f"shard {self.directory / self._names[int(self._shard[index])]}, member {self._key[index]}.{extension}"

    def read(self, index: int, extensions: Sequence[str] | None = None) -> dict[str, Any]:
        """The members of a sample: json as dict, npy as array, the rest as bytes.

        extensions: only these. Raises: DataError that names the shard and the member.
        """
        return {
            extension: decode_member(extension, self.read_bytes(index, extension), self.where(index, extension))
            for extension in (self.members(index) if extensions is None else extensions)
        }

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.read(index)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self.read(i) for i in range(len(self)))

    def read_file(self, name: str) -> bytes:
        """A file that stands in the directory by itself, checked. Raises: DataError."""
        files = self.manifest.get("files") or {}
        if not isinstance(files, dict):
            raise DataError(f"{self.directory}: the manifest lists files as {files!r:.80}", fix=_RESTORE)
        if name not in files:
            raise DataError(f"{self.directory} has no file {name!r}: {did_you_mean(name, files)}")
        path = self.directory / name
        if not path.is_file() or ".." in Path(name).parts:
            raise DataError(f"{path} is missing", fix=_RESTORE)
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != files[name]:
            raise DataError(f"{path} is not what was written: its checksum differs", fix=_RESTORE)
        return data

    def verify(self, shards: Iterable[int] | None = None) -> None:
        """Read everything and compare it with the checksums in the manifest.

        Raises: DataError that names the first file that differs.
        """
        entries = self.manifest["shards"]
        chosen = [entries[i] for i in shards] if shards is not None else [*entries, self.manifest["index"]]
        for entry in chosen:
            path = self.directory / entry["name"]
            try:
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise DataError(f"{path} cannot be read: {error.strerror}", fix=_RESTORE) from error
            if digest != entry["sha256"]:
                raise DataError(f"{path} is not what was written: its checksum differs", fix=_RESTORE)
        for name in self.manifest.get("files") or {}:
            self.read_file(name)
