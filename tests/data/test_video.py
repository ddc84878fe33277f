import json

import numpy as np
import pytest

from mmseq.data.video import (
    VideoFolderReader,
    encode_video,
    probe,
    read_frames,
    read_video_episode,
    resample_indices,
    write_video,
)
from mmseq.errors import DataError


@pytest.fixture
def clip(tmp_path, textured):
    frames = textured(40)
    write_video(tmp_path / "clip.mp4", frames, 20)
    return tmp_path / "clip.mp4", frames


def test_what_is_written_reads_back_nearly_without_loss(clip, psnr):
    path, frames = clip
    assert psnr(read_frames(path), frames) > 40
    info = probe(path)
    assert (info.frames, info.height, info.width, info.rate_hz) == (40, 64, 64, 20)
    assert info.duration_s == pytest.approx(2.0)


def test_noise_and_odd_sizes_read_back_too(psnr):
    noise = np.random.default_rng(0).integers(0, 256, (5, 33, 47, 3), dtype=np.uint8)
    data, count = encode_video(noise, 12.5)
    assert count == 5
    assert psnr(read_frames(data), noise) > 40


@pytest.mark.parametrize("indices", [[0], [39], [31, 32, 33], [5, 3, 3, 38], []])
def test_frames_by_index_are_those_of_sequential_decoding(clip, indices):
    path, _ = clip
    np.testing.assert_array_equal(read_frames(path, indices), read_frames(path)[np.asarray(indices, dtype=int)])


def test_b_frames_and_long_gaps_do_not_shift_indices(tmp_path, textured):
    import av

    path = tmp_path / "b.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"bf": "3", "g": "15", "crf": "5"})
        stream.width = stream.height = 64
        for image in textured(60):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    everything = read_frames(path)
    assert len(everything) == 60
    for index in (0, 1, 14, 15, 16, 44, 59):
        np.testing.assert_array_equal(read_frames(path, [index])[0], everything[index])


@pytest.mark.parametrize("options", [{"bf": "3", "g": "15"}, {"bf": "0", "g": "2"}, {"bf": "2", "g": "300"}])
def test_an_open_decoder_jumps_in_any_order(tmp_path, textured, options):
    import av

    from mmseq.data.video import VideoDecoder

    path = tmp_path / "jumps.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options=options)
        stream.width = stream.height = 64
        for image in textured(80):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    everything = read_frames(path)
    with VideoDecoder(path) as decoder:
        ticks = decoder.probe().pts
        for index in [0, 79, 79, 14, 15, 16, 15, 0, *np.random.default_rng(0).integers(0, 80, 60)]:
            np.testing.assert_array_equal(next(decoder.frames_at([ticks[index]])), everything[index])


def test_an_index_outside_the_video_is_named(clip):
    with pytest.raises(DataError, match="0 to 39, not 40"):
        read_frames(clip[0], [3, 40])


def test_resampling_takes_the_nearest_earlier_frame():
    times = np.arange(30) / 30
    assert resample_indices(times, 10, 1.0).tolist() == [0, 3, 6, 9, 12, 15, 18, 21, 24, 27]
    assert resample_indices(times, 8, 1.0).tolist() == [0, 3, 7, 11, 15, 18, 22, 26]
    assert resample_indices(times[:3], 60, 0.1).tolist() == [0, 0, 1, 1, 2, 2]


def test_an_episode_from_video(clip):
    path, _ = clip
    episode = read_video_episode(path, ["a blue texture"], rate_hz=5)
    assert (episode.id, episode.rate_hz, len(episode), episode.embodiment) == ("clip", 5, 10, None)
    assert episode.texts == ["a blue texture"]
    np.testing.assert_array_equal(episode["image.main"], read_frames(path)[::4])
    assert len(read_video_episode(path)) == 40


def test_a_folder_with_captions(tmp_path, textured):
    (tmp_path / "sub").mkdir()
    for name in ("a.mp4", "b.mp4", "sub/c.mp4"):
        write_video(tmp_path / name, textured(6), 10)
    lines = [{"file": "a.mp4", "caption": "one"}, {"file": "sub/c.mp4", "captions": ["x", "y"], "plan": "first x"}]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    reader = VideoFolderReader(tmp_path)
    assert [(e.id, e.texts, e.plans) for e in reader] == [
        ("a.mp4", ["one"], []),
        ("b.mp4", [], []),
        ("sub/c.mp4", ["x", "y"], ["first x"]),
    ]
    assert len(reader) == 3
    assert reader[-1].id == "sub/c.mp4"
    assert len(list(reader.frames(0))) == 6


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{nonsense", r"captions\.jsonl line 2 is not JSON.*delete the line"),
        ('{"caption": "x"}', r"captions\.jsonl line 2 has no \"file\""),
        ('{"file": "aa.mp4"}', r"line 2 names 'aa.mp4'.*did you mean 'a.mp4'"),
        ('{"file": "a.mp4", "captions": "x"}', r"line 2: 'captions' is 'x'"),
    ],
)
def test_a_bad_line_of_captions_is_named(tmp_path, textured, line, message):
    write_video(tmp_path / "a.mp4", textured(3), 10)
    (tmp_path / "captions.jsonl").write_text('{"file": "a.mp4", "caption": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        VideoFolderReader(tmp_path)


def test_broken_files_are_named(tmp_path, clip, textured):
    path, _ = clip
    data = path.read_bytes()
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.mp4").write_text("no video " * 100)
    for name in ("empty", "cut", "text", "absent"):
        with pytest.raises(DataError, match=rf"{name}\.mp4 .*\. (Fetch|Check)"):
            read_video_episode(tmp_path / f"{name}.mp4")


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
def test_a_video_cut_behind_its_header_is_truncated(tmp_path, textured, suffix):
    import av

    path = tmp_path / f"full.{suffix}"
    with av.open(str(path), "w", options={"movflags": "faststart"} if suffix == "mp4" else {}) as container:
        stream = container.add_stream("libx264", rate=10, options={"g": "5"})
        stream.width = stream.height = 64
        for image in textured(60):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    cut = tmp_path / f"cut.{suffix}"
    cut.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match="cut"):
        read_frames(cut)


def test_damage_in_the_middle_is_never_silent(tmp_path, clip):
    path, _ = clip
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 2000] = bytes(2000)
    (tmp_path / "hole.mp4").write_bytes(data)
    with pytest.raises(DataError, match=r"hole\.mp4"):
        read_frames(tmp_path / "hole.mp4")


def test_an_empty_folder_says_what_belongs_there(tmp_path):
    with pytest.raises(DataError, match=r"holds no videos.*\.mp4"):
        VideoFolderReader(tmp_path)


def test_a_failed_write_leaves_nothing(tmp_path, textured):
    def frames():
        yield textured(1)[0]
        raise RuntimeError("camera unplugged")

    with pytest.raises(RuntimeError):
        write_video(tmp_path / "a.mp4", frames(), 10)
    assert list(tmp_path.iterdir()) == []
