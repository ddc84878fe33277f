"""A checkpoint learns robots that it has never seen: other axes, cameras and rates, with or without proprio."""

from dataclasses import replace

import numpy as np
import pytest
import yaml

from mmseq import SequenceModel
from mmseq.config import load_config
from mmseq.data.mixture import load_mix
from mmseq.data.sources import open_source
from mmseq.data.tokens import write_token_shards
from mmseq.embodiment import Camera, Embodiment
from mmseq.episode import Episode
from mmseq.errors import ConfigError, DataError, EmbodimentError
from mmseq.serving import Server, ServerConfig
from mmseq.serving.model_policy import ModelPolicy
from mmseq.testing import tiny
from mmseq.tokenization.bundle import Tokenizers
from mmseq.training.config import TrainConfig
from mmseq.training.finetune import FinetuneConfig, before_and_after, prepare
from mmseq.training.start import build_model, open_mixture
from support.ranks import run_ranks

SIZE = 16


def write_robot(path, *, axes: int, cameras: tuple[str, ...], rate_hz: int, proprio: bool, episodes: int = 6):
    """A LeRobot v3 dataset of a made-up robot, written by lerobot."""
    pytest.importorskip("lerobot")
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    image = {"dtype": "image", "shape": (SIZE, SIZE, 3), "names": ["height", "width", "channels"]}
    features = {f"observation.images.{c}": image for c in cameras}
    names = [f"joint_{i}" for i in range(axes - 1)] + ["gripper"]
    features["action"] = {"dtype": "float32", "shape": (axes,), "names": names}
    if proprio:
        features["observation.state"] = {"dtype": "float32", "shape": (axes,), "names": names}
    dataset = LeRobotDataset.create(
        "local/robot", rate_hz, features, root=path, robot_type=f"arm{axes}", use_videos=False
    )
    for index in range(episodes):
        rng = np.random.default_rng(index)
        for _ in range(14):
            frame = {f"observation.images.{c}": rng.integers(0, 255, (SIZE, SIZE, 3), np.uint8) for c in cameras}
            frame["action"] = rng.uniform(-1, 1, axes).astype(np.float32)
            if proprio:
                frame["observation.state"] = rng.uniform(-1, 1, axes).astype(np.float32)
            dataset.add_frame({**frame, "task": "push the block"})
        dataset.save_episode()
    dataset.finalize()
    answers = {"gripper": {"axis": "gripper", "open": 1.0, "closed": -1.0}, "action": {"units": "rad"}}
    answers |= {"proprio": {"units": "rad"}} if proprio else {}
    path.with_suffix(".yaml").write_text(yaml.safe_dump(answers))
    return path, path.with_suffix(".yaml")


@pytest.fixture(scope="module")
def base(trainer, tmp_path_factory):
    """A checkpoint to start from."""
    out = tmp_path_factory.mktemp("base") / "run"
    return trainer.done(out, 1, "deepspeed.dtype=fp32", "deepspeed.zero_stage=0") / "checkpoint"


def finetune(base, dataset, answers, out, ranks=1, **options):
    settings = ["save_every=100", "validation_samples=4", "max_minutes=0"]
    config = FinetuneConfig(
        checkpoint=str(base),
        dataset=str(dataset),
        embodiment=str(answers) if answers else None,
        out=str(out),
        settings=settings,
        **{"steps": 6, **options},
    )
    prepare(config, say=print, on_progress=lambda *_: None)
    done = run_ranks(["train", str(out / "recipe.yaml")], ranks, out / "log", environment={"CUDA_VISIBLE_DEVICES": ""})
    assert set(done.codes) == {0}, done.output[-3000:]
    return before_and_after(out)


@pytest.mark.parametrize(
    ("robot", "lora", "ranks"),
    [
        ({"axes": 14, "cameras": ("top", "left", "right"), "rate_hz": 50, "proprio": True}, True, 2),
        ({"axes": 7, "cameras": ("main",), "rate_hz": 5, "proprio": False}, False, 1),
    ],
)
def test_a_new_robot(base, tmp_path, robot, lora, ranks):
    dataset, answers = write_robot(tmp_path / "robot", **robot)
    out = tmp_path / "finetune"
    report = finetune(base, dataset, answers, out, ranks, lora=lora)
    assert {"policy", "kept.policy", "kept.caption"} <= set(report["tasks"])
    assert all(bits["before"] is not None for bits in report["tasks"].values())
    model = SequenceModel.from_pretrained(out / "checkpoint")
    name = f"arm{robot['axes']}"
    assert set(model.tokenizers.embodiments) == {"arm", name}
    contract = model.tokenizers.embodiments[name]
    assert contract.rate_hz == robot["rate_hz"]
    assert contract.action.units == ("rad",) * robot["axes"]
    assert len(contract.cameras) == len(robot["cameras"])
    episode = open_source(out / "episodes" / name)[0]
    action = model.predict(model.tasks["policy"], episode, t=2)["action"]
    assert action.shape == (4, robot["axes"])
    assert ("proprio" in model.tasks["policy"]) == robot["proprio"]
    now = {f"observation.images.{c.name}": episode[f"image.{c.name}"][2] for c in contract.cameras}
    now |= {"prompt": "push the block"} | ({"observation.state": episode["proprio"][2]} if robot["proprio"] else {})
    mmseq_client = pytest.importorskip("mmseq_client")
    policy = ModelPolicy.from_pretrained(out / "checkpoint", embodiment=name)
    with Server(policy, ServerConfig(port=0)) as server, mmseq_client.Client("127.0.0.1", server.port) as client:
        client.check_contract(contract.to_dict())
        np.testing.assert_allclose(client.infer(now)["actions"], action, atol=1e-6)


def test_another_rate(base, tmp_path):
    """A dataset of 20 Hz, resampled: its contract, its samples and its chunks are of 10 Hz."""
    dataset, answers = write_robot(tmp_path / "robot", axes=3, cameras=("main",), rate_hz=20, proprio=True)
    out = tmp_path / "out"
    config = FinetuneConfig(
        checkpoint=str(base), dataset=str(dataset), embodiment=str(answers), out=str(out), rate_hz=10.0
    )
    assert prepare(config, say=print, on_progress=lambda *_: None) == "arm3"
    episode = open_source(out / "episodes/arm3")[0]
    assert episode.rate_hz == Tokenizers.load(out / "tokenizers").embodiments["arm3"].rate_hz == 10
    assert len(episode) == 7
    with pytest.raises(DataError, match="rate_hz=30, but the dataset has 20"):
        prepare(replace(config, rate_hz=30.0), say=print, on_progress=lambda *_: None)


def test_a_recipe_is_fitted_to_the_ranks_before_anything_is_imported(base, tmp_path):
    dataset, answers = write_robot(tmp_path / "robot", axes=3, cameras=("main",), rate_hz=20, proprio=True)
    options = {"checkpoint": str(base), "dataset": str(dataset), "embodiment": str(answers)}
    out = tmp_path / "out"
    prepare(FinetuneConfig(**options, out=str(out), ranks=3), say=print, on_progress=lambda *_: None)
    recipe = load_config(TrainConfig, out / "recipe.yaml")
    assert recipe.data.rows_per_step == 6  # the checkpoint's were 4
    recipe.check(3)
    config = FinetuneConfig(**options, out=str(tmp_path / "no"), ranks=3, settings=["data.rows_per_step=4"])
    with pytest.raises(ConfigError, match="rows_per_step 4 cannot be shared by 3 ranks"):
        prepare(config, say=print, on_progress=lambda *_: None)
    assert not (tmp_path / "no").exists()


def test_serving_a_robot_that_the_checkpoint_does_not_know(base):
    with pytest.raises(ConfigError, match="no robot 'amr': did you mean 'arm'"):
        ModelPolicy.from_pretrained(base, embodiment="amr")


def test_lora_leaves_a_plain_checkpoint_that_has_changed_only_in_the_layers(base, tmp_path):
    dataset, answers = write_robot(tmp_path / "robot", axes=3, cameras=("main",), rate_hz=10, proprio=True)
    finetune(base, dataset, answers, tmp_path / "out", lora=True, keep=0.0)
    before = dict(SequenceModel.from_pretrained(base).named_parameters())
    after = dict(SequenceModel.from_pretrained(tmp_path / "out/checkpoint").named_parameters())
    assert before.keys() == after.keys()
    changed = {n for n, p in after.items() if not np.allclose(p.detach(), before[n].detach(), atol=1e-6)}
    assert changed == {n for n in after if n.endswith(("qkv.weight", "out.weight", "gate_up.weight", "down.weight"))}


def test_what_the_dataset_does_not_say_is_asked_for_before_anything_is_written(base, tmp_path):
    dataset, _ = write_robot(tmp_path / "robot", axes=3, cameras=("main",), rate_hz=10, proprio=True)
    config = FinetuneConfig(checkpoint=str(base), dataset=str(dataset), out=str(tmp_path / "out"))
    with pytest.raises(EmbodimentError, match=r"units of proprio.*which value of gripper is open.*--embodiment"):
        prepare(config, say=print, on_progress=lambda *_: None)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["embodiment.yaml"]


def test_a_dataset_of_too_few_episodes_is_refused(base, tmp_path):
    dataset, answers = write_robot(tmp_path / "robot", axes=3, cameras=("main",), rate_hz=10, proprio=True, episodes=3)
    config = FinetuneConfig(
        checkpoint=str(base), dataset=str(dataset), embodiment=str(answers), out=str(tmp_path / "out")
    )
    with pytest.raises(DataError, match="at least four"):
        prepare(config, say=print, on_progress=lambda *_: None)


def test_four_robots_are_trained_together(trainer, tmp_path):
    """Other axes, cameras and rates in one mix; no action is padded to a common width."""
    robots = [
        Embodiment(
            name=f"robot{i}",
            rate_hz=rate,
            cameras=tuple(Camera(name=c, height=SIZE, width=SIZE) for c in cameras),
            proprio=tiny.axes("abcdefghijklmn"[:proprio]) if proprio else None,
            action=tiny.axes("abcdefghijklmn"[:action]),
        )
        for i, (rate, cameras, proprio, action) in enumerate(
            [(5.0, "f", 3, 2), (10.0, "fw", 0, 7), (30.0, "lrt", 14, 14), (50.0, "w", 6, 6)]
        )
    ]
    bundle = tiny.tokenizers(tuple(robots))
    bundle.save(tmp_path / "tokenizers")
    rng = np.random.default_rng(0)
    for robot in robots:
        arrays = {f"image.{c.name}": rng.integers(0, 255, (20, SIZE, SIZE, 3), np.uint8) for c in robot.cameras}
        for stream in ("proprio", "action"):
            if getattr(robot, stream) is not None:
                arrays[stream] = rng.uniform(-1, 1, (20, len(getattr(robot, stream)))).astype(np.float32)
        made = (
            Episode.from_arrays(f"e{i}", robot.rate_hz, arrays, texts=["go"], embodiment=robot.name, success=True)
            for i in range(4)
        )
        write_token_shards(made, tmp_path / "tokens" / robot.name, bundle, name=robot.name)
    sources = "\n".join(f"  {r.name}: {{path: {r.name}}}" for r in robots)
    (tmp_path / "mix.yaml").write_text(
        f"name: four\nsources:\n{sources}\ntasks:\n"
        '  - {task: "text, image, proprio -> action[0.2s]"}\n  - {name: blind, task: "text, image -> action[0.2s]"}\n'
    )
    paths = [f"data.mix={tmp_path}/mix.yaml", f"data.tokens={tmp_path}/tokens"]
    paths += [f"data.tokenizers={tmp_path}/tokenizers", "deepspeed.dtype=fp32", "data.row_tokens=512", "steps=3"]
    out = trainer.done(tmp_path / "run", 2, *paths)
    model = SequenceModel.from_pretrained(out / "checkpoint")
    for robot in robots:
        frames = {f"image.{c.name}": np.zeros((4, SIZE, SIZE, 3), np.uint8) for c in robot.cameras}
        now = Episode.from_arrays("now", robot.rate_hz, frames, texts=["go"], embodiment=robot.name)
        action = model.predict("text, image -> action[0.2s]", now)["action"]
        assert action.shape == (max(1, round(0.2 * robot.rate_hz)), len(robot.action))


def test_a_folder_belongs_to_one_fine_tuning(base, tmp_path):
    """Neither the run of the checkpoint nor another fine-tuning is written over."""
    dataset, answers = write_robot(tmp_path / "robot", axes=3, cameras=("main",), rate_hz=20, proprio=True)
    options = {"checkpoint": str(base), "dataset": str(dataset), "embodiment": str(answers)}
    begin = lambda **more: prepare(
        FinetuneConfig(**{**options, "out": str(tmp_path / "out"), **more}), say=print, on_progress=lambda *_: None
    )
    with pytest.raises(ConfigError, match="which no fine-tuning wrote"):
        begin(out=str(base.parent))
    begin()
    written = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    begin()
    for more, changed in (({"lora": True}, "lora"), ({"keep": 0.5}, "keep")):
        with pytest.raises(ConfigError, match=f"begun with another {changed}"):
            begin(**more)
    answers.write_text(answers.read_text().replace("rad", "deg"))
    with pytest.raises(ConfigError, match="begun with another robot"):
        begin()
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == written
    answers.write_text("name: ../../evil\n" + answers.read_text())
    with pytest.raises(EmbodimentError, match="also that of files"):
        begin(out=str(tmp_path / "other"))


def test_columns_of_other_names_are_mapped_and_bad_episodes_left_out(base, tmp_path):
    """What is left out is said, and which arrows can be filled is known, before anything is imported."""
    import json

    import pyarrow.parquet as pq

    dataset, answers = write_robot(tmp_path / "robot", axes=3, cameras=("main",), rate_hz=10, proprio=True)
    info = dataset / "meta/info.json"
    info.write_text(info.read_text().replace('"action"', '"actions"'))
    file = next(dataset.glob("data/*/*.parquet"))
    table = pq.read_table(file)
    table = table.rename_columns([{"action": "actions"}.get(name, name) for name in table.column_names])
    values = np.array(table["actions"].to_pylist(), np.float32)
    values[14 + 3, 1] = np.nan  # in the second episode
    pq.write_table(table.set_column(table.column_names.index("actions"), "actions", [list(values)]), file)
    config = FinetuneConfig(
        checkpoint=str(base), dataset=str(dataset), embodiment=str(answers), out=str(tmp_path / "out")
    )
    said = []
    begin = lambda **more: prepare(replace(config, **more), say=said.append, on_progress=lambda *_: None)
    with pytest.raises(DataError, match="has no actions"):
        begin()
    assert [note for note in said if "--map action=actions" in note]
    mapped = {"action": ("actions",)}
    with pytest.raises(DataError, match=r"1 of 6 episodes .* 'joint_1' is nan at step 3.*--skip-bad 1"):
        begin(map=mapped)
    with pytest.raises(ConfigError, match="inverse_dynamics finds episodes of at most 14 steps"):
        begin(map=mapped, skip_bad=1, tasks=["image, image@+60 -> action[4]"])
    assert not (tmp_path / "out/episodes").exists()
    assert begin(map=mapped, skip_bad=1) == "arm3"
    assert len(open_source(tmp_path / "out/episodes/arm3")) == 5
    assert json.loads((tmp_path / "out/begun.json").read_text())["map"] == {"action": ["actions"]}
    with pytest.raises(ConfigError, match="begun with another"):
        begin(map=mapped, skip_bad=1, swap_colours=["main"])
    felt = {"map": mapped | {"force": ("observation.state",)}, "skip_bad": 1, "out": str(tmp_path / "felt")}
    with pytest.raises(EmbodimentError, match=r"the units of force \(force.units\)"):
        begin(**felt)
    answers.write_text(answers.read_text() + "force: {units: N}\n")
    assert begin(**felt, tasks=["image, force[2] -> action[4]"]) == "arm3"
    bundle = Tokenizers.load(tmp_path / "felt/tokenizers")
    assert bundle.embodiment("arm3").streams["force"].units == ("N",) * 3
    assert "force" in bundle.vocabulary.ranges  # which the checkpoint did not have
    model = build_model(load_config(TrainConfig, tmp_path / "felt/recipe.yaml"), bundle)
    assert model.config.slots == bundle.layout.slot_rows > SequenceModel.from_pretrained(base).config.slots
    assert model.config.vocabulary == len(bundle.vocabulary)


def test_rows_hold_the_longest_sequence_or_it_is_said_before_the_import(base, tmp_path):
    cameras = ("high", "low", "left", "right")
    dataset, answers = write_robot(tmp_path / "robot", axes=4, cameras=cameras, rate_hz=20, proprio=True)
    options = {"checkpoint": str(base), "dataset": str(dataset), "embodiment": str(answers)}
    said = []
    out = tmp_path / "out"
    arrow = "text, image -> video[8]"
    prepare(
        FinetuneConfig(**options, out=str(out), tasks=[arrow, "image -> action[4]"]),
        say=said.append,
        on_progress=lambda *_: None,
    )
    recipe = load_config(TrainConfig, out / "recipe.yaml")
    (note,) = [note for note in said if "row_tokens" in note]
    longest = int(note.split()[-2])
    before = load_config(TrainConfig, base / "train.yaml").data.row_tokens
    assert f"data.row_tokens={recipe.data.row_tokens} in place of {before}: video_prediction of arm4 has" in note
    assert before < longest <= recipe.data.row_tokens < longest + 256
    mixture = open_mixture(recipe, load_mix(out / "mix.yaml"), Tokenizers.load(out / "tokenizers"))
    assert max(stream.longest().length for stream in mixture.moments) == longest
    settings = [f"data.row_tokens={longest - 1}"]
    config = FinetuneConfig(**options, out=str(tmp_path / "no"), tasks=[arrow, "image -> action[4]"], settings=settings)
    with pytest.raises(ConfigError, match=f"has {longest} tokens, more than data.row_tokens={longest - 1}"):
        prepare(config, say=print, on_progress=lambda *_: None)
    assert not (tmp_path / "no").exists()
    prepare(replace(config, tasks=["image -> action[4]"]), say=print, on_progress=lambda *_: None)  # as it says
    with pytest.raises(ConfigError, match=r"begun with another tasks.* or remove this one"):
        prepare(config, say=print, on_progress=lambda *_: None)
    (tmp_path / "no/embodiment.yaml").write_text("# completed by hand")
    with pytest.raises(ConfigError, match=r"begun with another tasks.*embodiment\.yaml stays of use") as refused:
        prepare(config, say=print, on_progress=lambda *_: None)
    assert "remove" not in str(refused.value)
    config = replace(config, out=str(tmp_path / "longer"), settings=[f"data.row_tokens={longest}"])
    prepare(config, say=print, on_progress=lambda *_: None)
    assert load_config(TrainConfig, tmp_path / "longer/recipe.yaml").data.row_tokens == longest


def test_what_episodes_say_of_their_outcome_is_trained(base, tmp_path):
    dataset, answers = write_robot(tmp_path / "robot", axes=3, cameras=("main",), rate_hz=10, proprio=True)
    arrows = ["image -> success", "image -> progress", "image -> action[4]"]
    config = FinetuneConfig(
        checkpoint=str(base), dataset=str(dataset), embodiment=str(answers), out=str(tmp_path / "out"), tasks=arrows
    )
    begin = lambda **more: prepare(replace(config, **more), say=print, on_progress=lambda *_: None)
    trained = lambda out: {t.task for t in load_mix(tmp_path / out / "new.yaml").tasks}
    begin()  # nobody says how the episodes ended
    assert trained("out") == {"image -> action[4]"}
    begin(out=str(tmp_path / "judged"), assume_success=True)
    assert trained("judged") == set(arrows)
    for task in load_mix(tmp_path / "judged/new.yaml").tasks:  # and it can be
        recipe = load_config(TrainConfig, tmp_path / "judged/recipe.yaml")
        mixture = open_mixture(recipe, load_mix(tmp_path / "judged/mix.yaml"), Tokenizers.load(recipe.data.tokenizers))
        assert any(len(m) for m in mixture.moments if str(m.task) == task.task)


def test_an_arrow_without_room_where_its_subtask_is_under_way_is_not_trained(base, tmp_path):
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq

    dataset, answers = write_robot(tmp_path / "robot", axes=3, cameras=("main",), rate_hz=10, proprio=True)
    file = next(dataset.glob("data/*/*.parquet"))
    table = pq.read_table(file)
    said = ["push" if i % 14 >= 10 else "" for i in range(len(table))]  # in the last four steps of an episode
    pq.write_table(table.append_column("subtask", pa.array(said)), file)
    info = json.loads((dataset / "meta/info.json").read_text())
    info["features"]["subtask"] = {"dtype": "string", "shape": [1], "names": None}
    (dataset / "meta/info.json").write_text(json.dumps(info))
    config = FinetuneConfig(
        checkpoint=str(base),
        dataset=str(dataset),
        embodiment=str(answers),
        map={"plan": "subtask"},
        out=str(tmp_path / "out"),
    )
    begin = lambda *arrows: prepare(replace(config, tasks=list(arrows)), say=print, on_progress=lambda *_: None)
    none, some = "image@+6, text, plan -> action[8]", "image, text, plan -> action[2]"
    with pytest.raises(ConfigError, match="finds episodes of at most 14 steps, with no room at the steps that"):
        begin(none)
    begin("image -> action[4]", none, some)
    assert {t.task for t in load_mix(tmp_path / "out/new.yaml").tasks} == {"image -> action[4]", some}
