"""LeRobot datasets that are odd: what the data hold is read, what is not used is named, what is bad costs itself."""

import io
import json
import pickle
import shutil
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import ExifTags, Image, ImageOps

from mmseq.data.importing import EpisodeShardReader, import_episodes, open_episodes
from mmseq.data.lerobot import LeRobotReader
from mmseq.data.lerobot_video import is_depth, place
from mmseq.data.mapping import read_map
from mmseq.episode import Episode, TextSpan
from mmseq.errors import DataError, EpisodeError, MMSeqError
from mmseq.reading import Reading
from support.lerobot_sets import TASKS, Made, encode, picture, shown

FRONT = "observation.images.front"
LENGTHS = (5, 3, 6)
STARTS = np.cumsum([0, *LENGTHS])


def content(**changes) -> Made:
    """Three episodes of one camera and three axes."""
    rng = np.random.default_rng(0)
    vectors = {
        name: (list("xyz"), [rng.normal(size=(n, 3)).astype(np.float32) for n in LENGTHS])
        for name in ("observation.state", "action")
    }
    fields = {
        "seed": 0,
        "fps": 10,
        "episodes": [np.arange(n) + STARTS[k] for k, n in enumerate(LENGTHS)],
        "tasks": [["open the drawer"] * n for n in LENGTHS],
        "vectors": vectors,
        "cameras": {FRONT: "libx264"},
        "size": (32, 48),
        "rows_a_file": 1000,
        "episodes_a_video": 1000,
        "key_frames": 5,
    }
    return Made(**(fields | changes))


@pytest.fixture(params=["v2", "v3"])
def version(request):
    return request.param


def edit_info(path, change):
    file = path / "meta/info.json"
    info = json.loads(file.read_text())
    change(info)
    file.write_text(json.dumps(info))


def edit(path, change, pattern="data/*/*.parquet"):
    """Replace the table of each file by change(table, number of the file)."""
    for number, file in enumerate(sorted(path.glob(pattern))):
        pq.write_table(change(pq.read_table(file), number), file)


def put(table, name, values):
    at = table.column_names.index(name) if name in table.column_names else None
    return table.append_column(name, values) if at is None else table.set_column(at, name, values)


def numbers(episode, camera="front"):
    return [shown(frame) for frame in episode[f"image.{camera}"]]


# ---------------------------------------------------------------------- the frame of a row


def test_the_nearest_frame_is_that_of_the_row():
    times = np.arange(20) / 10
    assert place(times, 0.5, None, 4, 10, False).tolist() == [5, 6, 7, 8]
    assert place(times, 0.548, None, 4, 10, False).tolist() == [5, 6, 7, 8]  # 0.48 of a frame off
    assert place(times, 0.552, None, 4, 10, False).tolist() == [6, 7, 8, 9]
    assert place(times / 2, 0.0, None, 5, 10, False).tolist() == [0, 2, 4, 6, 8]  # a video of twice the rate
    assert place(np.array([0.0]), 0.0, None, 1, 10, False).tolist() == [0]
    late = np.array([0, 0.14, 0.24, 0.34])  # the nearest one, not the first that is near enough
    assert place(np.sort([*late, 0.052]), 0.0, None, 4, 10, False).tolist() == [0, 2, 3, 4]


def test_where_clocks_differ_row_k_is_frame_k_of_the_part():
    assert place(np.arange(4) / 15, 0.0, None, 4, 10, False).tolist() == [0, 1, 2, 3]  # as many as rows
    uneven = np.array([0, 0.03, 0.05, 0.3, 0.31, 0.32, 0.6])
    assert place(uneven, 0.0, None, 7, 10, False).tolist() == list(range(7))
    assert place(uneven, 0.3, None, 3, 10, False).tolist() == [3, 4, 5]
    assert place(uneven, 0.0, 0.3, 3, 10, False).tolist() == [0, 1, 2]
    with pytest.raises(DataError, match=r"^3 frames for 4 steps"):
        place(uneven, 0.0, 0.3, 4, 10, False)
    with pytest.raises(DataError, match=r"^4 frames for 5 steps"):
        place(uneven, 0.3, None, 5, 10, False)


def test_a_part_does_not_reach_into_the_next_unless_they_are_shared():
    times = np.arange(20) / 10
    with pytest.raises(DataError, match=r"^4 frames for 5 steps"):
        place(times, 0.5, 0.9, 5, 10, False)
    assert place(times, 0.5, 0.9, 5, 10, True).tolist() == [5, 6, 7, 8, 9]
    assert place(times, 0.5, 0.9, 4, 10, False).tolist() == [5, 6, 7, 8]


def write_video(path, frames, times_s):
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1000, options={"qp": "10", "bf": "0"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for image, time in zip(frames, times_s):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = round(1000 * time), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize(
    "times",
    [
        lambda k: k / 10 + 0.2,  # begins late
        lambda k: k / 9.5,  # another rate
        lambda k: k / 10 + 0.06 * (k % 2),  # a jitter of more than half a frame
    ],
)
def test_frames_are_those_of_rows_whatever_the_clock_of_the_video(tmp_path, times):
    made = content()
    path = made.write(tmp_path / "set", "v2")
    for k in range(3):
        file = next((path / "videos").rglob(f"episode_{k:06d}.mp4"))
        write_video(file, made.frames(k, FRONT), times(np.arange(LENGTHS[k])))
    assert [numbers(e) for e in LeRobotReader(path)] == [e.tolist() for e in made.episodes]


def test_one_file_of_all_episodes_that_begins_late(tmp_path):
    made = content()
    path = made.write(tmp_path / "set", "v3")
    frames = np.concatenate([made.frames(k, FRONT) for k in range(3)])
    write_video(next(path.rglob("*.mp4")), frames, np.arange(len(frames)) / 10 + 0.3)
    assert [numbers(e) for e in LeRobotReader(path)] == [e.tolist() for e in made.episodes]


def test_beginnings_that_are_rounded_and_episodes_that_overlap(tmp_path):
    made = content()
    path = made.write(tmp_path / "set", "v3")
    change = lambda table, _: put(table, f"videos/{FRONT}/from_timestamp", pa.array([0.0, 0.46, 0.81]))
    edit(path, change, "meta/episodes/*/*.parquet")
    assert [numbers(e) for e in LeRobotReader(path)] == [e.tolist() for e in made.episodes]
    change = lambda table, _: put(table, f"videos/{FRONT}/from_timestamp", pa.array([0.0, 0.2, 0.8]))
    edit(path, change, "meta/episodes/*/*.parquet")
    assert numbers(LeRobotReader(path)[0]) == [0, 1, 2, 3, 4]
    assert numbers(LeRobotReader(path)[1]) == [2, 3, 4]


def test_an_episode_that_metadata_end_early_is_short_of_frames(tmp_path):
    made = content()
    path = made.write(tmp_path / "set", "v3")
    for key, values in (("from", [0.0, 0.4, 0.8]), ("to", [0.4, 0.8, 1.4])):
        change = lambda t, _, key=key, values=values: put(t, f"videos/{FRONT}/{key}_timestamp", pa.array(values))
        edit(path, change, "meta/episodes/*/*.parquet")
    with pytest.raises(DataError, match=rf"episode 0, {FRONT}: .*mp4 holds 4 frames for 5 steps.*--skip-bad"):
        LeRobotReader(path).check(0)
    LeRobotReader(path).check(1)


@pytest.mark.parametrize(
    ("version", "video_fps", "expected"),
    [("v2", 20, 20), ("v3", 20, 20), ("v2", 10, 10), ("v3", 10, 10), ("v2", 15, 10)],
)
def test_a_wrong_rate_is_settled_by_timestamps_and_videos_together(tmp_path, version, video_fps, expected):
    made = content()
    path = made.write(tmp_path / "set", version)
    stamp = lambda table, _: put(
        table, "timestamp", pa.array(np.asarray(table["frame_index"]).astype(np.float32) / np.float32(20))
    )
    edit(path, stamp)
    made.fps = video_fps
    frames = [made.frames(k, FRONT) for k in range(3)]
    for file, images in zip(sorted(path.rglob("*.mp4")), frames if version == "v2" else [np.concatenate(frames)]):
        file.write_bytes(encode(images, video_fps, "libx264", 5))
    reader = LeRobotReader(path)
    assert reader.fps == reader.rate_hz == expected
    assert [n for n in reader.notes if "says 10 steps per second, the timestamps 20" in n]
    assert numbers(reader[0]) == [0, 1, 2, 3, 4]


def test_a_rate_beside_a_whole_number_stays_where_it_is(tmp_path):
    made = content()
    path = made.write(tmp_path / "set", "v2")
    rate = np.float32(29.5)  # 30 would drift by a step in a minute
    stamp = lambda t, _: put(t, "timestamp", pa.array(np.asarray(t["frame_index"]).astype(np.float32) / rate))
    edit(path, stamp)
    for k, file in enumerate(sorted(path.rglob("*.mp4"))):
        file.write_bytes(encode(made.frames(k, FRONT), Fraction(59, 2), "libx264", 5))
    assert LeRobotReader(path).fps == pytest.approx(29.5, abs=0.01)


def test_rows_of_an_episode_may_lie_in_several_files_and_not_together(tmp_path):
    made = content(rows_a_file=4)
    path = made.write(tmp_path / "set", "v3")
    reader = LeRobotReader(path)
    assert len(reader.layout.records[0].parts) == 2
    tables = [pq.read_table(f) for f in sorted(path.glob("data/*/*.parquet"))]
    whole = pa.concat_tables(tables)
    order = np.argsort(np.repeat([1, 0, 2], LENGTHS), kind="stable")  # another order of the episodes
    pq.write_table(whole.take(order), path / "data/chunk-000/file-000.parquet")
    for file in sorted(path.glob("data/*/*.parquet"))[1:]:
        file.unlink()
    for k, episode in enumerate(LeRobotReader(path)):
        np.testing.assert_array_equal(episode["action"], made.vectors["action"][1][k])
        assert numbers(episode) == made.episodes[k].tolist()


@pytest.mark.parametrize("codec", ["libx264", "png"])  # videos, and pictures that are shuffled with their rows
@pytest.mark.parametrize("rows_a_file", [1000, 4])  # in one file, and across the files of an episode
def test_rows_are_put_into_the_order_of_their_frames(tmp_path, codec, rows_a_file):
    made = content(cameras={FRONT: codec}, tasks=[[TASKS[0]] + [TASKS[1]] * (n - 1) for n in LENGTHS])
    path = made.write(tmp_path / "set", "v3")
    whole = pa.concat_tables([pq.read_table(f) for f in sorted(path.glob("data/*/*.parquet"))])
    rows = whole.take([3, 0, 4, 1, 2, 7, 5, 6, *range(8, 14)])
    for k in range(0, len(whole), rows_a_file):
        file = path / f"data/chunk-000/file-{k // rows_a_file:03d}.parquet"
        pq.write_table(rows.slice(k, rows_a_file), file, row_group_size=2)
    reader = LeRobotReader(path)
    for k, episode in enumerate(reader):
        assert numbers(episode) == made.episodes[k].tolist()
        assert [shown(f) for f in reader.frames(k, "front", [1, 2])] == made.episodes[k][1:3].tolist()
        np.testing.assert_array_equal(episode["action"], made.vectors["action"][1][k])
        np.testing.assert_array_equal(episode["proprio"], made.vectors["observation.state"][1][k])
        assert [(s.start, s.texts) for s in episode.spans] == [(0, (TASKS[0],)), (1, (TASKS[1],))]
    assert [n for n in reader.notes if "frame_index" in n] == [
        "rows of episodes 0, 1 are not in the order of their frame_index: put into that order"
    ]
    assert not any("timestamps" in n for n in reader.notes)


def test_what_editors_hide_beside_the_data_is_not_data(tmp_path, version):
    path = content().write(tmp_path / "set", version)
    file = next(path.glob("data/*/*.parquet"))
    (path / "data/.ipynb_checkpoints").mkdir()
    shutil.copy(file, path / "data/.ipynb_checkpoints" / file.name)
    (file.parent / f"._{file.name}").write_bytes(b"\0\5\x16\7")
    reader = LeRobotReader(path)
    assert ([len(e) for e in reader], reader.notes) == ([5, 3, 6], [])


# ---------------------------------------------------------------------- texts of steps


def test_several_tasks_in_an_episode_are_spans(tmp_path, version):
    tasks = [["open the drawer"] * 2 + ["close it"] * 3, ["push"] * 3, ["push"] * 6]
    path = content(tasks=tasks).write(tmp_path / "set", version)
    (path / "meta/mmseq.json").write_text(
        json.dumps({"tasks": {"close it": {"paraphrases": ["shut it"], "plan": "reach, push"}}})
    )
    import_episodes(path, tmp_path / "out")
    for reader in (LeRobotReader(path), EpisodeShardReader(tmp_path / "out")):
        first, second, _ = reader
        assert (first.texts, first.plans) == ([], [])
        assert first.spans == [
            TextSpan("text", 0, 2, ("open the drawer",)),
            TextSpan("text", 2, 5, ("close it", "shut it")),
            TextSpan("plan", 2, 5, ("reach, push",)),
        ]
        assert (second.texts, second.spans) == (["push"], [])
    half = LeRobotReader(path, rate_hz=5)[0]  # steps at frames 0 and 2
    assert [(s.start, s.stop, s.texts[0]) for s in half.spans[:2]] == [(0, 1, "open the drawer"), (1, 2, "close it")]
    assert EpisodeShardReader(tmp_path / "out").metadata[0]["spans"] == ["plan", "text"]


def test_subtasks_are_plans(tmp_path, version):
    path = content().write(tmp_path / "set", version)
    index = np.concatenate([[0, 0, 1, 1, 1], [1, 1, 1], [0, 1, 1, 0, 0, 0]])
    at = iter(np.split(index, STARTS[1:-1]) if version == "v2" else [index])
    edit(path, lambda table, _: put(table, "subtask_index", pa.array(next(at))))
    texts = [{"subtask_index": 1, "subtask": "pull"}, {"subtask_index": 0, "subtask": "reach"}]
    if version == "v2":
        (path / "meta/subtasks.jsonl").write_text("\n".join(map(json.dumps, texts)))
    else:
        pq.write_table(pa.Table.from_pylist(texts), path / "meta/subtasks.parquet")
    first, second, third = LeRobotReader(path)
    assert first.spans == [TextSpan("plan", 0, 2, ("reach",)), TextSpan("plan", 2, 5, ("pull",))]
    assert (second.plans, second.spans) == (["pull"], [])
    assert [(s.start, s.stop, s.texts) for s in third.spans] == [
        (0, 1, ("reach",)),
        (1, 3, ("pull",)),
        (3, 6, ("reach",)),
    ]
    assert first.texts == ["open the drawer"]


def test_annotations_hold_from_their_time_on(tmp_path):
    path = content().write(tmp_path / "set", "v3")
    said = lambda style, text, time: {"style": style, "content": text, "timestamp": time, "role": "assistant"}
    entries = [said("subtask", "pull", 0.2), said("memory", "nothing", 0.0), said("subtask", "reach", 0.1)]
    edit(path, lambda table, _: put(table, "language_persistent", pa.array([entries] * len(table))))
    assert LeRobotReader(path)[0].spans == [TextSpan("plan", 1, 2, ("reach",)), TextSpan("plan", 2, 5, ("pull",))]


def test_a_task_without_a_text_is_named(tmp_path, version):
    path = content().write(tmp_path / "set", version)
    edit(path, lambda t, number: put(t, "task_index", pa.array([7 if version == "v2" and number == 1 else 0] * len(t))))
    reader = LeRobotReader(path)
    assert reader[0].texts == ["open the drawer"]
    if version == "v2":
        with pytest.raises(EpisodeError, match="episode 1: task_index is 7, for which meta/ has no text"):
            reader[1]


def test_texts_of_another_column_are_mapped(tmp_path, version):
    path = content().write(tmp_path / "set", version)
    say = lambda t, n: put(put(t, "words", pa.array(["lift"] * len(t))), "annotation.task", pa.array([0] * len(t)))
    edit(path, say)
    reader = LeRobotReader(path)
    assert reader[0].texts == ["open the drawer"]
    assert reader.left_out == {"words": "text=words", "annotation.task": "text=annotation.task"}
    assert LeRobotReader(path, map=read_map("text=words"))[1].texts == ["lift"]
    assert LeRobotReader(path, map=read_map("plan=annotation.task"))[1].plans == ["open the drawer"]


# ---------------------------------------------------------------------- what is not used is named, and mapped


def test_names_of_others_are_mapped(tmp_path, version):
    made = content(cameras={"image": "libx264", "wrist_image": "png"})
    made.vectors = {
        "joints": (None, made.vectors["action"][1]),
        "grip": (None, [v[:, :1] for v in made.vectors["action"][1]]),
        "actions": (["a", "b", "joints_0"], made.vectors["action"][1]),
        "ft": (None, made.vectors["observation.state"][1]),
    }
    path = made.write(tmp_path / "set", version)
    with pytest.raises(
        DataError, match=r"neither cameras.*image.wrist_image=wrist_image.*proprio=joints.*action=actions"
    ):
        LeRobotReader(path)
    given = read_map("proprio=joints+grip,action=actions+grip,image.front=image,image.wrist=wrist_image,force=ft")
    swapped = Episode.from_lerobot(path, 1, Reading(map=given, swap_colours=["front"]))
    np.testing.assert_array_equal(swapped["image.front"], LeRobotReader(path, map=given)[1]["image.front"][..., ::-1])
    import_episodes(path, tmp_path / "out", Reading(map=given))
    shards = EpisodeShardReader(tmp_path / "out")
    robot = shards.embodiment()
    assert robot.proprio.names == ("joints_0", "joints_1", "joints_2", "grip")
    assert robot.action.names == ("a", "b", "joints_0", "grip")
    assert (list(robot.streams), robot.streams["force"].names) == (["force"], ("ft_0", "ft_1", "ft_2"))
    np.testing.assert_array_equal(shards[1]["proprio"][:, 3:], made.vectors["grip"][1][1])
    np.testing.assert_array_equal(shards[1]["force"], made.vectors["ft"][1][1])
    assert numbers(shards[2], "wrist") == numbers(shards[2], "front") == made.episodes[2].tolist()
    assert (shards.manifest["left_out"], shards.manifest["map"]["force"]) == ([], ["ft"])


def test_everything_unused_is_named_in_the_console_and_the_manifest(tmp_path, version):
    made = content()
    made.vectors["observation.effort"] = (None, made.vectors["action"][1])
    path = made.write(tmp_path / "set", version)
    edit(path, lambda table, _: put(table, "next.done", pa.array([False] * len(table))))
    edit_info(path, lambda info: info["features"].update({"gone": {"dtype": "float32", "shape": [3]}}))
    folder = path / "videos" / ("chunk-000/observation.images.old" if version == "v2" else "observation.images.old")
    folder.mkdir()
    said = []
    import_episodes(path, tmp_path / "out", say=said.append)
    manifest = EpisodeShardReader(tmp_path / "out").manifest
    assert manifest["left_out"] == ["gone", "next.done", "observation.effort", "observation.images.old"]
    assert manifest["notes"] == said
    text = "; ".join(said)
    assert "observation.effort (float32 (3,)); to use: --map effort=observation.effort" in text
    assert "flags: next.done (bool)" in text
    assert "gone (float32 (3,), in no file of the data)" in text
    assert "observation.images.old (videos that meta/info.json does not list)" in text


def test_cameras_whose_names_cannot_be_stored_are_renamed(tmp_path, version):
    made = content(cameras={"observation.images.left cam (1)": "png", "observation.images.left cam/1": "png"})
    made.cameras = {"observation.images.left cam (1)": "png", FRONT: "libx264"}
    reader = LeRobotReader(made.write(tmp_path / "set", version))
    assert sorted(reader.cameras) == ["front", "left_cam_1_"]
    assert reader.notes == ["camera 'observation.images.left cam (1)' is called 'left_cam_1_'"]


# ---------------------------------------------------------------------- one of many


def test_the_order_of_episodes_changes_no_contract(tmp_path, version):
    """One is narrower, one has a larger picture: neither decides by being the first."""
    contracts = []
    for odd_one in (0, 2):
        made = content(cameras={FRONT: "png"})
        path = made.write(tmp_path / f"set{odd_one}", "v2")
        values = pa.array([[0.5, 0.5]] * LENGTHS[odd_one], pa.list_(pa.float32()))
        edit(path, lambda t, n, k=odd_one, v=values: put(t, "action", v) if n == k else t)
        edit_info(path, lambda info: info["features"]["action"].update({"shape": [9]}))
        edit_info(path, lambda info: info["features"][FRONT].update({"shape": [9, 9, 3]}))
        reader = LeRobotReader(path)
        robot = reader.embodiment()
        contracts.append((len(robot.action), robot.action.names, robot.cameras))
        with pytest.raises(EpisodeError, match="action has 2 numbers in a row, others have 3"):
            reader[odd_one]
    assert contracts[0] == contracts[1]
    assert contracts[0][0] == 3


def test_what_one_file_lacks_it_lacks_alone(tmp_path):
    path = content().write(tmp_path / "set", "v2")
    edit(path, lambda t, n: put(t, "next.success", pa.array([False] * (len(t) - 1) + [True])) if n != 1 else t)
    edit(path, lambda t, n: t.drop_columns(["task_index"]) if n == 2 else t)
    reader = LeRobotReader(path)
    assert [e.success for e in reader] == [True, None, True]
    assert [e.texts for e in reader] == [["open the drawer"]] * 3
    edit(path, lambda t, n: t.drop_columns(["action"]) if n == 0 else t)
    with pytest.raises(EpisodeError, match=r"episode 0: .*episode_000000.parquet lacks the column 'action'"):
        LeRobotReader(path)[0]
    assert len(LeRobotReader(path)[1]) == 3


def test_neither_the_first_file_nor_its_types_decide_for_all(tmp_path):
    """A column that is empty in one file, whole numbers in another, lists of another form in a third."""
    made = content(rows_a_file=4)
    made.vectors["force"] = (None, [np.full((n, 1), 2.0, np.float32) for n in LENGTHS])
    path = made.write(tmp_path / "set", "v3")
    fixed = pa.list_(pa.float64(), 3)
    edit(path, lambda t, n: put(t, "action", pa.array(t["action"].to_pylist(), fixed)) if n == 1 else t)
    edit(path, lambda t, n: put(t, "force", pa.array([2] * len(t))) if n == 0 else t)
    edit(path, lambda t, n: put(t, "note", pa.nulls(len(t)) if n == 0 else pa.array(["a"] * len(t))))
    edit(path, lambda t, n: put(t, "timestamp", pa.array(["soon"] * len(t))))
    edit(path, lambda t, n: put(t, "episode_index", t["episode_index"].cast(pa.string())) if n == 2 else t)
    reader = LeRobotReader(path, map=read_map("force=force"))
    for k, episode in enumerate(reader):
        np.testing.assert_array_equal(episode["action"], made.vectors["action"][1][k])
        assert (episode["force"] == 2).all()
    assert reader.left_out == {"note": "text=note"}
    edit(path, lambda t, n: put(t, "action", pa.array(["x"] * len(t))) if n == 0 else t)
    with pytest.raises(EpisodeError, match=r"episode 0: (its files disagree on|action holds no numbers)"):
        LeRobotReader(path)[0]
    assert len(LeRobotReader(path)[2]) == 6


def test_a_reader_goes_to_a_worker_with_nothing_open(tmp_path, version):
    made = content()
    reader = LeRobotReader(made.write(tmp_path / "set", version))
    assert numbers(reader[1]) == made.episodes[1].tolist()
    copy = pickle.loads(pickle.dumps(reader))
    assert numbers(copy[1]) == numbers(reader[1])


def test_a_video_of_one_deep_channel_is_depth(tmp_path):
    import av

    for form, deep in (("gray16le", True), ("yuv420p", False), ("gray", False)):
        with av.open(str(tmp_path / f"{form}.mkv"), "w") as container:
            stream = container.add_stream("ffv1", rate=10)
            stream.height, stream.width, stream.pix_fmt = 16, 16, form
            frame = av.VideoFrame.from_ndarray(np.full((16, 16), 900, np.uint16), format="gray16le").reformat(
                format=form
            )
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        assert is_depth(tmp_path / f"{form}.mkv") is deep
    assert not is_depth(tmp_path / "absent.mkv")


# ---------------------------------------------------------------------- forms of a value


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array([False, True, False]), True),
        (pa.array([False, False, False]), False),
        (pa.array([None, None, None], pa.bool_()), None),
        (pa.array([None, True, None]), True),
        (pa.array([0.0, 1.0, 0.0]), True),
        (pa.array([float("nan")] * 3), None),
        (pa.array([[False], [True], [False]]), True),
        (pa.array([-1, -1, -1]), None),
        (pa.array(["", "Success", ""]), True),
        (pa.array(["failure"] * 3), False),
    ],
)
@pytest.mark.parametrize("name", ["next.success", "success", "is_episode_successful"])
def test_success_in_its_forms(tmp_path, values, expected, name):
    path = content().write(tmp_path / "set", "v2")
    edit(path, lambda t, n: put(t, name, values) if n == 1 else t)
    reader = LeRobotReader(path)
    assert [e.success for e in reader] == [None, expected, None]
    assert name not in reader.left_out


@pytest.mark.parametrize(
    ("value", "expected"), [(True, True), (0, False), (None, None), ("failed", False), ([True], True)]
)
def test_success_of_metadata(tmp_path, value, expected):
    path = content().write(tmp_path / "set", "v2")
    file = path / "meta/episodes.jsonl"
    rows = [json.loads(line) | {"success": value} for line in file.read_text().splitlines()]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert LeRobotReader(path)[0].success is expected


@pytest.mark.parametrize(
    "flag",
    [
        {"info": {"is_depth_map": True}},
        {"info": {"video.is_depth_map": True}},
        {"video_info": {"video.is_depth_map": "true"}},
    ],
)
def test_a_camera_that_says_it_is_depth_is_left_out_by_name(tmp_path, version, flag):
    path = content(cameras={FRONT: "libx264", "observation.images.depth": "libx264"}).write(tmp_path / "set", version)
    edit_info(path, lambda info: info["features"]["observation.images.depth"].update(flag))
    reader = LeRobotReader(path)
    assert reader.cameras == ["front"]
    assert reader.notes == ["left out, depth cameras: observation.images.depth (video (32, 48, 3))"]
    edit_info(
        path, lambda i: i["features"]["observation.images.depth"].update(info={"is_depth_map": False}, video_info=None)
    )
    assert LeRobotReader(path).cameras == ["front", "depth"]


def test_pictures_of_sixteen_bits_are_depth_whatever_is_said(tmp_path, version):
    made = content(cameras={FRONT: "png", "observation.images.depth": "png"})
    path = made.write(tmp_path / "set", version)
    file = tmp_path / "deep.png"
    Image.fromarray(np.full((32, 48), 1400, np.uint16)).save(file)
    deep = [{"bytes": file.read_bytes(), "path": None}]
    edit(path, lambda table, _: put(table, "observation.images.depth", pa.array(deep * len(table))))
    reader = LeRobotReader(path)
    assert (reader.cameras, list(reader.left_out)) == (["front"], ["observation.images.depth"])


@pytest.mark.parametrize("kind", ["png", "jpeg"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_pictures_are_turned_as_lerobot_turns_them(tmp_path, kind, orientation):
    path = content(cameras={FRONT: "png"}).write(tmp_path / "set", "v3")
    expected = []

    def change(table, _):
        stored = []
        for row in table[FRONT].to_pylist():
            image, exif, data = Image.open(io.BytesIO(row["bytes"])), Image.Exif(), io.BytesIO()
            exif[ExifTags.Base.Orientation] = orientation
            image.save(data, kind, exif=exif)
            stored.append({"bytes": data.getvalue(), "path": None})
            # what Hugging Face's datasets, by which LeRobot reads rows, makes of it
            expected.append(np.asarray(ImageOps.exif_transpose(Image.open(data)).convert("RGB")))
        return put(table, FRONT, pa.array(stored))

    edit(path, change)
    edit_info(path, lambda info: info["features"][FRONT].pop("shape", None))
    reader = LeRobotReader(path)
    np.testing.assert_array_equal(np.concatenate([e["image.front"] for e in reader]), expected)
    (camera,) = reader.embodiment().cameras
    assert (camera.height, camera.width) == ((48, 32) if orientation > 4 else (32, 48))


@pytest.mark.parametrize("form", ["bytes", "path", "struct of a path"])
def test_pictures_of_rows_in_their_forms(tmp_path, version, form):
    made = content(cameras={FRONT: "png"})
    path = made.write(tmp_path / "set", version)

    def change(table, _):
        stored = [row["bytes"] for row in table[FRONT].to_pylist()]
        names = [f"images/{i}.png" for i in table["index"].to_pylist()]
        for name, data in zip(names, stored):
            (path / "images").mkdir(exist_ok=True)
            (path / name).write_bytes(data)
        values = {"bytes": stored, "path": names, "struct of a path": [{"bytes": None, "path": n} for n in names]}
        return put(table, FRONT, pa.array(values[form]))

    edit(path, change)
    assert [numbers(e) for e in LeRobotReader(path)] == [e.tolist() for e in made.episodes]


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("机器人", "robot_机器人"),
        (["left", "right"], "left_right"),
        ("../../etc", "etc"),
        (None, "unknown"),
        (7, "7"),
        ("a/b:c", "a_b_c"),
        ("x" * 300, "x" * 100),
        ("//", "robot"),
    ],
)
def test_a_robot_type_that_is_no_name_becomes_one(tmp_path, said, name):
    path = content().write(tmp_path / "set", "v3")
    edit_info(path, lambda info: info.update(robot_type=said))
    assert LeRobotReader(path).embodiment().name == name


# ---------------------------------------------------------------------- what is bad costs itself


def spoil_nan(path, k):
    edit(path, lambda t, n: put(t, "action", pa.array([[0.0, np.nan, 0.0]] * len(t))) if n == k else t)


def spoil_video(path, k):
    next(path.rglob(f"episode_{k:06d}.mp4")).unlink()


def spoil_frames(path, k):
    frames = np.stack([picture(i, 32, 48, 0) for i in range(LENGTHS[k] - 1)])
    next(path.rglob(f"episode_{k:06d}.mp4")).write_bytes(encode(frames, 10, "libx264", 5))


def spoil_rows(path, k):
    file = next(path.rglob(f"episode_{k:06d}.parquet"))
    file.write_bytes(file.read_bytes()[:-100])


def spoil_lfs(path, k):
    next(path.rglob(f"episode_{k:06d}.mp4")).write_text("version https://git-lfs.github.com/spec/v1\n")


SPOILERS = {
    spoil_nan: "axis 'y' is nan at step 0",
    spoil_video: "mp4 is missing",
    spoil_frames: r"holds \d frames for \d steps",
    spoil_rows: "it has no footer",
    spoil_lfs: "git lfs pull",
}


@pytest.mark.parametrize(("spoil", "why"), SPOILERS.items())
def test_bad_episodes_are_left_out_within_a_budget(tmp_path, spoil, why):
    path = content().write(tmp_path / "set", "v2")
    good = LeRobotReader(path).embodiment().cameras
    spoil(path, 1)
    with pytest.raises(DataError, match=rf"1 of 3 episodes .* are bad: .*{why}.*--skip-bad 1"):
        import_episodes(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    said = []
    manifest = import_episodes(path, tmp_path / "out", skip_bad=1, say=said.append)
    shards = EpisodeShardReader(tmp_path / "out")
    assert [(e.id, len(e)) for e in shards] == [("set/000000", 5), ("set/000002", 6)]
    assert list(manifest["skipped"]) == ["1"]
    assert [note for note in said if note.startswith("bad, left out: ")]
    assert shards.embodiment().cameras == good
    spoil(path, 0)
    with pytest.raises(DataError, match=rf"2 of 3 .*{why}.* / .*{why}.*--skip-bad 2"):
        import_episodes(path, tmp_path / "out", skip_bad=1, overwrite=True)
    spoil(path, 2)
    with pytest.raises(MMSeqError, match="not one is left|" + why):
        import_episodes(path, tmp_path / "out", skip_bad=9, overwrite=True)
    assert len(EpisodeShardReader(tmp_path / "out")) == 2  # what was there is kept


def test_a_picture_that_does_not_decode_is_found_on_the_way(tmp_path):
    path = content(cameras={FRONT: "png"}).write(tmp_path / "set", "v2")
    broken = [{"bytes": b"\x89PNG nothing", "path": None}]
    edit(path, lambda t, n: put(t, FRONT, pa.array(broken * len(t))) if n == 0 else t)
    said = []
    with pytest.raises(DataError, match=r"1 of 3 .*observation.images.front of row 0 .*--skip-bad 1"):
        import_episodes(path, tmp_path / "out", say=said.append)
    assert [note.partition(":")[0] for note in said if "nobody" not in note] == ["bad, looking for more"]
    import_episodes(path, tmp_path / "out", skip_bad=1)
    assert [e.id for e in EpisodeShardReader(tmp_path / "out")] == ["set/000001", "set/000002"]
    with pytest.raises(DataError, match="skip_bad is -1"):
        import_episodes(path, tmp_path / "no", skip_bad=-1)


def test_an_empty_episode_is_left_out_by_itself(tmp_path, version):
    made = content(cameras={})
    made.episodes[1], made.tasks[1] = made.episodes[1][:0], []
    made.vectors = {n: (names, [v[0], v[1][:0], v[2]]) for n, (names, v) in made.vectors.items()}
    path = made.write(tmp_path / "set", version)
    said = []
    import_episodes(path, tmp_path / "out", say=said.append)
    assert [e.id for e in EpisodeShardReader(tmp_path / "out")] == ["set/000000", "set/000002"]
    assert [note for note in said if "nobody" not in note] == ["episode 1: empty and left out"]


def test_a_null_index_is_the_problem_of_its_episode(tmp_path):
    path = content().write(tmp_path / "set", "v3")
    change = lambda t, _: put(t, f"videos/{FRONT}/file_index", pa.array([0, None, 0]))
    edit(path, change, "meta/episodes/*/*.parquet")
    with pytest.raises(DataError, match=rf"1 of 3.*episode 1: videos/{FRONT}/file_index is None"):
        import_episodes(path, tmp_path / "out")
    import_episodes(path, tmp_path / "out", skip_bad=1)


def test_an_episode_that_is_not_listed_or_listed_twice(tmp_path):
    path = content().write(tmp_path / "set", "v3")
    edit(path, lambda t, _: t.slice(0, 2), "meta/episodes/*/*.parquet")
    with pytest.raises(DataError, match=r"1 of 3.*episode 2: meta/episodes does not list it.*finalize\(\)"):
        import_episodes(path, tmp_path / "out")
    again = lambda t, _: pa.concat_tables([t, put(t.slice(0, 1), "length", pa.array([99])), t.slice(1, 1)])
    edit(path, again, "meta/episodes/*/*.parquet")
    with pytest.raises(EpisodeError, match="episode 0: meta/episodes lists it twice, differently"):
        LeRobotReader(path)[0]
    assert len(LeRobotReader(path)[1]) == 3  # twice the same is once


def test_an_outcome_and_a_length_are_kept_by_shards(tmp_path, version):
    path = content().write(tmp_path / "set", version)
    import_episodes(path, tmp_path / "out")
    assert [e.success for e in EpisodeShardReader(tmp_path / "out")] == [None] * 3
    assert open_episodes(path).layout.version == version
