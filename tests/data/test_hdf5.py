"""HDF5 demonstrations as robomimic, LIBERO, RoboCasa, ALOHA and RDT write them, and as they get broken."""

import json

import numpy as np
import pytest

from mmseq.data.hdf5 import Hdf5Reader
from mmseq.data.hdf5_layout import natural, phrasings
from mmseq.data.importing import EpisodeShardReader, import_episodes, open_episodes
from mmseq.data.mapping import read_map
from mmseq.episode import TextSpan
from mmseq.errors import DataError
from mmseq.reading import Reading

h5py = pytest.importorskip("h5py")
PANDA = {"robots": ["Panda"], "control_freq": 20}


def robomimic(path, demos, attributes=None, **options):
    """A file of demonstrations: {name: {dataset: values}}; a key that begins with `@` is an attribute."""
    with h5py.File(path, "w") as root:
        data = root.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_name": "Lift", "env_kwargs": PANDA | options})
        data.attrs.update(attributes or {})
        for name, content in demos.items():
            fill(data.create_group(name), content)
    return path


def aloha(path, **content):
    path.parent.mkdir(exist_ok=True)
    with h5py.File(path, "w") as root:
        root.attrs["fps"] = 50
        fill(root, {"action": np.zeros((9, 3)), "observations/qpos": np.ones((9, 3))} | content)
    return path


def fill(group, content):
    for name, values in content.items():
        if name.startswith("@"):
            group.attrs[name[1:]] = values
        elif values is not None:
            group[name] = values


def demo(steps=8, axes=7, seed=0, **more):
    rng = np.random.default_rng(seed)
    return {
        "actions": rng.uniform(-1, 1, (steps, axes)),
        "obs/robot0_eef_pos": rng.uniform(-1, 1, (steps, 3)),
        "obs/agentview_image": rng.integers(0, 255, (steps, 16, 16, 3), np.uint8),
    } | more


def said(reader, *words):
    notes = "\n".join(reader.notes)
    return all(word in notes for word in words)


# ---------------------------------------------------------------------- layouts


def test_robomimic(tmp_path, psnr, textured):
    frames = textured(10, size=32)
    demos = {
        f"demo_{k}": {
            "actions": np.full((k, 2), k, np.float64) + np.arange(k)[:, None],
            "obs/agentview_image": frames[:k],
            "obs/robot0_gripper_qpos": np.zeros((k, 1)),
            "obs/robot0_eef_pos": np.ones((k, 3)),
            "next_obs/robot0_eef_pos": np.ones((k, 3)),
            "rewards": (np.arange(k) == (k - 1 if k == 9 else k)).astype(float),
        }
        for k in (10, 9)
    }
    import_episodes(robomimic(tmp_path / "low.hdf5", demos), tmp_path / "out")
    shards = EpisodeShardReader(tmp_path / "out")
    assert [(e.id, len(e), e.success, e.rate_hz) for e in shards] == [
        ("low/demo_9", 9, True, 20),
        ("low/demo_10", 10, False, 20),
    ]
    assert shards[0]["proprio"][0].tolist() == [1, 1, 1, 0]
    assert shards.embodiment().name == "Panda"
    assert shards.embodiment().proprio.names[-1] == "robot0_gripper_qpos_0"
    assert psnr(shards[1]["image.agentview"], frames) > 40


def test_aloha(tmp_path, textured):
    for k in range(2):
        with h5py.File(tmp_path / f"episode_{k}.hdf5", "w") as root:
            root["action"] = np.random.default_rng(k).normal(size=(6, 14))
            root["observations/qpos"] = np.zeros((6, 14))
            root["observations/images/top"] = textured(6, size=32)
    with pytest.raises(DataError, match="Give rate_hz"):
        open_episodes(tmp_path)
    reader = open_episodes(tmp_path, rate_hz=50)
    assert [(e.id, e["image.top"].shape) for e in reader] == [
        ("episode_0", (6, 32, 32, 3)),
        ("episode_1", (6, 32, 32, 3)),
    ]
    assert (reader.embodiment().name, len(reader.embodiment().action)) == ("aloha", 14)


def test_files_that_disagree_are_told_apart(tmp_path):
    robomimic(tmp_path / "a.hdf5", {"demo_0": demo()})
    robomimic(tmp_path / "b.hdf5", {"demo_0": demo()}, robots="Sawyer")
    with pytest.raises(DataError, match=r"mixes robots: Sawyer \(b\.hdf5\), Panda \(a\.hdf5\).*separately"):
        open_episodes(tmp_path)
    robomimic(tmp_path / "b.hdf5", {"demo_0": demo()}, control_freq=10)
    with pytest.raises(DataError, match="mixes rates"):
        open_episodes(tmp_path)
    with pytest.raises(DataError, match=r"runs at 20 Hz, rate_hz says 30.*not resampled"):
        open_episodes(tmp_path / "a.hdf5", rate_hz=30)


def test_a_file_that_cannot_be_read_is_one_bad_episode(tmp_path):
    for k in range(3):
        aloha(tmp_path / f"in/episode_{k}.hdf5")
    (tmp_path / "in/episode_1.hdf5").write_bytes(b"\x89HDF nothing")
    fill(h5py.File(tmp_path / "in/episode_9.hdf5", "w"), {"statistics": np.zeros(3)})
    reader = open_episodes(tmp_path / "in")
    assert len(reader) == 4
    assert len(reader.embodiment().action) == 3
    with pytest.raises(DataError, match=r"2 of 4 .*episode_1\.hdf5 is truncated.*episode_9\.hdf5 is laid out neither"):
        import_episodes(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert import_episodes(tmp_path / "in", tmp_path / "out", skip_bad=2)["samples"] == 2
    with pytest.raises(DataError, match=r"laid out neither as robomimic nor as ALOHA: it holds statistics.*--map"):
        open_episodes(tmp_path / "in/episode_9.hdf5")


@pytest.mark.parametrize("link", [h5py.SoftLink("/data/absent"), h5py.ExternalLink("absent.hdf5", "/data/demo_1")])
def test_a_demonstration_that_is_a_broken_link_is_one_bad_episode(tmp_path, link):
    file = robomimic(tmp_path / "a.hdf5", {f"demo_{k}": demo(seed=k) for k in (0, 1, 3)})
    with h5py.File(file, "a") as root:
        root["data/demo_2"] = link
    assert len(open_episodes(file)) == 4
    with pytest.raises(DataError, match=r"1 of 4 episodes .*data/demo_2 is a link to nothing.*--skip-bad 1"):
        import_episodes(file, tmp_path / "out")
    manifest = import_episodes(file, tmp_path / "out", skip_bad=1)
    assert (manifest["samples"], list(manifest["skipped"])) == (3, ["2"])


def test_a_file_of_another_rate_than_most_is_one_bad_episode(tmp_path):
    for k in range(4):
        aloha(tmp_path / f"in/episode_{k}.hdf5", **{"@fps": 30 if k == 1 else 50})
    assert open_episodes(tmp_path / "in").embodiment().rate_hz == 50
    with pytest.raises(DataError, match=r"1 of 4 episodes .*episode_1\.hdf5 runs at 30 Hz, most of .* at 50.*bad 1"):
        import_episodes(tmp_path / "in", tmp_path / "out")
    assert import_episodes(tmp_path / "in", tmp_path / "out", skip_bad=1)["samples"] == 3
    with h5py.File(tmp_path / "in/episode_2.hdf5", "a") as root:
        root.attrs["fps"] = 30
    with pytest.raises(DataError, match="mixes rates"):  # half and half: nothing says which is meant
        open_episodes(tmp_path / "in")


def test_a_map_reads_any_other_layout_as_an_episode_per_file(tmp_path):
    content = {"joint_action/vector": np.ones((9, 14)), "observation/head/rgb": np.zeros((9, 16, 16, 3), np.uint8)}
    for k in range(2):
        with h5py.File(tmp_path / f"episode{k}.hdf5", "w") as root:
            fill(root, content)
    given = read_map("action=joint_action/vector,image.top=observation/head/rgb")
    reader = open_episodes(tmp_path, Reading(map=given), rate_hz=30)
    assert [sorted(e.streams) for e in reader] == [["action", "image.top"]] * 2
    assert reader.embodiment().name == "unknown"


# ---------------------------------------------------------------------- what the file says of actions


@pytest.mark.parametrize(
    ("options", "form"),
    [
        ({"controller_configs": {"type": "OSC_POSE", "control_delta": True}}, "delta"),
        ({"controller_configs": {"type": "OSC_POSE", "control_delta": False}}, "absolute"),
        ({"controller_configs": {"type": "OSC_POSE"}}, "delta"),  # robosuite's default
        ({"controller_configs": {"type": "JOINT_VELOCITY"}}, "velocity"),
        ({"controller_configs": [{"type": "OSC_POSE", "control_delta": True}] * 2}, "delta"),
        ({"controller_configs": {"type": "BASIC", "body_parts": {"right": {"input_type": "delta"}}}}, "delta"),
        (
            {
                "controller_configs": {
                    "type": "HYBRID_MOBILE_BASE",
                    "body_parts": {
                        "arms": {"right": {"type": "OSC_POSE", "input_type": "absolute", "gripper": {"type": "GRIP"}}},
                        "base": {"type": "JOINT_VELOCITY"},
                        "torso": {"type": "JOINT_POSITION", "input_type": "delta"},
                    },
                }
            },
            "absolute",
        ),
        ({"control_mode": "pd_ee_delta_pose"}, "delta"),
        ({"control_mode": "abs_joint"}, "absolute"),
    ],
)
def test_the_controller_decides_what_actions_are(tmp_path, options, form):
    reader = Hdf5Reader(robomimic(tmp_path / "a.hdf5", {"demo_0": demo()}, **options))
    assert reader.embodiment().action_form == form
    assert not said(reader, "assumed")


def test_what_nobody_says_of_actions_is_assumed_and_said(tmp_path):
    reader = Hdf5Reader(robomimic(tmp_path / "a.hdf5", {"demo_0": demo()}))
    assert reader.embodiment().action_form == "absolute"
    assert said(reader, "action_form absolute is assumed; nothing here says whether")
    parts = {"right": {"input_type": "delta"}, "left": {"input_type": "absolute"}}
    robomimic(tmp_path / "a.hdf5", {"demo_0": demo()}, controller_configs={"body_parts": parts})
    assert said(
        Hdf5Reader(tmp_path / "a.hdf5"), "controllers differ (body_parts.right delta, body_parts.left absolute)"
    )
    for broken in ("[]", "{", '{"env_kwargs": null}', '{"env_kwargs": {"robots": 3, "control_freq": "x"}}'):
        robomimic(tmp_path / "a.hdf5", {"demo_0": demo()}, {"env_args": broken})
        assert Hdf5Reader(tmp_path / "a.hdf5", rate_hz=20).embodiment().action_form == "absolute"


# ---------------------------------------------------------------------- texts and outcomes


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        ("fold it", ["fold it"]),
        (b"fold it\0\0", ["fold it"]),
        (np.array([b"fold it", b"fold the towel", b"fold it"]), ["fold it", "fold the towel"]),
        (np.array("fold it", dtype=object), ["fold it"]),
        ('["fold it", "fold the towel"]', ["fold it", "fold the towel"]),
        ('{"lang": "fold it", "layout_id": 3}', ["fold it"]),
        ('{"layout_id": 3}', []),
        ("{fold it}", ["{fold it}"]),
        (list("fold it"), ["fold it"]),
        ([["fold it"], ["fold the towel"]], ["fold it", "fold the towel"]),
        ("  ", []),
        (3, []),
        (None, []),
    ],
)
def test_phrasings_in_every_form(value, texts):
    assert phrasings(value) == texts


@pytest.mark.parametrize(
    "content",
    [
        {"@instruction": "fold it"},
        {"@language_instruction": "fold it"},
        {"@language_instruction": np.array(["fold it"], dtype=object)},
        {"language_raw": np.array([b"fold it"])},
        {"language_instruction": "fold it"},
        {"observations/language_instruction": np.array([b"fold it"] * 9)},
        {"@task_description": "fold it", "@task": "sim_fold"},
    ],
)
def test_the_instruction_is_found_where_aloha_s_heirs_put_it(tmp_path, content):
    (episode,) = Hdf5Reader(aloha(tmp_path / "a/episode_0.hdf5", **content))
    assert (episode.texts, episode.spans) == (["fold it"], [])


def test_several_instructions_are_several_phrasings(tmp_path):
    content = {"@language_instruction": ["fold it", "fold the towel"], "language_instruction_2": "make it small"}
    (episode,) = Hdf5Reader(aloha(tmp_path / "a/episode_0.hdf5", **content))
    assert sorted(episode.texts) == ["fold it", "fold the towel", "make it small"]


def test_an_instruction_per_step_holds_for_those_steps(tmp_path):
    (episode,) = Hdf5Reader(aloha(tmp_path / "a/episode_0.hdf5", instruction=np.array([b"fold"] * 4 + [b"lay"] * 5)))
    assert episode.texts == []
    assert episode.spans == [TextSpan("text", 0, 4, ("fold",)), TextSpan("text", 4, 9, ("lay",))]
    import_episodes(tmp_path / "a", tmp_path / "out")
    assert EpisodeShardReader(tmp_path / "out")[0].spans == episode.spans


def test_the_text_of_a_demonstration_goes_before_that_of_its_file(tmp_path):
    demos = {"demo_0": demo(**{"@ep_meta": "no JSON", "@num_samples": 8, "@fps": "20"})}
    (episode,) = reader = Hdf5Reader(robomimic(tmp_path / "a.hdf5", demos))
    assert (episode.texts, dict(reader.left_out)) == ([], {})
    attributes = {"problem_info": json.dumps({"language_instruction": ["o", "p", "e", "n"]})}
    demos = {"demo_0": demo(), "demo_1": demo(**{"@ep_meta": json.dumps({"lang": "close"})})}
    reader = Hdf5Reader(robomimic(tmp_path / "a.hdf5", demos, attributes))
    assert [e.texts for e in reader] == [["open"], ["close"]]


@pytest.mark.parametrize(
    ("first", "second", "outcomes"),
    [
        ({"@success": True}, {"@success": False}, [True, False]),
        ({"@is_success": "failure"}, {"@is_success": "success"}, [False, True]),
        ({"success": np.arange(8) > 6}, {"success": np.zeros(8)}, [True, False]),
        ({"success": np.float64(-1)}, {}, [None, None]),
        ({"rewards": np.eye(8)[7]}, {"rewards": np.zeros(8)}, [True, False]),
        ({"rewards": np.zeros(8)}, {"rewards": np.zeros(8)}, [None, None]),  # nobody filled them in
        ({"rewards": np.linspace(0, 0.4, 8)}, {"rewards": np.zeros(8)}, [None, None]),  # shaped: no outcome
        ({"dones": np.eye(8)[7]}, {"dones": np.zeros(8)}, [True, False]),
        ({"dones": np.eye(8)[7]}, {"dones": np.eye(8)[7]}, [None, None]),  # the end of each, however it went
        ({"@success": False, "rewards": np.ones(8)}, {"rewards": np.ones(8)}, [False, True]),
        ({}, {}, [None, None]),
    ],
)
def test_outcomes(tmp_path, first, second, outcomes):
    reader = Hdf5Reader(robomimic(tmp_path / "a.hdf5", {"demo_0": demo() | first, "demo_1": demo() | second}))
    assert [e.success for e in reader] == outcomes


# ---------------------------------------------------------------------- what one lacks, and what is left out


@pytest.mark.parametrize("order", [(0, 8), (8, 0)])
def test_an_empty_demonstration_is_left_out_and_named(tmp_path, order):
    demos = {f"demo_{i}": demo(steps) for i, steps in enumerate(order)}
    reader = Hdf5Reader(robomimic(tmp_path / "a.hdf5", demos))
    assert [len(e) for e in reader] == [8]
    assert said(reader, f"left out, no steps: a/demo_{order.index(0)}")
    reader.embodiment()
    robomimic(tmp_path / "a.hdf5", {"demo_0": demo(0), "demo_1": {}})
    with pytest.raises(DataError, match=r"all 2 demonstrations of .* hold no steps"):
        Hdf5Reader(tmp_path / "a.hdf5")


def test_what_one_demonstration_lacks_the_others_still_have(tmp_path):
    bare = {"demo_0": {"states": np.zeros((8, 30))}}
    demos = bare | {
        "demo_1": demo(**{"obs/agentview_image": None}),
        "demo_2": demo(actions=None),
        "demo_3": demo(**{"obs/robot0_eef_pos": None}),
        "demo_4": demo(),
        "demo_5": demo(actions=np.zeros((0, 7))),
    }
    reader = Hdf5Reader(robomimic(tmp_path / "a.hdf5", demos))
    assert [sorted(e.streams) for e in reader] == [
        ["action", "proprio"],
        ["image.agentview", "proprio"],
        ["action", "image.agentview"],
        ["action", "image.agentview", "proprio"],
        ["image.agentview", "proprio"],
    ]
    robot = reader.embodiment()
    assert (len(robot.proprio), len(robot.action), [c.name for c in robot.cameras]) == (3, 7, ["agentview"])
    assert said(reader, "none of these streams: a/demo_0", "no action in 2 of 5 episodes: a/demo_2, a/demo_5")
    assert said(reader, "left out, vectors: states (30 numbers)")
    assert import_episodes(tmp_path / "a.hdf5", tmp_path / "out")["samples"] == 5


def test_demonstrations_without_observations_say_where_these_come_from(tmp_path):
    path = robomimic(tmp_path / "a.hdf5", {"demo_0": {"actions": np.zeros((8, 7)), "states": np.zeros((8, 30))}})
    assert said(Hdf5Reader(path), "no observations", "dataset_states_to_obs.py", "states")


def test_one_observation_more_than_actions_is_the_last(tmp_path):
    content = {"observations/qpos": np.arange(30.0).reshape(10, 3)}
    (episode,) = Hdf5Reader(aloha(tmp_path / "a/episode_0.hdf5", **content))
    assert len(episode) == 9
    assert episode["proprio"][-1].tolist() == [24, 25, 26]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"obs/robot0_eef_pos": np.zeros((5, 3))}, "lengths differ: .*'obs/robot0_eef_pos': 5"),
        ({"obs/robot0_eef_pos": np.zeros((10, 3))}, "lengths differ: .*'obs/robot0_eef_pos': 10"),
        ({"actions": np.full((8, 7), np.nan)}, "action axis 0 is nan at step 0"),
        ({"actions": np.zeros((8, 6))}, "action has 6 numbers, in most episodes 7"),
        ({"obs/agentview_image": np.zeros((8, 16, 16, 3), np.float32) - 1}, "floats from -1 to -1.*normalisation"),
    ],
)
def test_one_bad_demonstration_does_not_decide_for_the_others(tmp_path, broken, message):
    demos = {"demo_0": demo() | broken, "demo_1": demo(seed=1), "demo_2": demo(seed=2)}
    path = robomimic(tmp_path / "a.hdf5", demos)
    assert len(Hdf5Reader(path).embodiment().action) == 7
    with pytest.raises(DataError, match=f"(?s)1 of 3 episodes.*{message}.*--skip-bad 1"):
        import_episodes(path, tmp_path / "out")
    manifest = import_episodes(path, tmp_path / "out", skip_bad=1)
    assert (manifest["samples"], list(manifest["skipped"])) == (2, ["0"])


def test_a_map_takes_what_names_do_not(tmp_path):
    content = {"base_action": np.full((9, 2), 5.0), "observations/effort": np.ones((9, 3))}
    path = aloha(tmp_path / "a/episode_0.hdf5", **content)
    assert said(Hdf5Reader(path), "base_action (2 numbers)", "observations/effort", "action=action+base_action")
    reader = Hdf5Reader(path, map=read_map("action=action+base_action,effort=observations/effort"))
    assert reader[0]["action"][0].tolist() == [0, 0, 0, 5, 5]
    robot = reader.embodiment()
    assert robot.action.names == ("action_0", "action_1", "action_2", "base_action_0", "base_action_1")
    assert robot.streams["effort"].names == ("effort_0", "effort_1", "effort_2")
    with pytest.raises(DataError, match="the map names the column 'base_acton': did you mean 'base_action'"):
        Hdf5Reader(path, map=read_map("base=base_acton"))


def test_cameras_and_states_under_other_names(tmp_path):
    picture = np.full((8, 16, 16, 3), 90, np.uint8)
    content = {
        "actions": np.zeros((8, 4)),
        "obs/qpos": np.zeros((8, 4)),
        "obs/agentview": picture,
        "obs/front/rgb": picture,
        "obs/wrist_rgb": picture,
        "obs/agentview_image": picture[:, :, :, ::-1],
        "obs/agentview_depth": np.zeros((8, 16, 16, 1), np.float32),
        "obs/agentview_segmentation": np.zeros((8, 16, 16, 1), np.int32),
        "obs/point_map": np.zeros((8, 16, 16, 3), np.float32),
    }
    reader = Hdf5Reader(robomimic(tmp_path / "a.hdf5", {"demo_0": content}))
    assert {s: n for s, n in reader.streams.items() if s != "action"} == {
        "image.agentview": ("obs/agentview_image",),
        "image.agentview_2": ("obs/agentview",),
        "image.front": ("obs/front/rgb",),
        "image.wrist": ("obs/wrist_rgb",),
        "proprio": ("obs/qpos",),
    }
    assert set(reader.left_out) == {"obs/agentview_depth", "obs/agentview_segmentation", "obs/point_map"}
    assert said(reader, "depth cameras: obs/agentview_depth")


def test_nothing_that_is_known_says_what_is_there(tmp_path):
    path = robomimic(tmp_path / "a.hdf5", {"demo_0": {"controls": np.zeros((8, 7)), "obs/tool": np.zeros((8, 3))}})
    with pytest.raises(DataError, match=r"neither cameras nor states nor actions.*controls, obs/tool.*--map action="):
        Hdf5Reader(path)
    assert len(Hdf5Reader(path, map=read_map("action=controls,proprio=obs/tool"))[0]) == 8


@pytest.mark.parametrize(
    "content",
    [
        {"actions": np.array(["a"] * 8, dtype="S")},
        {"actions": np.zeros((8, 2, 7))},
        {"actions/inner": np.zeros((8, 7))},
        {"obs": np.zeros((8, 3))},
        {"actions": np.float64(3)},
        {"actions": h5py.Empty("f")},
        {"obs/agentview_image": np.zeros((8, 16), "S4")},
        {"obs/agentview_image": np.zeros((8, 16, 16, 2), np.uint8)},
        {"actions": np.zeros(8, dtype=[("x", "f4"), ("y", "f4")])},
        {"obs/agentview_image": np.array([b"no picture"] * 8)},
        {"obs/link": h5py.SoftLink("/nowhere")},
        {"obs/link": h5py.ExternalLink("nowhere.h5", "/x")},
        {"@success": h5py.Empty("f")},
        {"@language_instruction": h5py.Empty("S10")},
        {"@language_instruction": np.array([1, 2])},
    ],
)
def test_foreign_contents_end_in_an_episode_or_in_its_name(tmp_path, content):
    odd = {k: v for k, v in demo().items() if not overlaps(k, content)} | content
    path = robomimic(tmp_path / "a.hdf5", {"demo_0": odd, "demo_1": demo()})
    manifest = import_episodes(path, tmp_path / "out", skip_bad=1)
    assert manifest["samples"] + len(manifest["skipped"]) == 2
    assert all("demo_0" in reason for reason in manifest["skipped"].values())


def overlaps(name, content):
    return any(name == other or name.startswith(f"{other}/") or other.startswith(f"{name}/") for other in content)


def test_numbers_in_names_count(tmp_path):
    names = ["demo_10", "demo_9", "1", "b", "10", "2"]
    assert sorted(names, key=natural) == ["1", "2", "10", "b", "demo_9", "demo_10"]


def test_parts_of_a_dataset_are_streams_of_their_own(tmp_path):
    qpos = np.arange(27, dtype=np.float32).reshape(9, 3) / 100
    aloha(tmp_path / "a/episode_0.hdf5", **{"observations/qpos": qpos})
    given = read_map("proprio=observations/qpos[:2],hand=observations/qpos[2:]")
    reader = Hdf5Reader(tmp_path / "a", map=given)
    np.testing.assert_array_equal(reader[0]["proprio"], qpos[:, :2])
    np.testing.assert_array_equal(reader[0]["hand"], qpos[:, 2:])
    robot = reader.embodiment()
    assert robot.proprio.names == ("qpos_0", "qpos_1")
    assert robot.streams["hand"].names == ("qpos_2",)
    assert Hdf5Reader(tmp_path / "a", embodiment=robot, map=given).embodiment() == robot
    with h5py.File(tmp_path / "foreign.hdf5", "w") as root:
        root["all"] = qpos
    given = read_map("action=all[0:2],proprio=all[1:3]")
    np.testing.assert_array_equal(Hdf5Reader(tmp_path / "foreign.hdf5", rate_hz=5, map=given)[0]["action"], qpos[:, :2])
    with pytest.raises(DataError, match=r"takes all\[1:7\], and all has 3 numbers"):
        open_episodes(tmp_path / "foreign.hdf5", Reading(map={"action": "all[1:7]"}), rate_hz=5)[0]
