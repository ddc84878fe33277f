import io
import json
import multiprocessing
import pickle
import subprocess
import sys
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mmseq.data import shards
from mmseq.data.shards import ShardReader, ShardWriter, decode_npy, encode_member, holds_shards
from mmseq.errors import DataError, FingerprintError

arrays = hnp.arrays(
    st.sampled_from(["u1", "<i4", "<i8", "<f2", "<f4", ">f8", "?", "<U3"]),
    hnp.array_shapes(min_dims=0, min_side=0, max_side=5),
)
samples = st.lists(
    st.fixed_dictionaries(
        {
            "json": st.dictionaries(
                st.text(), st.none() | st.integers(-(2**53), 2**53) | st.text() | st.lists(st.text())
            )
        },
        optional={"tokens.npy": arrays, "image.main.mp4": st.binary(max_size=1500), "note.txt": st.text()},
    ),
    min_size=1,
    max_size=8,
)


@pytest.fixture
def directory(tmp_path):
    path = tmp_path / "shards"
    with ShardWriter(path, {"kind": "tokens", "tokenizers": {"vision": "aa"}}, samples_per_shard=4) as writer:
        for i in range(10):
            members = {
                "json": {"i": i},
                "tokens.npy": np.arange(i * 3, dtype=np.int32),
                "image.main.mp4": bytes([i]) * i,
            }
            writer.add(f"{i:08d}", members, metadata={"length": i, "streams": ["image.main"]})
        writer.add_file("embodiments/arm.json", b"{}")
    return path


@settings(max_examples=40, deadline=None)
@given(samples=samples, per_shard=st.integers(1, 4), per_bytes=st.integers(1, 20_000))
def test_what_is_written_is_what_is_read(samples, per_shard, per_bytes):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        with ShardWriter(path, {"kind": "tokens"}, samples_per_shard=per_shard, bytes_per_shard=per_bytes) as writer:
            for i, sample in enumerate(samples):
                writer.add(f"key-{i}", sample, metadata={"n": i})
        reader = ShardReader(path)
        reader.verify()
        assert reader.keys == [f"key-{i}" for i in range(len(samples))]
        assert reader.metadata == [{"n": i} for i in range(len(samples))]
        for i in reversed(range(len(samples))):
            read = reader.read(i)
            assert list(read) == list(samples[i])
            for name, value in samples[i].items():
                if isinstance(value, np.ndarray):
                    assert read[name].dtype == value.dtype
                    np.testing.assert_array_equal(read[name], value)
                else:
                    assert read[name] == value


def test_webdataset_reads_the_same(directory):
    wds = pytest.importorskip("webdataset")
    urls = [str(p) for p in sorted(directory.glob("*.tar"))]
    assert len(urls) == 3
    read = list(wds.WebDataset(urls, shardshuffle=False).decode())
    assert [s["__key__"] for s in read] == [f"{i:08d}" for i in range(10)]
    reader = ShardReader(directory, kind="tokens")
    for i, sample in enumerate(read):
        ours = reader.read(i)
        assert sample["json"] == ours["json"] == {"i": i}
        np.testing.assert_array_equal(sample["tokens.npy"], ours["tokens.npy"])
        assert sample["image.main.mp4"] == ours["image.main.mp4"]


def test_the_same_samples_make_the_same_bytes(tmp_path):
    digests = []
    for name in "ab":
        with ShardWriter(tmp_path / name, {"kind": "tokens"}) as writer:
            writer.add("0", {"json": {"x": 1}})
            digests.append(writer.close()["shards"][0]["sha256"])
    assert digests[0] == digests[1]


def test_reading_from_threads_forks_and_pickles(directory):
    reader = ShardReader(directory)
    order = np.random.default_rng(0).integers(0, 10, 400)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: reader.read(int(i))["json"]["i"], order)) == order.tolist()
    assert pickle.loads(pickle.dumps(reader)).read(7)["json"] == {"i": 7}
    receive, send = multiprocessing.Pipe(duplex=False)

    def child():
        send.send([reader.read(int(i))["json"]["i"] for i in order])

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    assert receive.recv() == order.tolist()
    process.join()


def test_a_shard_is_a_whole_tar(directory):
    for path in directory.glob("*.tar"):
        data = path.read_bytes()
        assert len(data) % tarfile.BLOCKSIZE == 0
        assert data.endswith(bytes(2 * tarfile.BLOCKSIZE))  # which ends one
        with tarfile.open(path) as tar:
            assert sum(member.size for member in tar) > 0


def test_what_the_system_gives_in_pieces_is_put_together(directory, monkeypatch):
    pread = shards.os.pread
    monkeypatch.setattr(shards.os, "pread", lambda handle, size, offset: pread(handle, min(size, 7), offset))
    reader = ShardReader(directory)
    for i in range(10):
        np.testing.assert_array_equal(reader.read(i)["tokens.npy"], np.arange(i * 3))


def test_no_more_files_are_open_than_allowed(directory, monkeypatch):
    monkeypatch.setattr(shards, "_OPEN_FILES", 2)
    reader, opened = ShardReader(directory), []
    for i in (0, 4, 8, 0):
        assert reader.read(i)["json"] == {"i": i}
        opened.append(len(reader._handles))
    assert opened == [1, 2, 2, 2]


def test_one_member_without_the_others(directory):
    reader = ShardReader(directory)
    assert list(reader.read(-1, ["tokens.npy"])) == ["tokens.npy"]
    with pytest.raises(DataError, match=r"00000009 has no 'token.npy': did you mean 'tokens.npy'"):
        reader.read(9, ["token.npy"])
    with pytest.raises(IndexError):
        reader.read(10)


def test_a_truncated_or_missing_tar_is_named_when_opened(directory):
    shard = directory / "shard-000001.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[:-700])
    with pytest.raises(DataError, match=r"shard-000001\.tar has \d+ bytes, written were \d+\. Restore"):
        ShardReader(directory)
    shard.unlink()
    with pytest.raises(DataError, match=r"shard-000001\.tar is missing\. Restore"):
        ShardReader(directory)


def test_a_tar_truncated_after_opening_is_named(directory):
    reader = ShardReader(directory)
    shard = directory / "shard-000002.tar"
    shard.write_bytes(shard.read_bytes()[:600])
    with pytest.raises(DataError, match=r"shard-000002\.tar is truncated"):
        reader.read(9)


def test_verify_names_a_changed_file(directory):
    shard = directory / "shard-000002.tar"
    data = bytearray(shard.read_bytes())
    data[513] ^= 1
    shard.write_bytes(data)
    reader = ShardReader(directory)
    with pytest.raises(DataError, match=r"shard-000002\.tar is not what was written"):
        reader.verify()
    reader.verify([0, 1])
    with pytest.raises(DataError, match=r"shard-000002\.tar, member 00000008\.json is corrupt"):
        reader.read(8)
    shard.write_bytes(data[:513] + bytes([data[513] ^ 1]) + data[514:])
    ShardReader(directory).verify()
    (directory / "embodiments/arm.json").write_text("{ }")
    for read in (ShardReader.verify, lambda reader: reader.read_file("embodiments/arm.json")):
        with pytest.raises(DataError, match=r"arm\.json is not what was written"):
            read(ShardReader(directory))
    (directory / "embodiments/arm.json").unlink()
    with pytest.raises(DataError, match=r"arm\.json is missing\. Restore"):
        ShardReader(directory).read_file("embodiments/arm.json")


def test_a_manifest_cannot_point_to_a_file_outside(directory):
    (directory.parent / "other.json").write_text("{}")
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"] = {"../other.json": manifest["files"]["embodiments/arm.json"]}
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"other\.json is missing"):
        ShardReader(directory).read_file("../other.json")


def test_a_folder_of_shards_has_a_manifest_and_an_index(directory, tmp_path):
    assert holds_shards(directory)
    for name in ("manifest.json", "index.parquet"):
        other = tmp_path / name.replace(".", "_")
        other.mkdir()
        (other / name).write_bytes((directory / name).read_bytes())
        assert not holds_shards(other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=99), "format version 99, this mmseq reads 1"),
        (lambda m: m.update(format="other"), "not a manifest"),
        (lambda m: m.update(samples=11), "index .* has 10 samples, the manifest 11"),
        (lambda m: m.pop("shards"), "incomplete"),
        (lambda m: m["shards"][0].update(name="../x.tar"), "incomplete"),
        (lambda m: m["shards"][0].update(bytes="9"), "incomplete"),
        (lambda m: m["shards"][0].update(sha256=9), "incomplete"),
        (lambda m: m.update(kind=9), "incomplete"),
    ],
)
def test_a_wrong_manifest_is_refused(directory, change, message):
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=message):
        ShardReader(directory)


def test_a_manifest_is_a_map(directory):
    (directory / "manifest.json").write_text("[]")
    with pytest.raises(DataError, match="not a manifest"):
        ShardReader(directory)


@pytest.mark.parametrize(
    ("column", "change", "passes"),
    [
        ("shard", lambda shard, size: 2, True),
        ("shard", lambda shard, size: 3, False),
        ("shard", lambda shard, size: -1, False),
        ("offsets", lambda at, size: 0, True),
        ("offsets", lambda at, size: -1, False),
        ("offsets", lambda at, size: at + size, False),
        ("sizes", lambda at, size: size - at, True),
        ("sizes", lambda at, size: size - at + 1, False),
        ("sizes", lambda at, size: -1, False),
    ],
)
def test_an_index_that_points_outside_its_shards_is_refused(directory, column, change, passes):
    """Of the first member of the last sample, which shard 2 holds."""
    path = directory / "index.parquet"
    table = pq.read_table(path)
    rows = table.column(column).to_pylist()
    at, size = table.column("offsets").to_pylist()[-1][0], (directory / "shard-000002.tar").stat().st_size
    if column == "shard":
        rows[-1] = change(rows[-1], size)
    else:
        rows[-1][0] = change(at, size)
    place = table.column_names.index(column)
    pq.write_table(
        table.set_column(place, table.schema.field(column), [pa.array(rows, table.schema.field(column).type)]), path
    )
    if passes:
        assert len(ShardReader(directory)) == 10
        return
    with pytest.raises(DataError, match="points outside its shards"):
        ShardReader(directory)


def test_a_damaged_index_is_named(directory):
    path = directory / "index.parquet"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"index\.parquet cannot be read"):
        ShardReader(directory)


def test_kind_and_fingerprints_are_held_to(directory, tmp_path):
    with pytest.raises(DataError, match="holds tokens, expected episodes"):
        ShardReader(directory, kind="episodes")
    reader = ShardReader(directory)
    reader.require_fingerprints("tokenizers", {"vision": "aa"})
    with pytest.raises(FingerprintError, match="tokenizers 'vision' is 'aa', expected 'bb'"):
        reader.require_fingerprints("tokenizers", {"vision": "bb"})
    with pytest.raises(DataError, match="holds no shards"):
        ShardReader(tmp_path)


@pytest.mark.parametrize(
    ("key", "members", "message"),
    [
        ("a.b", {"json": {}}, "key 'a.b' is not usable"),
        ("../a", {"json": {}}, "not usable"),
        ("0", {"json": {}}, "added twice"),
        ("1", {}, "no members"),
        ("1", {"x/y.npy": np.zeros(1)}, "extension 'x/y.npy'"),
        ("1", {"x.npy": np.array([object()])}, "dtype object"),
        ("1", {"x.mp4": "text"}, "cannot hold a str"),
        ("1", {"json": {"x": float("nan")}}, "cannot be written as JSON"),
    ],
)
def test_unusable_samples_are_refused(tmp_path, key, members, message):
    with ShardWriter(tmp_path / "x", {"kind": "tokens"}) as writer:
        writer.add("0", {"json": {}})
        with pytest.raises(DataError, match=message):
            writer.add(key, members)
    assert len(ShardReader(tmp_path / "x")) == 1


def test_names_may_be_so_long_and_no_longer(tmp_path):
    with ShardWriter(tmp_path / "x", {"kind": "tokens"}) as writer:
        writer.add("k" * 60, {"e" * 38: b"1"})
        for key, extension in (("l" * 60, "e" * 39), ("l" * 59, "e" * 40)):
            with pytest.raises(DataError, match="extension"):
                writer.add(key, {extension: b"1"})
    assert ShardReader(tmp_path / "x").read(0) == {"e" * 38: b"1"}


@pytest.mark.parametrize("limit", [{"samples_per_shard": 0}, {"bytes_per_shard": 0}])
def test_a_shard_of_nothing_is_refused(tmp_path, limit):
    with pytest.raises(DataError, match="holds nothing"):
        ShardWriter(tmp_path / "x", {"kind": "tokens"}, **limit)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_an_array_of_any_usual_version_is_read(version):
    buffer, array = io.BytesIO(), np.arange(6, dtype=np.float32).reshape(2, 3)
    np.lib.format.write_array(buffer, array, version=version)
    if version == (3, 0):  # which is of records with names beyond Latin 1
        with pytest.raises(DataError, match="npy version"):
            decode_npy(buffer.getvalue(), "member m")
    else:
        np.testing.assert_array_equal(decode_npy(buffer.getvalue(), "member m"), array)


def test_sizes_below_zero_whose_product_fits_are_refused():
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (-2, -2, 1)})
    with pytest.raises(DataError, match=r"says \(-2, -2, 1\) of float32"):
        decode_npy(header.getvalue() + bytes(16), "member m")


def test_an_array_cannot_claim_more_than_it_holds():
    data = encode_member("x.npy", np.zeros(4, np.float32))
    for bad in (data[:-1], data.replace(b"(4,)", b"(9,)"), data.replace(b"<f4", b"|O "), b"", data[:20], b"x" * 200):
        with pytest.raises(DataError, match="member m"):
            decode_npy(bad, "member m")


def test_nothing_appears_until_it_is_complete(tmp_path):
    path = tmp_path / "out"

    def interrupted():
        with ShardWriter(path, {"kind": "tokens"}) as writer:
            writer.add("0", {"json": {}})
            assert not path.exists()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="no sample"), ShardWriter(path, {"kind": "tokens"}):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_dies_leaves_nothing_under_the_name(tmp_path):
    path = tmp_path / "out"
    code = (
        "import os, sys; from mmseq.data.shards import ShardWriter\n"
        "w = ShardWriter(sys.argv[1], {'kind': 'tokens'}, samples_per_shard=2)\n"
        "[w.add(str(i), {'json': {}}) for i in range(5)]; os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], env=_environment()).returncode == 9
    assert not path.exists()
    with pytest.raises(DataError, match="did not finish"):
        ShardReader(path)
    with ShardWriter(path, {"kind": "tokens"}) as writer:
        writer.add("0", {"json": {}})
    assert len(ShardReader(path)) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def _environment():
    import os

    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}


def test_an_existing_directory_is_replaced_only_when_told(directory, tmp_path):
    with pytest.raises(DataError, match=r"exists already.*overwrite=True"):
        ShardWriter(directory, {"kind": "tokens"})
    with ShardWriter(directory, {"kind": "tokens"}, overwrite=True) as writer:
        writer.add("new", {"json": {}})
        assert len(ShardReader(directory)) == 10
    assert ShardReader(directory).keys == ["new"]
    (tmp_path / "empty").mkdir()
    with ShardWriter(tmp_path / "empty", {"kind": "tokens"}) as writer:  # which loses nothing
        writer.add("new", {"json": {}})
    assert ShardReader(tmp_path / "empty").keys == ["new"]
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="holds no shards, so it is not replaced"):
        ShardWriter(tmp_path / "home", {"kind": "tokens"}, overwrite=True)


def test_two_writers_of_one_directory(tmp_path):
    with ShardWriter(tmp_path / "x", {"kind": "tokens"}) as writer:
        with pytest.raises(DataError, match="another process is writing"):
            ShardWriter(tmp_path / "x", {"kind": "tokens"})
        writer.add("0", {"json": {}})


@pytest.mark.parametrize("name", ["/tmp/elsewhere.json", "../elsewhere.json", "embodiments/../../elsewhere.json"])
def test_a_file_lies_in_its_directory(tmp_path, name):
    made = {"kind": "tokens", "tokenizers": {}}
    with pytest.raises(DataError, match="outside the shard directory"), ShardWriter(tmp_path / "out", made) as writer:
        writer.add_file(name, b"{}")
    assert not (tmp_path / "elsewhere.json").exists()
