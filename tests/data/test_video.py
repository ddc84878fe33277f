import struct
from fractions import Fraction

import numpy as np
import pytest

from mmseq.data.video import VideoDecoder, probe, read_frames
from mmseq.data.video_folder import read_video_episode
from mmseq.errors import DataError
from mmseq.mp4 import write_video


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


# ---------------------------------------------------------------------- what others write


def numbered(count, height=32, width=64):
    """Frames that say their number in eight blocks, which no codec loses."""
    bits = (np.arange(count)[:, None] >> np.arange(8)) & 1
    blocks = np.repeat(np.where(bits, 230, 20).astype(np.uint8), -(-width // 8), axis=1)[:, None, :width, None]
    return np.broadcast_to(blocks, (count, height, width, 3))


def numbers(frames):
    width = frames.shape[2] // 8
    blocks = frames[:, 8:24, : 8 * width].mean((1, 3)).reshape(len(frames), 8, width)[:, :, width // 4 : -width // 4]
    return ((blocks.mean(2) > 125) << np.arange(8)).sum(1).tolist()


def encode(path, frames, codec="libx264", pts=None, options=None, container=None, audio_s=0.0):
    """A video of 10 frames per second, pts in milliseconds, in whatever the suffix says; with silence beside it."""
    import av

    with av.open(str(path), "w", options=container or {}) as out:
        stream = out.add_stream(codec, rate=10, options=options or {"g": "12"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p" if codec == "libx264" else "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        sound = out.add_stream("aac", rate=48000) if audio_s else None
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = (100 * i if pts is None else int(pts[i])), Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        for start in range(0, int(audio_s * 48000), 1024):
            silence = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
            silence.sample_rate, silence.pts, silence.time_base = 48000, start, Fraction(1, 48000)
            out.mux(sound.encode(silence))


def cut(source, path, first):
    """The packets from `first` on, as a cut by stream copy leaves them."""
    import av

    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(old.demux(video=0)):
            if packet.dts is not None and number >= first:
                packet.stream = stream
                new.mux(packet)


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mkv", "libx264"), ("a.mp4", "libx264"), ("a.mov", "libx264"), ("a.webm", "libvpx-vp9"), ("a.ts", "libx264")],
)
def test_a_video_may_begin_at_any_time(tmp_path, name, codec):
    path = tmp_path / name
    encode(path, numbered(25), codec, pts=5000 + 100 * np.arange(25))
    episode = read_video_episode(path)
    assert numbers(episode["image.main"]) == list(range(25))
    assert (episode.rate_hz, probe(path).times_s[0]) == (10, 0)


@pytest.mark.parametrize(("codec", "suffix"), [("libx264", "mkv"), ("libx264", "mp4"), ("libvpx-vp9", "webm")])
@pytest.mark.parametrize("b_frames", ["0", "3"])
def test_a_cut_by_stream_copy_begins_with_its_first_key_frame(tmp_path, codec, suffix, b_frames):
    encode(tmp_path / f"whole.{suffix}", numbered(40), codec, options={"g": "12", "bf": b_frames, "sc_threshold": "0"})
    cut(tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}", first=5)
    info = probe(tmp_path / f"cut.{suffix}")
    last = 39 if (suffix, b_frames) == ("mp4", "3") else 40  # the writer's edit list hides one more at the end
    assert (info.frames, info.times_s[0]) == (last - 12, 0)
    assert numbers(read_frames(tmp_path / f"cut.{suffix}")) == list(range(12, last))
    assert numbers(read_frames(tmp_path / f"cut.{suffix}", [0, 20])) == [12, 32]


def test_frames_that_are_never_shown_do_not_count(tmp_path):
    options = {"auto-alt-ref": "1", "lag-in-frames": "16", "arnr-maxframes": "7", "deadline": "good", "b": "2M"}
    encode(tmp_path / "a.webm", numbered(50), "libvpx", options=options)
    assert probe(tmp_path / "a.webm").frames == 50
    assert numbers(read_frames(tmp_path / "a.webm")) == list(range(50))


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_sound_may_be_longer_than_the_video(tmp_path, suffix):
    encode(tmp_path / f"a.{suffix}", numbered(20), audio_s=6.0)
    assert numbers(read_video_episode(tmp_path / f"a.{suffix}")["image.main"]) == list(range(20))


def test_frames_that_stay_are_repeated_and_none_is_lost(tmp_path):
    gaps = np.cumsum([0, *[100, 100, 100, 100, 500] * 4])
    encode(tmp_path / "a.mkv", numbered(len(gaps)), pts=gaps)
    info = probe(tmp_path / "a.mkv")
    assert info.rate_hz == 10
    found = numbers(read_video_episode(tmp_path / "a.mkv")["image.main"])
    assert sorted(set(found)) == list(range(len(gaps)))
    assert found[:12] == [0, 1, 2, 3, 4, 4, 4, 5, 5, 5, 6, 7]
    encode(tmp_path / "b.mkv", numbered(30), pts=np.cumsum([100, 300] * 15))  # no gap is the usual one
    assert probe(tmp_path / "b.mkv").rate_hz == pytest.approx(29 / 5.9, rel=1e-4)
    jump = np.where(np.arange(30) < 15, 0, 3_600_000) + 100 * np.arange(30)  # the clock was set
    encode(tmp_path / "c.mkv", numbered(30), pts=jump)
    assert len(read_video_episode(tmp_path / "c.mkv")) <= 31


def test_milliseconds_do_not_repeat_or_skip_frames(tmp_path):
    encode(tmp_path / "a.mkv", numbered(40), pts=np.round(np.arange(40) * 1000 / 30))
    episode = read_video_episode(tmp_path / "a.mkv")
    assert numbers(episode["image.main"]) == list(range(40))
    assert episode.rate_hz == pytest.approx(30, rel=1e-3)


@pytest.mark.parametrize(("matrix", "turns"), [((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)])
def test_rotated_frames_stand_upright(tmp_path, matrix, turns):
    encode(tmp_path / "a.mp4", numbered(4))
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    at = data.index(b"tkhd") + 44
    a, b, c, d = (value << 16 for value in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(data)
    upright = np.rot90(read_frames(tmp_path / "a.mp4"), turns, axes=(1, 2))
    info = probe(tmp_path / "turned.mp4")
    assert (info.height, info.width) == upright.shape[1:3]
    np.testing.assert_array_equal(read_frames(tmp_path / "turned.mp4"), upright)
    assert read_frames(tmp_path / "turned.mp4", []).shape == (0, *upright.shape[1:])


@pytest.mark.parametrize(
    ("name", "container"),
    [
        ("a.mkv", {}),
        ("a.mp4", {"movflags": "faststart"}),
        ("a.mp4", {"movflags": "frag_keyframe+empty_moov"}),
        ("a.avi", {}),
    ],
)
def test_only_what_lacks_bytes_is_truncated(tmp_path, name, container):
    path = tmp_path / name
    encode(path, numbered(40), "mpeg4" if name.endswith("avi") else "libx264", container=container)
    data = path.read_bytes()
    (tmp_path / f"padded-{name}").write_bytes(data + bytes(5000))
    assert numbers(read_frames(tmp_path / f"padded-{name}")) == list(range(40))
    (tmp_path / f"cut-{name}").write_bytes(data[: len(data) * 6 // 10])
    with pytest.raises(DataError, match=r"is truncated: its last \d+ bytes are missing"):
        read_frames(tmp_path / f"cut-{name}")
    with pytest.raises(DataError, match="is truncated"):
        read_frames(data[:-1])


def test_a_recording_that_was_never_closed_is_read_as_far_as_it_goes(tmp_path):
    encode(tmp_path / "live.mkv", numbered(40), options={"g": "5", "bf": "0"}, container={"live": "1"})
    data = (tmp_path / "live.mkv").read_bytes()
    found = numbers(read_frames(data[: len(data) * 6 // 10]))
    assert found == list(range(len(found)))
    assert 10 < len(found) < 40


def test_the_nearest_frame_wins_over_the_first_that_is_near(tmp_path):
    encode(tmp_path / "a.mkv", numbered(10), pts=[0, 60, 100, 200, 290, 300, 310, 400, 500, 600])
    with VideoDecoder(tmp_path / "a.mkv") as decoder:
        read = lambda *pts, tolerance=49: numbers(np.stack(list(decoder.frames_at(pts, tolerance))))
        assert read(0, 100, 200, 300, 400) == [0, 2, 3, 5, 7]
        assert read(52, 295, 295, 304, 306) == [1, 4, 4, 5, 6]  # as near as the next: the earlier
        assert read(649) == [9]
        with pytest.raises(DataError, match=r"no frame at 0\.6500 s, the nearest is at 0\.6000 s"):
            read(650)
        with pytest.raises(DataError, match=r"no frame at 0\.2500 s, the nearest is at 0\.2900 s"):
            read(200, 250, tolerance=39)
