"""Videos as episodes: which frame stands for which step, folders and their captions."""

import json

import numpy as np
import pytest

from mmseq.data.importing import open_episodes
from mmseq.data.video import read_frames
from mmseq.data.video_folder import VideoFolderReader, read_video_episode, resample_indices
from mmseq.errors import DataError
from mmseq.mp4 import write_video
from mmseq.reading import Reading


@pytest.fixture
def clip(tmp_path, textured):
    frames = textured(40)
    write_video(tmp_path / "clip.mp4", frames, 20)
    return tmp_path / "clip.mp4", frames


def test_resampling_takes_the_nearest_frame():
    times = np.arange(30) / 30
    assert resample_indices(times, 10, 1.0).tolist() == [0, 3, 6, 9, 12, 15, 18, 21, 24, 27]
    assert resample_indices(times, 8, 1.0).tolist() == [0, 4, 7, 11, 15, 19, 22, 26]
    assert resample_indices(times[:3], 60, 0.1).tolist() == [0, 0, 1, 1, 2, 2]  # the earlier of two as near
    in_milliseconds = np.round(times, 3)  # of which some lie after their tick, some before
    assert resample_indices(in_milliseconds, 30, 1.0).tolist() == list(range(30))
    assert resample_indices(np.array([0, 0.1, 0.19, 0.5]), 10, 0.6).tolist() == [0, 1, 2, 2, 3, 3]
    assert resample_indices(np.zeros(1), 10, 0.05).tolist() == [0]


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


def test_an_empty_folder_says_what_belongs_there(tmp_path):
    with pytest.raises(DataError, match=r"holds no videos.*\.mp4"):
        VideoFolderReader(tmp_path)


def test_a_video_is_read_as_its_owner_says(clip):
    path, _ = clip
    read = lambda **said: open_episodes(path, Reading(**said), format="video", rate_hz=5)[0]
    plain, changed = read(), read(swap_colours=["main"], assume_success=True)
    assert (plain.success, changed.success) == (None, True)
    np.testing.assert_array_equal(changed["image.main"], plain["image.main"][..., ::-1])
    with pytest.raises(DataError, match="no map changes"):
        read(map={"image.a": "b"})
