"""Pictures as others store them: accepted where nothing is lost, else refused with what to do."""

import io
import json
import pickle

import numpy as np
import pytest
from PIL import ExifTags, Image

from mmseq.data.changed import SwappedColours
from mmseq.data.hdf5 import Hdf5Reader
from mmseq.data.importing import EpisodeShardReader, import_episodes, open_episodes
from mmseq.data.pictures import as_bytes, decode_picture, is_encoded, to_rgb
from mmseq.data.sources import open_source, source_identity
from mmseq.errors import DataError
from mmseq.mp4 import write_video
from mmseq.reading import Reading

h5py = pytest.importorskip("h5py")
STEPS = 6
SWAPPED = Reading(swap_colours=["top"])
COLOURS = np.zeros((STEPS, 32, 48, 3), np.uint8)
COLOURS[:, :, :16, 0], COLOURS[:, :, 16:32, 1], COLOURS[:, :, 32:, 2] = 220, 200, 180
COLOURS += np.arange(STEPS, dtype=np.uint8)[:, None, None, None] * 4


def encoded(kind="jpeg", mode=None, images=COLOURS, **options):
    found = []
    for image in images:
        buffer = io.BytesIO()
        picture = Image.fromarray(image)
        (picture.convert(mode) if mode else picture).save(buffer, kind, **options)
        found.append(buffer.getvalue())
    return found


def padded(data, extra=7):
    rows = np.zeros((len(data), max(map(len, data)) + extra), np.uint8)
    for row, one in zip(rows, data):
        row[: len(one)] = np.frombuffer(one, np.uint8)
    return rows


def store(path, name, values, dtype=None):
    with h5py.File(path, "w") as root:
        root.attrs["fps"] = 50
        root["action"], root["observations/qpos"] = np.zeros((STEPS, 3)), np.zeros((STEPS, 3))
        if dtype is None:
            root[f"observations/images/{name}"] = values
        else:
            data = root.create_dataset(f"observations/images/{name}", len(values), dtype=dtype)
            for i, one in enumerate(values):
                data[i] = one
    return path


JPEG, PNG = encoded(quality=95, subsampling=0), encoded("png")
VLEN = h5py.vlen_dtype(np.uint8)
FORMS = {
    "padded rows": (padded(JPEG), None),
    "signed rows": (padded(JPEG).view(np.int8), None),
    "rows without padding": (padded(JPEG[:1] * STEPS, 0), None),
    "rows of any length": ([np.frombuffer(one, np.uint8) for one in JPEG], VLEN),
    "byte strings": (np.array(JPEG, dtype=f"S{max(map(len, JPEG))}"), None),
    "longer byte strings": (np.array(JPEG, dtype=f"S{max(map(len, JPEG)) + 9}"), None),
    "PNG as byte strings": (np.array(PNG, dtype=f"S{max(map(len, PNG))}"), None),
    "PNG rows": (padded(PNG), None),
    "opaque": (np.array([np.void(row.tobytes()) for row in padded(JPEG)]), None),
}


@pytest.mark.parametrize("form", FORMS)
def test_encoded_pictures_in_every_form_in_use(tmp_path, form):
    values, dtype = FORMS[form]
    (episode,) = Hdf5Reader(store(tmp_path / "episode_0.hdf5", "cam_high", values, dtype))
    expected = COLOURS[:1].repeat(STEPS, 0) if form == "rows without padding" else COLOURS
    assert np.abs(episode["image.cam_high"].astype(int) - expected).max() <= 12


@pytest.mark.parametrize(
    "values",
    [
        COLOURS,
        COLOURS.transpose(0, 3, 1, 2),
        COLOURS / 255,
        (COLOURS / 255).astype(np.float16),
        COLOURS.astype(np.float32),
        COLOURS.astype(np.int64),
        np.concatenate([COLOURS, np.full((*COLOURS.shape[:3], 1), 255, np.uint8)], 3),
    ],
)
def test_numbers_of_which_nothing_is_lost(tmp_path, values):
    (episode,) = Hdf5Reader(store(tmp_path / "episode_0.hdf5", "top", values))
    np.testing.assert_array_equal(episode["image.top"], COLOURS)
    assert episode["image.top"].dtype == np.uint8


@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL's, of the damage
def test_damaged_exif_is_named_or_does_not_matter():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.Make], exif[ExifTags.Base.XResolution] = 6, "Maker", 72.0
    (data,) = encoded(images=COLOURS[:1], exif=exif)
    assert decode_picture(data, "it").shape == (48, 32, 3)
    begin, problems = data.index(b"Exif") + 6, set()
    for at in range(begin, begin + int.from_bytes(data[begin - 8 : begin - 6], "big") - 8):
        for value in (0, 2, 3, 5, 7, 12):
            try:
                image = decode_picture(data[:at] + bytes([value]) + data[at + 1 :], "it")
                assert image.shape in ((48, 32, 3), (32, 48, 3))
            except DataError as error:
                problems.add(str(error))
    assert problems == {"it has EXIF data that are damaged. Store it without EXIF, turned."}


@pytest.mark.parametrize("values", [COLOURS[..., :1], COLOURS[..., 0], COLOURS[:, None, :, :, 0]])
def test_grey_is_repeated(tmp_path, values):
    (episode,) = Hdf5Reader(store(tmp_path / "episode_0.hdf5", "top", values))
    np.testing.assert_array_equal(episode["image.top"], COLOURS[..., :1].repeat(3, 3))


def test_a_dark_picture_among_floats_to_255_is_dark():
    images = COLOURS.astype(np.float32)
    images[0] = 1.0
    assert [f.max() for f in to_rgb(lambda: iter(images), "x")] == [1, *COLOURS[1:].max((1, 2, 3))]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (COLOURS / 127.5 - 1, "floats from -1 to .*undo their normalisation"),
        (COLOURS / 2.1, "floats from 0 to .*undo their normalisation"),
        (COLOURS / np.float32(0), "not finite"),
        (COLOURS.astype(np.uint16) * 200, r"uint16 \(32, 48, 3\) from 0 to .*depth or a mask"),
        (COLOURS.astype(np.int16) - 1, "int16 .* from -1 to"),
        (COLOURS > 100, r"bool \(32, 48, 3\), expected 8 bits"),
        (np.concatenate([COLOURS, COLOURS[..., :1]], 3), "fourth channel that is not 255"),
        (np.array(encoded("png", "I;16"), dtype="S9999"), "mode I;16, more than 8 bits.*depth"),
        (
            np.array(encoded("png", "RGBA", images=[np.pad(c, ((0, 0), (0, 0), (0, 1))) for c in COLOURS])),
            "fourth channel",
        ),
        (np.array([b"\xff\xd8\xff but no more"] * STEPS), r"no picture \(\d+ bytes that begin with ff d8 ff"),
    ],
)
def test_what_would_lose_something_is_refused(tmp_path, values, message):
    reader = Hdf5Reader(store(tmp_path / "episode_0.hdf5", "top", values))
    with np.errstate(all="ignore"), pytest.raises(DataError, match=f"(?is){message}"):
        next(reader.frames(0, "top"))
    with np.errstate(all="ignore"), pytest.raises(DataError, match=f"(?is){message}"):
        import_episodes(tmp_path / "episode_0.hdf5", tmp_path / "out")


def test_bytes_and_what_is_none():
    assert as_bytes(b"ab") == as_bytes(bytearray(b"ab")) == as_bytes(np.frombuffer(b"ab", np.uint8)) == b"ab"
    assert as_bytes(np.array([b"ab"])) == as_bytes(np.array(b"ab", dtype=object)) == as_bytes(np.bytes_(b"ab")) == b"ab"
    assert as_bytes(np.zeros((2, 2), np.uint8)) is as_bytes(np.zeros(3)) is as_bytes("text") is None
    assert is_encoded(JPEG[0])
    assert is_encoded(PNG[0])
    assert not is_encoded(b"text")
    assert decode_picture(encoded("gif")[0], "x").shape == (32, 48, 3)
    assert decode_picture(encoded("jpeg", "CMYK")[0], "x").shape == (32, 48, 3)


# ---------------------------------------------------------------------- exchanged colours


def test_colours_that_were_exchanged_are_put_right(tmp_path, psnr):
    path = store(tmp_path / "episode_0.hdf5", "top", COLOURS[..., ::-1])
    reader = open_episodes(path, SWAPPED)
    np.testing.assert_array_equal(reader[0]["image.top"], COLOURS)
    np.testing.assert_array_equal(np.stack(list(reader.frames(0, "top"))), COLOURS)
    assert (len(reader), len(list(reader)), reader.notes) == (1, 1, open_episodes(path).notes)
    manifest = import_episodes(path, tmp_path / "out", SWAPPED)
    assert manifest["swap_colours"] == ["top"]
    assert psnr(EpisodeShardReader(tmp_path / "out")[0]["image.top"], COLOURS) > 35
    with pytest.raises(DataError, match=r"swap_colours names the camera 'tip': did you mean 'top'"):
        open_episodes(path, Reading(swap_colours=["tip"]))
    with pytest.raises(DataError, match="shards, which swap_colours does not change"):
        open_source(tmp_path / "out", SWAPPED)


def test_only_the_cameras_that_are_named_are_changed(tmp_path):
    path = store(tmp_path / "episode_0.hdf5", "top", COLOURS)
    with h5py.File(path, "a") as root:
        root["observations/images/wrist"] = COLOURS
    (episode,) = open_source(path, Reading(swap_colours=["wrist"]))
    np.testing.assert_array_equal(episode["image.top"], COLOURS)
    np.testing.assert_array_equal(episode["image.wrist"], COLOURS[..., ::-1])


def test_videos_too(tmp_path, psnr):
    write_video(tmp_path / "a.mp4", COLOURS, 10)
    reader = open_source(tmp_path / "a.mp4", Reading(swap_colours=["main"]))
    reader = pickle.loads(pickle.dumps(reader))  # workers get a copy
    assert isinstance(reader, SwappedColours)
    assert psnr(reader[0]["image.main"], COLOURS[..., ::-1]) > 35


def test_a_source_of_a_mix_with_other_colours_is_another_source(tmp_path):
    path = store(tmp_path / "episode_0.hdf5", "top", COLOURS)
    plain = source_identity(path)
    assert plain == source_identity(path, Reading(swap_colours=[])) != source_identity(path, SWAPPED)
    assert json.loads(json.dumps(plain)) == plain
