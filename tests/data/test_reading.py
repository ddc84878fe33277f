"""What its owner says of a dataset is heard wherever one is opened: a set that needs it gives what a plain one does."""

import ast
import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

import mmseq
from mmseq import cli
from mmseq.bench import chunks
from mmseq.config import load_config
from mmseq.data.importing import EpisodeShardReader
from mmseq.data.mixture import MixConfig, SourceConfig, load_mix, save_mix
from mmseq.data.sources import open_source, source_identity
from mmseq.demo import run as demo
from mmseq.demo.config import DemoConfig
from mmseq.errors import ConfigError, MMSeqError
from mmseq.labelling.labels import LabelConfig
from mmseq.labelling.training import LabellerConfig
from mmseq.model.sequence_model import SequenceModel
from mmseq.reading import Reading
from mmseq.serving.launch import ServeSettings, loader
from mmseq.tasks import Task
from mmseq.testing import tiny
from mmseq.tokenization.recipe import TokenizerConfig, TokenizerSource
from mmseq.training.finetune import FinetuneConfig

h5py = pytest.importorskip("h5py")
STEPS = 12
SCHEMAS = [SourceConfig, TokenizerSource, FinetuneConfig, DemoConfig, chunks.Config, LabelConfig, LabellerConfig]
SAID = {"swapped": ["--swap-colours", "front"], "renamed": ["--map", "action=controls"]}


def write(folder, *, action="action", swapped=False):
    folder.mkdir()
    for index in range(5):
        rng = np.random.default_rng(index)
        pictures = rng.integers(0, 255, (STEPS, 16, 16, 3), np.uint8)
        pictures[..., 2] //= 8  # it is red, until that is blue
        with h5py.File(folder / f"episode_{index}.hdf5", "w") as root:
            root.attrs["fps"] = 20
            root[action] = rng.uniform(-1, 1, (STEPS, 3)).astype(np.float32)
            root["observations/qpos"] = rng.uniform(-1, 1, (STEPS, 3)).astype(np.float32)
            root["observations/images/front"] = pictures[..., ::-1] if swapped else pictures


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The same episodes plain, with red and blue exchanged, and with actions under another name; and a checkpoint."""
    root = tmp_path_factory.mktemp("reading")
    write(root / "plain")
    write(root / "swapped", swapped=True)
    write(root / "renamed", action="controls")
    bundle = tiny.tokenizers((open_source(root / "plain").embodiment(),))
    bundle.save(root / "tokenizers")
    model = tiny.model(bundle)
    model.tasks = {"policy": "image, proprio -> action[4]"}
    model.save_pretrained(root / "checkpoint")
    return root


def run(capsys, *argv):
    code = cli.main([str(a) for a in argv])
    return code, *capsys.readouterr()


@pytest.mark.parametrize(
    "door",
    ["predict", "tokenizer eval", "serve", "demo", "data import", "finetune", "label"],
)
def test_every_command_that_opens_a_dataset_has_the_options(capsys, door):
    with pytest.raises(SystemExit):
        cli.main([*door.split(), "--help"])
    listed = capsys.readouterr().out
    for field in fields(Reading):
        assert f"  --{field.name.replace('_', '-')}" in listed


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_schema_that_names_a_dataset_has_the_settings(schema):
    assert issubclass(schema, Reading)


def test_nothing_in_the_package_opens_a_dataset_without_what_is_said_of_it():
    arguments = {"open_source": 2, "open_episodes": 2, "import_episodes": 3}  # with the reading, the last of these
    calls = [
        (path.name, node.func.id, len(node.args))
        for path in Path(mmseq.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in arguments
    ]
    assert len(calls) > 8
    assert [call for call in calls if call[2] < arguments[call[1]]] == []


@pytest.mark.parametrize(
    ("name", "arrow", "unsaid"), [("swapped", "image -> image@+2", None), ("renamed", "image -> action[2]", "action")]
)
def test_predict(place, capsys, tmp_path, name, arrow, unsaid):
    def predict(folder, *said):
        out, episode = tmp_path / "_".join([folder, *said]), f"{place / folder}:1"
        code, record, err = run(
            capsys, "predict", place / "checkpoint", arrow, "--episode", episode, "--out", out, *said
        )
        assert code == 0, err
        return json.loads(record), {p.name: p.read_bytes() for p in out.iterdir()}  # pictures show what is real too

    plain, bare = predict("plain"), predict(name)
    assert predict(name, *SAID[name]) == plain
    assert bare[1] != plain[1]
    if unsaid:  # the episode has nothing to compare with
        assert "real" not in bare[0]["streams"][unsaid]


@pytest.mark.parametrize("name", SAID)
def test_tokenizer_eval(place, capsys, tmp_path, name):
    def measure(folder, *said):
        (tmp_path / "set").unlink(missing_ok=True)
        (tmp_path / "set").symlink_to(place / folder)  # reports are by the name of the folder
        code, out, err = run(capsys, "tokenizer", "eval", place / "tokenizers", "--data", tmp_path / "set", *said)
        assert code == 0, err
        return [line for line in out.splitlines() if "per_s" not in line]  # but for how fast it went

    plain = measure("plain")
    assert measure(name, *SAID[name]) == plain != measure(name)


def test_serve_replays_what_the_map_names(place, capsys, monkeypatch, tmp_path):
    served = []
    monkeypatch.setattr("mmseq.serving.launch.launch", lambda settings, **_: served.append(settings) or True)
    (tmp_path / "server.yaml").write_text("reading: {map: {action: controls}}\n")
    replay = ["serve", "--replay", f"{place / 'renamed'}:1"]
    assert run(capsys, *replay, *SAID["renamed"])[0] == 0
    assert run(capsys, *replay, "reading.map.action=controls")[0] == 0
    assert run(capsys, *replay, "--config", tmp_path / "server.yaml", "--assume-success")[0] == 0
    truth = open_source(place / "plain")[1]["action"][:16]
    for settings in served:
        np.testing.assert_array_equal(loader(settings)().chunk(0, len(truth)), truth)
    assert [settings.reading.assume_success for settings in served] == [False, False, True]
    with pytest.raises(MMSeqError):
        loader(replace(served[0], reading=Reading()))()
    with pytest.raises(ConfigError, match="map would change how a replay is read"):
        loader(ServeSettings(checkpoint="a", reading=served[0].reading))


@pytest.mark.parametrize("name", SAID)
def test_demo_imports_what_is_said(place, tmp_path, monkeypatch, capsys, name, psnr):
    class Imported(Exception):
        pass

    def stop(*_):
        raise Imported

    monkeypatch.setattr(demo, "_mix", stop)
    monkeypatch.setattr(demo, "speed_here", lambda: 1.0)
    with pytest.raises(Imported):
        cli.main(["demo", "--data", str(place / name), "--out", str(tmp_path / "out"), *SAID[name]])
    shards, plain = EpisodeShardReader(tmp_path / "out/data/episodes/robot"), open_source(place / "plain")
    np.testing.assert_array_equal(shards[1]["action"], plain[1]["action"])
    red, _, blue = shards[1]["image.front"].mean((0, 1, 2))
    assert red > 2 * blue


def test_bench_chunks_reads_the_same_requests(place):
    model = SequenceModel.from_pretrained(place / "checkpoint")
    task = Task.parse(model.tasks["policy"])

    def requests(folder, *said):
        how = [f"checkpoint={place / 'checkpoint'}", f"data={place / folder}", *said]
        found = chunks._requests(load_config(chunks.Config, None, how), model, task)
        return [request.tokens.codes("image.front", 0, STEPS) for batch in found for request in batch]

    plain, bare = requests("plain"), requests("swapped")
    said = requests("swapped", "swap_colours=[front]")
    np.testing.assert_array_equal(said, plain)
    assert not np.array_equal(bare, plain)


def test_settings_are_written_flat_and_read_back(tmp_path):
    (tmp_path / "mix.yaml").write_text(
        "sources:\n"
        "  a: {path: x, map: {action: a+b, image: {front: rgb}}, swap_colours: [front], assume_success: true}\n"
        "tasks: [{task: 'image -> video[2]'}]\n"
    )
    mix = load_mix(tmp_path / "mix.yaml", ["sources.a.rate_hz=5"])
    said = {"map": {"action": ("a", "b"), "image.front": ("rgb",)}, "swap_colours": ["front"], "assume_success": True}
    assert mix.sources["a"].said() == said
    assert mix.sources["a"] == SourceConfig(path="x", rate_hz=5, **said)
    save_mix(mix, tmp_path / "again.yaml")
    assert load_mix(tmp_path / "again.yaml") == mix
    recipe = load_config(TokenizerConfig, None, ["out=x", "sources.a.path=x", "sources.a.map.action=a+b"])
    assert recipe.sources["a"].said() == {"map": {"action": ("a", "b")}}
    (tmp_path / "bad.yaml").write_text(
        "sources: {a: {path: x, map: {image: rgb}}}\ntasks: [{task: 'image -> video[2]'}]\n"
    )
    with pytest.raises(ConfigError, match=r"the map has 'image'\. Name the camera"):
        load_mix(tmp_path / "bad.yaml")
    assert MixConfig().sources == {}


def test_a_source_is_known_by_how_it_is_read_and_not_by_its_other_settings(place):
    as_it_is = source_identity(place / "plain")
    assert source_identity(place / "plain", SourceConfig(path="plain", weight=3)) == as_it_is
    assert source_identity(place / "plain", SourceConfig(path="plain", assume_success=True)) != as_it_is


def test_a_mistake_in_a_map_is_told_before_anything_is_loaded(capsys):
    argv = ["predict", "nowhere", "policy", "--episode", "x:0", "--map", "action"]
    code, _, err = run(capsys, *argv)
    assert code == 2
    assert "cannot read the map 'action'" in err
