"""The command, as a user meets it: the whole way from episodes to a prediction, and every mistake in one line."""

import json
import os
import subprocess
import sys
import time

import pytest

from mmseq import cli
from mmseq.errors import DataError
from mmseq.testing import tiny

MIX = """
sources: {robot: {path: robot}, film: {path: film}}
tasks: [{task: "text, image, proprio -> action[4]"}, {task: "text, image -> video[2]"}]
holdout: 0.5
"""
RECIPE = """
out: OUT/tokenizers
sources: {robot: {path: OUT/robot}, film: {path: OUT/film}}
text: {vocab_size: 300}
vision:
  {steps: 4, size: 16, patch: 4, margin: 2, levels: [4, 4], width: 16, hidden: 16, decoder_depth: 1, decoder_reach: 1}
holdout: 0.5
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Tokenizers and token shards made by the command, and an untrained checkpoint with them."""
    root = tmp_path_factory.mktemp("place")
    tiny.write_episodes(root / "robot", [tiny.episode(i, length=12) for i in range(10)], (tiny.embodiment(),))
    tiny.write_episodes(root / "film", [tiny.video(i, length=10) for i in range(10)])
    (root / "mix.yaml").write_text(MIX)
    (root / "recipe.yaml").write_text(RECIPE.replace("OUT", str(root)))
    assert cli.main(["tokenizer", "train", str(root / "recipe.yaml"), "vision.threads=1"]) == 0
    assert (
        cli.main(
            [
                "data",
                "tokenize",
                *map(str, (root / "mix.yaml", root / "tokens")),
                "--tokenizers",
                str(root / "tokenizers"),
            ]
        )
        == 0
    )
    from mmseq.tokenization.bundle import Tokenizers

    tiny.model(Tokenizers.load(root / "tokenizers")).save_pretrained(root / "checkpoint")
    return root


def run(capsys, *argv):
    code = cli.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_help_is_quick_and_imports_nothing_heavy():
    code = "import sys; from mmseq import cli; cli.build_parser(); print('torch' in sys.modules, 'rich' in sys.modules)"
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
    assert time.perf_counter() - started < 10  # 0.2 s on an idle machine


def test_it_runs_as_a_module_and_exits_with_2():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", "mmseq", "inspect", "nowhere"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("mmseq: error: nowhere does not exist")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["trian", "a.yaml"], "unknown command 'trian': did you mean 'train'?"),
        (["data", "tokenise"], "unknown command 'tokenise': did you mean 'tokenize'?"),
        (
            ["data", "import", "a", "b", "--overwite"],
            "unknown option '--overwite' of `mmseq data import`: did you mean '--overwrite'?",
        ),
        (["data", "import", "a", "b", "--over"], "unknown option '--over'"),
        (["data", "import", "a", "b", "--format", "vidoe"], "did you mean 'video'"),
        (["data", "import", "a", "b", "--size", "big"], "invalid int value"),
        (["data", "import", "a"], "required: OUT"),
        (["data", "import", "a", "b", "c"], "unexpected 'c'"),
        (["train", "absent.yaml"], "cannot read absent.yaml"),
        (["inspect", "absent.yaml"], "cannot read absent.yaml"),
        (["predict", "absent", "policy", "--episode", "x:0"], "does not exist"),
        ([], "required: COMMAND"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, argv, says):
    code, out, err = run(capsys, *argv)
    assert code == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    assert says in err


def test_debug_shows_the_traceback():
    with pytest.raises(DataError):
        cli.main(["data", "import", "nowhere", "out", "--debug"])


def test_interrupted_is_130(capsys, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr("mmseq.doctor.print_report", interrupt)
    assert run(capsys, "doctor")[0] == 130


def test_doctor_says_what_is_there(capsys):
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    for topic in ("torch", "bf16", "attention", "extra train", "plug-in", "EGL", "memory"):
        assert topic in out


def test_tokenizers_come_with_what_was_measured(place):
    report = json.loads((place / "tokenizers" / "report.json").read_text())
    assert set(report["vision"]["psnr"]) <= {"robot", "film"}
    measured = next(iter(report["action"].values()))["arm"]["x"]
    assert measured["unit"] == "unitless"
    assert 0 < measured["error"] < 0.05
    assert report["episodes"]["film"] < 10


def test_tokenizer_eval_measures_a_dataset(place, capsys):
    code, out, _ = run(capsys, "tokenizer", "eval", place / "tokenizers", "--data", place / "robot")
    assert code == 0
    assert "vision.psnr.robot" in out
    assert "action.robot.arm.g.error" in out


def test_tokenize_again_keeps_what_is_complete(place, capsys):
    code, out, _ = run(
        capsys, "data", "tokenize", place / "mix.yaml", place / "tokens", "--tokenizers", place / "tokenizers"
    )
    assert code == 0
    assert out.count("already complete") == 2


def test_lint_prints_shares_or_every_problem(place, capsys, tmp_path):
    options = ["--tokens", place / "tokens", "--tokenizers", place / "tokenizers", "--root", place]
    code, out, _ = run(capsys, "data", "lint", place / "mix.yaml", *options)
    assert code == 0
    assert "policy" in out
    assert "50.0%" in out
    (tmp_path / "bad.yaml").write_text(
        "sources: {robot: {path: robt}}\ntasks: [{task: 'image -> acton[2]'}, {task: policy, sources: [x]}]"
    )
    code, _, err = run(capsys, "data", "lint", tmp_path / "bad.yaml", *options)
    assert code == 2
    assert len(err.splitlines()) >= 3


def test_preview_shows_segments_and_pictures(place, capsys, tmp_path):
    options = ["--tokens", place / "tokens", "--tokenizers", place / "tokenizers", "--out", tmp_path]
    code, out, _ = run(capsys, "data", "preview", place / "mix.yaml", *options, "-n", 2)
    assert code == 0
    assert "predicted" in out
    assert "given" in out
    assert any(text in out for text in tiny.TEXTS)
    assert list(tmp_path.glob("*_image.*_given.png"))


@pytest.mark.parametrize(
    ("arrow", "streams", "files"),
    [
        ("text, image, proprio -> action[4]", {"action"}, {"prediction.json"}),
        (
            "text, image -> image@+2, video[2], progress, plan",
            {"image", "video", "progress", "plan"},
            {"prediction_image_real_above_predicted.png", "prediction_video.mp4", "prediction_video.png"},
        ),
    ],
)
def test_predict_writes_what_it_predicted_beside_what_is_true(place, capsys, tmp_path, arrow, streams, files):
    code, out, _ = run(
        capsys, "predict", place / "checkpoint", arrow, "--episode", f"{place / 'robot'}:2", "--t", 3, "--out", tmp_path
    )
    assert code == 0
    record = json.loads(out)
    assert record == json.loads((tmp_path / "prediction.json").read_text())
    assert set(record["streams"]) == streams
    assert files <= {p.name for p in tmp_path.iterdir()}
    for entry in record["streams"].values():
        assert {"real", "psnr_db"} & set(entry)


def test_predict_reads_a_video_file(place, capsys, tmp_path):
    from mmseq.mp4 import write_video

    write_video(tmp_path / "film.mp4", tiny.video(3)["image.main"], 20.0)
    code, out, _ = run(
        capsys,
        "predict",
        place / "checkpoint",
        "text, image -> video[2]",
        "--episode",
        tmp_path / "film.mp4",
        "--text",
        "go",
    )
    assert code == 0
    assert json.loads(out)["streams"]["video"]["shape"] == [2, 16, 16, 3]
    code, _, err = run(capsys, "predict", place / "checkpoint", "policy", "--episode", tmp_path / "film.mp4")
    assert code == 2
    assert "cannot fill" in err
    code, _, err = run(
        capsys, "predict", place / "checkpoint", "image -> text", "--episode", f"{tmp_path / 'film.mp4'}:7"
    )
    assert "there is no 7" in err


def test_inspect_describes_a_checkpoint(place, capsys):
    code, out, _ = run(capsys, "inspect", place / "checkpoint")
    assert code == 0
    for said in ("embodiment arm: 20 Hz", "vision", "M parameters", "nothing is measured"):
        assert said in out
    code, out, _ = run(capsys, "inspect", place / "checkpoint", "--json")
    assert json.loads(out)["ranges"]["text"]["first"] == 0


def test_inspect_counts_the_parameters_of_a_recipe(capsys, tmp_path):
    (tmp_path / "a.yaml").write_text(
        "out: x\ndata: {mix: m, tokens: t, tokenizers: none}\nmodel: {vocabulary: 64, width: 8}\n"
    )
    code, out, _ = run(capsys, "inspect", tmp_path / "a.yaml", "model.layers=2", "--json")
    assert code == 0
    found = json.loads(out)["model"]
    from mmseq.layout import Layout
    from mmseq.model.transformer import ModelConfig, Transformer

    config = ModelConfig(vocabulary=64, merge=2, slots=Layout((8, 8)).slot_rows, width=8, layers=2)
    assert found["parameters"] == sum(p.numel() for p in Transformer(config).parameters())
    code, _, err = run(capsys, "inspect", tmp_path / "a.yaml", "model.vocabulary=0")
    assert code == 2
    assert "vocabulary is unknown" in err


@pytest.mark.parametrize("t", ["-5", "500"])
def test_a_step_outside_the_episode_is_refused(place, capsys, tmp_path, t):
    episode = f"{place / 'robot'}:0"
    argv = ["predict", place / "checkpoint", "text -> action[2]", "--episode", episode, f"--t={t}", "--out", tmp_path]
    code, _, err = run(capsys, *argv)
    assert code == 2
    assert f"has steps 0 to 11, t is {t}" in err


def test_a_path_that_cannot_be_written_is_named(place, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    argv = ["predict", place / "checkpoint", "text -> action[2]", "--episode", f"{place / 'robot'}:0"]
    code, _, err = run(capsys, *argv, "--out", tmp_path / "file")
    assert code == 2
    assert str(tmp_path / "file") in err


def test_a_name_stands_for_what_the_checkpoint_was_trained_on(place, capsys, tmp_path):
    from mmseq import SequenceModel

    model = SequenceModel.from_pretrained(place / "checkpoint")
    model.tasks = {"policy": "text, image, proprio -> action[2]"}
    model.save_pretrained(tmp_path / "named")
    argv = ["predict", tmp_path / "named", "policy", "--episode", f"{place / 'robot'}:0", "--out", tmp_path / "out"]
    code, out, _ = run(capsys, *argv)
    assert code == 0
    assert "action[2]" in out
