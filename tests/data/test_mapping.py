import pickle

import pytest

from mmseq.data.mapping import Column, describe, fill, left_out, read_map, taken
from mmseq.errors import ConfigError, DataError

COLUMNS = {
    "observation.state": Column("vector", "float32 (6,)"),
    "observation.ft": Column("vector", "float32 (6,)"),
    "actions": Column("vector", "float32 (7,)"),
    "action.base": Column("vector", "float32 (2,)"),
    "rgb": Column("picture", "64 x 64"),
    "observation.images.top": Column("picture", "64 x 64"),
    "depth": Column("depth", "16 bit"),
    "instruction": Column("text", "text"),
    "done": Column("flag", "bool"),
    "blob": Column("other", "float32 (3, 3)"),
}
FOUND = {"proprio": ("observation.state",), "image.top": ("observation.images.top",)}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, {}),
        ("", {}),
        ("action=actions", {"action": ("actions",)}),
        (" action = actions , proprio=a + b", {"action": ("actions",), "proprio": ("a", "b")}),
        ("image.front=rgb,image.top=", {"image.front": ("rgb",), "image.top": ()}),
        ({"image": {"front": "rgb"}, "force": ["f+t", "g"]}, {"image.front": ("rgb",), "force": ("f+t", "g")}),
        ("motion=actions", {"motion": ("actions",)}),  # a vector of the table that no reader takes by itself
        ({"image.front": "rgb", "action": None}, {"image.front": ("rgb",), "action": ()}),
    ],
)
def test_a_map_is_read_in_all_its_forms(given, expected):
    assert read_map(given) == expected


def test_a_map_is_read_from_a_file(tmp_path):
    (tmp_path / "map.yaml").write_text("action: actions\nimage: {front: rgb}\n")
    assert read_map(str(tmp_path / "map.yaml")) == {"action": ("actions",), "image.front": ("rgb",)}
    with pytest.raises(ConfigError, match=r"cannot read the map 'actions'.*STREAM=COLUMN"):
        read_map("actions")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    with pytest.raises(ConfigError, match="the map holds"):
        read_map(str(tmp_path / "list.yaml"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("action=a,b", "'b' names no column"),
        ("action=a,action=b", "'action' twice. Join its columns: action=COLUMN"),
        ("image=rgb", "name the camera"),
        ("image.a/b=rgb", "name the camera"),
        ("progress=a", "fills 'progress', which no column can"),
        ("Force=a", "'Force'"),
        ("text=a+b", "only vectors can be joined"),
        ("image.front=a+b", "only vectors can be joined"),
        ({"action": 3}, "gives action 3"),
        ({"action": [1]}, "gives action"),
    ],
)
def test_what_is_wrong_in_a_map_is_named(given, message):
    with pytest.raises(ConfigError, match="(?i)" + message):
        read_map(given)


def test_what_the_owner_says_is_laid_over_what_was_found():
    given = read_map("action=actions+action.base,force=observation.ft,image.front=rgb")
    assert fill(FOUND, given, COLUMNS, "here") == {
        "proprio": ("observation.state",),
        "image.top": ("observation.images.top",),
        "action": ("actions", "action.base"),
        "force": ("observation.ft",),
        "image.front": ("rgb",),
    }
    assert fill(FOUND, {}, COLUMNS, "here") == FOUND


def test_a_camera_moves_a_vector_is_shared_and_nothing_leaves_out():
    moved = fill(FOUND, read_map("image.head=observation.images.top"), COLUMNS, "here")
    assert moved == {"proprio": ("observation.state",), "image.head": ("observation.images.top",)}
    shared = fill(FOUND, read_map("action=observation.state"), COLUMNS, "here")
    assert shared["proprio"] == shared["action"] == ("observation.state",)
    assert fill(FOUND, read_map("image.top="), COLUMNS, "here") == {"proprio": ("observation.state",)}
    assert fill(FOUND, read_map("grip=done"), COLUMNS, "here")["grip"] == ("done",)  # one number is a vector too
    assert fill(FOUND, read_map("motion=actions+done"), COLUMNS, "here")["motion"] == ("actions", "done")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("action=action", "here: the map names the column 'action': did you mean 'actions'"),
        ("image.depth=depth", "fills image.depth from 'depth', which is 16 bit. Name a column that holds pictures"),
        ("action=rgb", "a column that holds numbers"),
        ("text=actions", "a column that holds a text"),
        ("success=actions", "a column that holds a truth value"),
        ("force=blob", r"which is float32 \(3, 3\)"),
        ("motion=rgb", "fills motion from 'rgb', which is 64 x 64. Name a column that holds numbers"),
        ("force=", "leaves out 'force', which nothing fills. Name its column, force=COLUMN, or leave out one of prop"),
        ("image.tpo=", "leaves out 'image.tpo', which nothing fills"),
    ],
)
def test_a_column_that_does_not_fit_is_named(given, message):
    with pytest.raises(DataError, match=message):
        fill(FOUND, read_map(given), COLUMNS, "here")


def test_everything_unused_is_named_with_the_entry_that_uses_it():
    unused = left_out(COLUMNS, FOUND)
    assert unused == {
        "observation.ft": "ft=observation.ft",
        "actions": "action=actions",
        "action.base": "action=action.base",
        "rgb": "image.rgb=rgb",
        "depth": "",
        "instruction": "text=instruction",
        "done": "",
        "blob": "",
    }
    for entry in filter(None, unused.values()):
        fill(FOUND, read_map(entry), COLUMNS, "here")
    notes = describe(COLUMNS, unused)
    assert notes[0] == "left out, cameras: rgb (64 x 64); to use: --map image.rgb=rgb"
    assert notes[-1] == "left out, others: blob (float32 (3, 3))"
    assert [n for n in notes if "depth cameras: depth (16 bit)" in n]


def test_advice_joins_to_actions_and_takes_no_name_twice():
    columns = {"action.base": Column("vector"), "b.force": Column("vector"), "x.plan": Column("text")}
    columns |= {"other.top": Column("picture"), "next.success": Column("flag"), "obs.action_pose": Column("vector")}
    streams = FOUND | {"action": ("action",), "force": ("a.force",)}
    assert left_out(columns, streams) == {
        "action.base": "action=action+action.base",
        "b.force": "force_2=b.force",
        "x.plan": "plan=x.plan",
        "other.top": "image.other_top=other.top",
        "next.success": "success=next.success",
        "obs.action_pose": "action=action+obs.action_pose",
    }
    assert left_out({"qpos": Column("vector")}, {})["qpos"] == "proprio=qpos"
    assert left_out({"qpos": Column("vector")}, FOUND)["qpos"] == "qpos=qpos"


def test_a_part_of_a_vector_is_taken():
    given = read_map(
        "hand=observation.state[2:5],proprio=observation.state[:2]+observation.ft[4:],force=observation.ft"
    )
    streams = fill(FOUND, given, COLUMNS, "here")
    hand = streams["hand"][0]
    assert (hand, hand.start, hand.stop, hand.said) == ("observation.state", 2, 5, "observation.state[2:5]")
    assert [n.said for n in streams["proprio"]] == ["observation.state[:2]", "observation.ft[4:]"]
    assert [taken(n, 6) for n in (hand, *streams["proprio"])] == [slice(2, 5), slice(0, 2), slice(4, 6)]
    assert taken("observation.state", 6) == slice(0, 6)
    assert "observation.state" not in left_out(COLUMNS, streams)
    with pytest.raises(DataError, match=r"takes observation\.state\[2:5\], and observation\.state has 4 numbers"):
        taken(hand, 4)
    assert taken(pickle.loads(pickle.dumps(hand)), 6) == slice(2, 5)
    named = COLUMNS | {"odd[0:2]": Column("vector")}
    assert fill(FOUND, read_map("hand=odd[0:2]"), named, "here")["hand"] == ("odd[0:2]",)  # it is called that


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("hand=observation.stat[0:2]", "names the column 'observation.stat': did you mean 'observation.state'"),
        ("hand=observation.state[3:3]", r"takes nothing. Write observation.state\[0:3\] for the first three"),
        ("image.front=rgb[0:2]", "Take a part of a vector, for a vector"),
        ("hand=instruction[0:2]", "Take a part of a vector, for a vector"),
        ("hand=observation.state[0]", "names the column"),
    ],
)
def test_a_part_that_cannot_be_taken_is_named(given, message):
    with pytest.raises(DataError, match=message):
        fill(FOUND, read_map(given), COLUMNS, "here")
