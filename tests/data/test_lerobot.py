import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmseq import Embodiment, Episode
from mmseq.data.importing import EpisodeShardReader, import_episodes, open_episodes
from mmseq.data.lerobot import LeRobotReader
from mmseq.data.mapping import read_map
from mmseq.data.sources import source_identity
from mmseq.embodiment import Camera
from mmseq.errors import DataError, EmbodimentError, EpisodeError
from mmseq.reading import Reading


def edit_info(path, **changes):
    file = path / "meta" / "info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_data(path, change):
    file = next((path / "data").rglob("*.parquet"))
    table = pq.read_table(file)
    pq.write_table(change(table), file)


def replace_column(table, name, values):
    return table.set_column(table.column_names.index(name), name, values)


def test_parity_with_lerobots_own_reader(written):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    path, _ = written
    theirs = LeRobotDataset("local/toy", root=path, video_backend="pyav")
    reader = LeRobotReader(path)
    row = 0
    for episode in reader:
        for t in range(len(episode)):
            item = theirs[row]
            row += 1
            assert item["task"] == episode.texts[0]
            np.testing.assert_array_equal(item["observation.state"].numpy(), episode["proprio"][t])
            np.testing.assert_array_equal(item["action"].numpy(), episode["action"][t])
            for camera, tolerance in (("top", 2), ("wrist", 0)):
                image = (item[f"observation.images.{camera}"].numpy().transpose(1, 2, 0) * 255).round()
                assert np.abs(image - episode[f"image.{camera}"][t]).max() <= tolerance
    assert row == len(theirs) == reader.info["total_frames"]


def test_episodes_are_those_that_were_written(written, psnr):
    path, episodes = written
    reader = LeRobotReader(path)
    assert len(reader) == 3
    assert (reader.cameras, reader.left_out, reader.notes) == (["top", "wrist"], {}, [])
    for index, (ours, truth) in enumerate(zip(reader, episodes, strict=True)):
        assert len(ours) == len(truth["state"])
        assert (ours.texts, ours.embodiment, ours.rate_hz) == ([truth["task"]], "toy_arm", 10)
        assert ours.success is (index != 1)
        assert ours["action"].dtype == ours["proprio"].dtype == np.float32
        np.testing.assert_array_equal(ours["image.wrist"], truth["wrist"])
        assert psnr(ours["image.top"], truth["top"]) > 30
    np.testing.assert_array_equal(Episode.from_lerobot(path, 1)["action"], episodes[1]["action"])


def test_random_access_gives_the_frames_of_reading_in_order(written):
    reader = LeRobotReader(written[0])
    in_order = [episode["image.top"] for episode in reader]
    for index in (2, 0, 1, 1, 2, 0):
        np.testing.assert_array_equal(reader[index]["image.top"], in_order[index])
    frames = reader.frames(1, "top")  # abandoned half way
    next(frames)
    del frames
    np.testing.assert_array_equal(reader[1]["image.top"], in_order[1])


def test_single_frames_are_those_of_reading_in_order(written):
    """Also across key frames, of which there is one in four, and across episodes, which share a file."""
    reader = LeRobotReader(written[0])
    in_order = {(i, c): episode[f"image.{c}"] for i, episode in enumerate(reader) for c in reader.cameras}
    rng = np.random.default_rng(0)
    for _ in range(60):
        index, camera = int(rng.integers(len(reader))), str(rng.choice(reader.cameras))
        whole = in_order[index, camera]
        first = int(rng.integers(len(whole)))
        for steps in ([first], range(first, min(first + 6, len(whole))), [first, first, len(whole) - 1]):
            np.testing.assert_array_equal(np.stack(list(reader.frames(index, camera, steps))), whole[list(steps)])
    assert list(reader.frames(0, "top", [])) == []
    with pytest.raises(IndexError):
        reader.frames(1, "top", [len(in_order[1, "top"])])


def test_reading_in_order_opens_each_video_once_and_never_seeks_again(written, monkeypatch):
    from mmseq.data import lerobot_video, video

    opened, sought = [], []
    original = video.VideoDecoder._seek
    monkeypatch.setattr(video.VideoDecoder, "_seek", lambda self, pts: (sought.append(pts), original(self, pts)))

    class Counting(video.VideoDecoder):
        def __init__(self, *arguments):
            opened.append(arguments)
            super().__init__(*arguments)

    monkeypatch.setattr(lerobot_video, "VideoDecoder", Counting)
    for episode in LeRobotReader(written[0]):
        episode["image.top"]
    assert len(opened) == 1
    assert sought == []


def test_images_are_decoded_only_when_used(dataset):
    episode = LeRobotReader(dataset)[0]
    video = next(dataset.rglob("*.mp4"))
    video.write_bytes(b"")
    assert episode["action"].shape == (12, 3)
    with pytest.raises(DataError, match=r"\.mp4 is empty"):
        episode["image.top"]


def test_the_embodiment_is_inferred(written):
    path, episodes = written
    robot = LeRobotReader(path).embodiment()
    assert (robot.name, robot.rate_hz, robot.action_form, robot.grippers) == ("toy_arm", 10, "delta", ())
    assert robot.cameras == (Camera(name="top", height=64, width=64), Camera(name="wrist", height=64, width=64))
    assert robot.proprio.names == ("x", "y", "gripper")
    assert robot.action.units == ("unitless",) * 3
    values = np.concatenate([e["action"] for e in episodes])
    np.testing.assert_allclose(robot.action.low, values.min(0), rtol=1e-5)
    np.testing.assert_allclose(robot.action.high, values.max(0), rtol=1e-5)
    assert (np.asarray(robot.action.minimum) < values.min(0)).all()


def test_a_stored_or_given_embodiment_is_used_and_held_to(dataset):
    robot = LeRobotReader(dataset).embodiment()
    fields = robot.to_dict() | {"name": "renamed", "gripper": {"axis": "gripper", "open": 1.0, "closed": 0.0}}
    named = Embodiment.from_dict(fields)
    named.save(dataset / "meta" / "embodiment.json")
    reader = LeRobotReader(dataset)
    assert reader.embodiment() == named
    assert reader[0].embodiment == "renamed"
    narrow = Embodiment(name="narrow", rate_hz=10, cameras=robot.cameras, action=robot.action)
    with pytest.raises(EmbodimentError, match=r"'narrow' has 0 axes for observation.state"):
        LeRobotReader(dataset, embodiment=narrow).embodiment()
    with pytest.raises(EmbodimentError, match="runs at 10 Hz, the episodes at 5"):
        LeRobotReader(dataset, rate_hz=5, embodiment=robot)
    small = Embodiment.from_dict(robot.to_dict() | {"cameras": [{"name": "top", "height": 32, "width": 32}]})
    with pytest.raises(EmbodimentError, match="has cameras"):
        LeRobotReader(dataset, embodiment=small).embodiment()


def test_a_lower_rate_sums_delta_actions_and_keeps_the_last_gripper(written):
    path, episodes = written
    reader = LeRobotReader(path, rate_hz=5)
    episode = reader[2]
    action, state = episodes[2]["action"], episodes[2]["state"]
    assert len(episode) == 7
    np.testing.assert_array_equal(episode["proprio"], state[0:14:2])
    np.testing.assert_allclose(episode["action"][:, :2], (action[0:14:2] + action[1:14:2])[:, :2], rtol=1e-6)
    np.testing.assert_array_equal(episode["action"][:, 2], action[1:14:2, 2])
    np.testing.assert_array_equal(episode["image.top"], LeRobotReader(path)[2]["image.top"][0:14:2])
    assert reader.embodiment().rate_hz == 5
    reader.embodiment().action.check(episode["action"], what="action", where="here")
    with pytest.raises(DataError, match="rate_hz=20, but the dataset has 10"):
        LeRobotReader(path, rate_hz=20)


def test_a_lower_rate_keeps_the_last_absolute_target(dataset):
    robot = LeRobotReader(dataset).embodiment()
    Embodiment.from_dict(robot.to_dict() | {"action_form": "absolute"}).save(dataset / "meta" / "embodiment.json")
    full, half = LeRobotReader(dataset)[2], LeRobotReader(dataset, rate_hz=5)[2]
    np.testing.assert_array_equal(half["action"], full["action"][1:14:2])
    wide = robot.to_dict() | {"action_form": "absolute"}
    wide["action"] = wide["action"] | {"maximum": [9.0] * 3}
    Embodiment.from_dict(wide).save(dataset / "meta" / "embodiment.json")
    assert LeRobotReader(dataset, rate_hz=5).embodiment().action.maximum == (9.0,) * 3  # it has the same limits
    given = Embodiment.from_dict(wide | {"name": "given"})
    assert LeRobotReader(dataset, embodiment=given).embodiment() == given  # over the stored one


def test_paraphrases_and_plans(dataset):
    extra = {"tasks": {"push the blue block": {"paraphrases": ["shove it"], "plan": "reach, then push"}}}
    (dataset / "meta" / "mmseq.json").write_text(json.dumps(extra))
    reader = LeRobotReader(dataset)
    assert (reader[0].texts, reader[0].plans) == (["push the blue block", "shove it"], ["reach, then push"])
    assert (reader[1].texts, reader[1].plans) == (["push the red block"], [])
    (dataset / "meta" / "mmseq.json").write_text('{"tasks": {"a": {"paraphrases": "b"}}}')
    with pytest.raises(DataError, match=r"mmseq\.json cannot be read"):
        LeRobotReader(dataset)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("v1.6", r"version v1\.6, this reads v2 and v3\. Convert it to v2\.0.*convert_dataset_v1_to_v2"),
        ("v4.0", r"version v4\.0\. Update mmseq"),
    ],
)
def test_versions_that_are_not_read_name_the_way_out(dataset, version, message):
    edit_info(dataset, codebase_version=version)
    with pytest.raises(DataError, match=message):
        LeRobotReader(dataset)
    (dataset / "meta").rename(dataset / "meta_data")
    with pytest.raises(DataError, match=r"of version 1.*convert_dataset_v1_to_v2"):
        open_episodes(dataset)


@pytest.mark.parametrize("version", ["v2.0", "v2.1", None])
def test_the_layout_decides_over_the_version_that_is_said(dataset, version):
    info = json.loads((dataset / "meta" / "info.json").read_text())
    info.pop("codebase_version")
    (dataset / "meta" / "info.json").write_text(json.dumps(info | ({"codebase_version": version} if version else {})))
    reader = LeRobotReader(dataset)
    assert (len(reader), reader.layout.version) == (3, "v3")
    assert [n for n in reader.notes if "laid out as v3" in n] == (reader.notes if version else [])


def test_not_a_dataset_and_an_empty_one(dataset, tmp_path):
    with pytest.raises(DataError, match="not a LeRobot dataset"):
        LeRobotReader(tmp_path)
    for file in (dataset / "meta" / "episodes").rglob("*.parquet"):
        file.unlink()
    with pytest.raises(DataError, match=r"not where its videos are.*finalize\(\)"):
        LeRobotReader(dataset)
    edit_data(dataset, lambda table: table.slice(0, 0))
    edit_info(dataset, total_episodes=0, total_frames=0)
    with pytest.raises(DataError, match="has no episodes"):
        LeRobotReader(dataset)


@pytest.mark.parametrize("pattern", ["data/**/*.parquet", "meta/episodes/**/*.parquet", "meta/tasks.parquet"])
def test_truncated_parquet_is_named(dataset, pattern):
    file = next(dataset.glob(pattern))
    whole = file.read_bytes()
    causes = {
        whole[: len(whole) // 2]: r"is truncated or corrupt, it has no footer.*finalize\(\).*Fetch.*--skip-bad",
        b"": "is truncated or corrupt, it has no footer",
        whole[:-40] + bytes(36) + b"PAR1": "is truncated or corrupt: .*Fetch the dataset again",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0": "is a pointer of Git LFS.*git lfs pull",
    }
    for data, message in causes.items():
        file.write_bytes(data)
        with pytest.raises(DataError, match=rf"{file.name} {message}"):
            LeRobotReader(dataset)


@pytest.mark.parametrize("pattern", ["data/**/*.parquet", "videos/**/*.mp4", "meta/tasks.parquet"])
def test_missing_files_are_named(dataset, pattern):
    file = next(dataset.glob(pattern))
    file.unlink()
    with pytest.raises(DataError, match=rf"{file.name} is missing\. Fetch"):
        LeRobotReader(dataset).check(0)


def test_a_truncated_video_is_named(dataset):
    file = next(dataset.rglob("*.mp4"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 3])
    with pytest.raises(DataError, match=r"file-000\.mp4 "):
        [episode["image.top"] for episode in LeRobotReader(dataset)]


def test_where_no_picture_can_be_read_the_first_reason_is_told(dataset):
    for file in sorted(dataset.rglob("*.mp4")):
        file.unlink()
    with pytest.raises(DataError, match=r"file-000\.mp4 is missing\. Fetch"):
        LeRobotReader(dataset).embodiment()


def test_nan_is_named_with_axis_and_step(dataset):
    def poison(table):
        values = np.array(table["action"].to_pylist(), dtype=np.float32)
        values[12 + 3, 1] = np.nan
        return replace_column(table, "action", pa.array(list(values)))

    edit_data(dataset, poison)
    reader = LeRobotReader(dataset)
    assert len(reader[0]) == 12
    with pytest.raises(EpisodeError, match="episode 1: action axis 'delta_y' is nan at step 3"):
        reader[1]
    assert np.isfinite(reader.embodiment().action.maximum).all()  # of the episodes that can be read


def test_rows_decide_over_lengths_and_totals(dataset, written):
    edit_data(dataset, lambda table: table.slice(0, len(table) - 2))
    edit_info(dataset, total_frames=99, total_episodes=2)
    reader = LeRobotReader(dataset)
    assert [len(e) for e in reader] == [12, 7, 13]
    np.testing.assert_array_equal(reader[2]["image.wrist"], written[1][2]["wrist"][:13])
    assert len(reader[2]["image.top"]) == 13
    assert reader.notes == [
        "meta/info.json says 2 episodes, the data hold 3",
        "meta/info.json says 99 frames, the data hold 32",
        "episode 2: of another length than meta/episodes says, as the data have it",
    ]


def test_more_episodes_promised_than_there_are_is_an_episode_that_is_missing(dataset, tmp_path):
    edit_info(dataset, total_episodes=4)
    with pytest.raises(DataError, match=r"1 of 4 .*episode 3: meta/info.json promises 4 episodes, there are 3"):
        import_episodes(dataset, tmp_path / "out")


@pytest.mark.parametrize("feature", [None, "float32", {"dtype": "float32", "shape": "x"}, {"shape": [4]}, {}])
def test_rows_decide_over_what_is_said_of_a_feature(dataset, written, feature):
    info = json.loads((dataset / "meta" / "info.json").read_text())
    edit_info(dataset, features=info["features"] | {"action": feature})
    reader = LeRobotReader(dataset)
    np.testing.assert_array_equal(reader[1]["action"], written[1][1]["action"])
    assert reader.embodiment().action.names == ("axis_0", "axis_1", "axis_2")


@pytest.mark.parametrize("rate_hz", [0, -1, 0.0001, float("nan")])
def test_a_rate_that_cannot_be_is_refused(dataset, tmp_path, rate_hz):
    with pytest.raises(DataError, match="rate_hz is"):
        import_episodes(dataset, tmp_path / "out", rate_hz=rate_hz)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a", "b", "c"], ("a", "b", "c")),
        ({"motors": ["a", "b", "c"]}, ("a", "b", "c")),
        ({"left": ["a", "b"], "right": ["c"]}, ("a", "b", "c")),
        ({"c": 2, "a": 0, "b": 1}, ("a", "b", "c")),
        (["actions"], ("actions_0", "actions_1", "actions_2")),
        (None, ("axis_0", "axis_1", "axis_2")),
        ([["a", "b", "c"]], ("a", "b", "c")),
        ([["a", "b"], ["c"]], ("a", "b", "c")),
        ({"motors": [["a", "b"], "c"]}, ("a", "b", "c")),
        (["x", "gripper", "gripper"], ("x", "gripper", "gripper_2")),
        (["a", "a", "a_2"], ("a", "a_3", "a_2")),
        ({"c": 2.0, "a": 0.0, "b": 1.0}, ("a", "b", "c")),
        ({"a": "x", "b": "y", "c": "z"}, ("x", "y", "z")),
        ("arm", ("arm_0", "arm_1", "arm_2")),
        ([1, 2, 3], ("1", "2", "3")),
        (["a", "b"], ("axis_0", "axis_1", "axis_2")),
    ],
)
def test_names_of_axes_in_all_their_forms(dataset, names, expected):
    info = json.loads((dataset / "meta" / "info.json").read_text())
    info["features"]["action"]["names"] = names
    edit_info(dataset, features=info["features"])
    assert LeRobotReader(dataset).embodiment().action.names == expected


@pytest.mark.parametrize(
    ("names", "form"),
    [
        (["delta_x", "delta_y", "gripper"], "delta"),
        (["vel_x", "arm.vel", "gripper.pos"], "velocity"),
        (["joint_velocity", "y_vel", "z_vel_"], "velocity"),
        (["delta_x", "y", "gripper"], "absolute"),
        (["gripper", "left_gripper", "Gripper.pos"], "absolute"),
        (["a", "b", "c"], "absolute"),
    ],
)
def test_the_form_of_actions_is_what_all_of_their_names_say(dataset, names, form):
    info = json.loads((dataset / "meta" / "info.json").read_text())
    info["features"]["action"]["names"] = names
    edit_info(dataset, features=info["features"])
    assert LeRobotReader(dataset).embodiment().action_form == form


def test_rates_that_a_reader_refuses(written):
    for rate in (0, -1.0, 10.1):
        with pytest.raises(DataError, match=f"rate_hz={rate:g}, but the dataset has 10"):
            LeRobotReader(written[0], rate_hz=rate)
    assert len(LeRobotReader(written[0], rate_hz=10)[0]) == 12


def test_a_set_without_anything_to_learn_from_says_what_it_has(dataset):
    info = json.loads((dataset / "meta" / "info.json").read_text())
    for name in ("observation.images.top", "observation.images.wrist", "observation.state", "action"):
        info["features"].pop(name)
    edit_info(dataset, features=info["features"])
    edit_data(dataset, lambda t: t.drop_columns(["observation.images.wrist", "observation.state", "action"]))
    with pytest.raises(DataError, match=r"has neither cameras nor.*observation\.images\.top \(videos that.*with --map"):
        LeRobotReader(dataset)


@pytest.mark.parametrize(("left_out", "has"), [("images", ["proprio", "action"]), ("vectors", ["image.top"])])
def test_a_set_of_pictures_or_of_vectors_alone_is_read(dataset, left_out, has):
    vectors = ["observation.state", "action"]
    names = vectors if left_out == "vectors" else ["observation.images.top", "observation.images.wrist"]
    info = json.loads((dataset / "meta" / "info.json").read_text())
    edit_info(dataset, features={name: f for name, f in info["features"].items() if name not in names})
    edit_data(dataset, lambda t: t.drop_columns([name for name in names if name in t.column_names]))
    reader = LeRobotReader(dataset)
    assert set(has) <= set(reader[0].streams)
    assert (bool(reader.cameras), bool(reader.vectors)) == (left_out == "vectors", left_out == "images")
    assert bool(reader.embodiment().cameras) == bool(reader.cameras)


def test_velocities_are_averaged_and_rates_that_do_not_divide_are_kept_to(dataset, written):
    fields = LeRobotReader(dataset).embodiment().to_dict() | {"action_form": "velocity"}
    fields["gripper"] = {"axis": "delta_y", "open": 0.5, "closed": 0.0}  # which no name would tell
    Embodiment.from_dict(fields).save(dataset / "meta" / "embodiment.json")
    action, state = written[1][2]["action"], written[1][2]["state"]  # 15 frames at 10 Hz, in steps of 2.5 frames
    episode = LeRobotReader(dataset, rate_hz=4)[2]
    starts, ends = [0, 2, 5, 7, 10, 12], [2, 5, 7, 10, 12, 15]
    np.testing.assert_array_equal(episode["proprio"], state[starts])
    means = [action[a:b, 0].astype(np.float64).mean() for a, b in zip(starts, ends)]
    np.testing.assert_allclose(episode["action"][:, 0], means, rtol=1e-6)
    np.testing.assert_array_equal(episode["action"][:, 1:], action[np.array(ends) - 1, 1:])
    assert (episode.rate_hz, episode.metadata["source_steps"], len(episode)) == (4, 15, 6)


def test_sizes_are_what_most_pictures_have_where_none_is_as_said(dataset):
    from PIL import Image

    info = json.loads((dataset / "meta" / "info.json").read_text())
    info["features"]["observation.images.wrist"] |= {"shape": [3, 40, 50], "names": ["channels", "height", "width"]}
    edit_info(dataset, features=info["features"])
    sizes = np.repeat([(64, 64), (40, 50), (64, 64)], (12, 7, 15), axis=0)

    def redraw(table):
        stored = []
        for height, width in sizes:
            buffer = io.BytesIO()
            Image.new("RGB", (int(width), int(height))).save(buffer, "png")
            stored.append({"bytes": buffer.getvalue(), "path": None})
        return replace_column(table, "observation.images.wrist", pa.array(stored))

    edit_data(dataset, redraw)
    assert LeRobotReader(dataset).embodiment().cameras[1] == Camera(name="wrist", height=40, width=50)  # one agrees
    sizes[12:19] = (30, 30)
    edit_data(dataset, redraw)
    reader = LeRobotReader(dataset)
    assert reader.embodiment().cameras[1] == Camera(name="wrist", height=64, width=64)
    assert reader.notes == ["observation.images.wrist is 64 x 64, meta/info.json says 40 x 50"]


@pytest.mark.parametrize(
    ("shape", "names", "said"),
    [
        ([64, 64, 3], ["height", "width", "channels"], None),
        ([3, 64, 64], ["channels", "height", "width"], None),
        ([4, 64, 64], ["channels", "height", "width"], None),
        ([3, 64, 64], None, None),
        ([64, 64, 4], None, None),
        ([64, 64, 1], "rgb", None),
        ([3, 40, 50], None, "40 x 50"),
        ([40, 50, 3], None, "40 x 50"),
        ([64, 64], None, "0 x 0"),
        ([64, 64, 3, 1], None, "0 x 0"),
        ("64x64", None, "0 x 0"),
        (None, None, "0 x 0"),
    ],
)
def test_the_size_that_is_said_of_a_picture_is_read_in_all_its_forms(dataset, shape, names, said):
    info = json.loads((dataset / "meta" / "info.json").read_text())
    info["features"]["observation.images.wrist"] |= {"shape": shape, "names": names}
    edit_info(dataset, features=info["features"])
    reader = LeRobotReader(dataset)
    assert reader.embodiment().cameras[1] == Camera(name="wrist", height=64, width=64)
    wanted = [] if said is None else [f"observation.images.wrist is 64 x 64, meta/info.json says {said}"]
    assert [note for note in reader.notes if "wrist is" in note] == wanted


@pytest.mark.parametrize(
    ("stamps_hz", "video_hz", "expected"), [(20, 20, 20), (20, 10, 10), (20, 15, 10), (12.5, 12.5, 12.5)]
)
def test_steady_timestamps_of_another_rate_decide_where_the_videos_agree(
    dataset, written, stamps_hz, video_hz, expected
):
    from mmseq.data.video import read_frames
    from mmseq.mp4 import encode_video

    video = next(dataset.rglob("*.mp4"))
    video.write_bytes(encode_video(read_frames(video), video_hz)[0])
    steps = [np.arange(len(e["action"])) for e in written[1]]
    stamp = lambda times: edit_data(dataset, lambda t: replace_column(t, "timestamp", pa.array(np.float32(times))))
    stamps = np.concatenate(steps) / stamps_hz
    stamp(stamps)
    reader = LeRobotReader(dataset)
    assert reader.fps == reader[0].rate_hz == pytest.approx(expected)
    (note,) = [note for note in reader.notes if f"says 10 steps per second, the timestamps {stamps_hz:g}" in note]
    assert note.endswith(" and so do the videos, which decide") == (expected != 10)
    stamps[14] += 0.4 / stamps_hz  # no longer steady in one of them
    stamp(stamps)
    assert LeRobotReader(dataset).fps == 10
    stamp(np.concatenate([steps[0] / stamps_hz, steps[1] / (1.1 * stamps_hz), steps[2] / stamps_hz]))  # nor the same
    assert LeRobotReader(dataset).fps == 10


@pytest.mark.parametrize(
    ("value", "expected"), [(True, True), (False, False), (None, None), (float("nan"), None), ("failure", False)]
)
def test_an_outcome_that_nobody_knows_is_none(dataset, value, expected):
    known = lambda t: replace_column(t, "next.success", pa.array([False] * 12 + [value] * 7 + [True] * 15))
    if not isinstance(value, bool | None):
        text = lambda v: None if v != v else str(v)
        known = lambda t: replace_column(t, "next.success", pa.array(["no"] * 12 + [text(value)] * 7 + ["yes"] * 15))
    edit_data(dataset, known)
    assert [e.success for e in LeRobotReader(dataset)] == [False, expected, True]


def test_an_outcome_may_stand_in_the_list_of_episodes(dataset):
    info = json.loads((dataset / "meta" / "info.json").read_text())
    info["features"].pop("next.success")
    edit_info(dataset, features=info["features"])
    edit_data(dataset, lambda t: t.drop_columns(["next.success"]))
    file = next((dataset / "meta" / "episodes").rglob("*.parquet"))
    pq.write_table(pq.read_table(file).append_column("success", pa.array([True, None, False])), file)
    assert [episode.success for episode in LeRobotReader(dataset)] == [True, None, False]


@pytest.mark.parametrize(
    ("said", "name"),
    [("机器人", "robot_机器人"), (["a", "b"], "a_b"), (None, "unknown"), ("//", "robot"), ("x" * 200, "x" * 100)],
)
def test_a_robot_type_becomes_a_name(dataset, said, name):
    edit_info(dataset, robot_type=said)
    assert LeRobotReader(dataset)[0].embodiment == LeRobotReader(dataset).embodiment().name == name


def test_a_given_contract_is_held_to_the_vectors_that_are_mapped(dataset):
    mapped = {"force": ("observation.state",)}
    robot = LeRobotReader(dataset, map=mapped).embodiment()
    assert robot.streams["force"].names == ("x", "y", "gripper")
    assert LeRobotReader(dataset, embodiment=robot, map=mapped).embodiment() == robot
    with pytest.raises(EmbodimentError, match=r"has 3 axes for force, .* has 0"):
        LeRobotReader(dataset, embodiment=robot).embodiment()
    slow = LeRobotReader(dataset, rate_hz=5).embodiment()
    robot.save(dataset / "meta" / "embodiment.json")
    held = LeRobotReader(dataset, rate_hz=5, map=mapped).embodiment()
    assert (held.rate_hz, held.proprio) == (5, robot.proprio)
    assert held.action.maximum == slow.action.maximum  # of sums over two steps


def test_parts_of_a_column_are_streams_of_their_own(dataset, tmp_path):
    whole = LeRobotReader(dataset)
    given = read_map(
        "proprio=observation.state[:2],hand=observation.state[2:3],motion=action[1:]+observation.state[:1]"
    )
    reader = LeRobotReader(dataset, map=given)
    robot, state = reader.embodiment(), whole[0]["proprio"]
    assert robot.proprio.names == ("x", "y")
    assert robot.streams["hand"].names == ("gripper",)
    assert robot.streams["motion"].names == (*whole.embodiment().action.names[1:], "x")
    np.testing.assert_array_equal(reader[0]["proprio"], state[:, :2])
    np.testing.assert_array_equal(reader[0]["hand"], state[:, 2:])
    np.testing.assert_array_equal(reader[0]["motion"], np.concatenate([whole[0]["action"][:, 1:], state[:, :1]], 1))
    assert LeRobotReader(dataset, embodiment=robot, map=given).embodiment() == robot
    manifest = import_episodes(dataset, tmp_path / "out", Reading(map={"hand": "observation.state[2:3]"}))
    assert manifest["map"] == {"hand": ["observation.state[2:3]"]}
    np.testing.assert_array_equal(EpisodeShardReader(tmp_path / "out")[0]["hand"], state[:, 2:])
    other = Reading(map={"hand": "observation.state[1:3]"})
    assert source_identity(dataset, other) != source_identity(dataset, Reading(map={"hand": "observation.state[2:3]"}))
    with pytest.raises(DataError, match=r"takes observation\.state\[2:9\], and observation\.state has 3 numbers"):
        LeRobotReader(dataset, map=read_map("hand=observation.state[2:9]"))
