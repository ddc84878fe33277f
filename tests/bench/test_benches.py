"""Every bench through the command, at the smallest size that runs: rows, figures that must hold, and mistakes."""

import contextlib
import dataclasses
import json
import re
import time
from pathlib import Path

import pytest

from mmseq import cli
from mmseq.bench.rows import BenchRow, Spread, row, take_turns
from mmseq.bench.samples import write_lerobot
from mmseq.testing import tiny

TINY = {
    "throughput": "width=64 layers=1 vocabulary=2000 row_tokens=1024 rows_per_pass=1 samples=10 steps=1 seconds=0.1",
    "loader": "episodes=2 length=12 height=32 width=48 turn_s=0.1 seconds=0.1",
    "loss": "positions=64 width=8 vocabulary=20000 turns=2 seconds=0.1",
    "packing": "blocks=1",
    "decode": "width=64 layers=1 vocabulary=600 horizon=4 axes=2 passes=2 seconds=0.1",
    "chunks": "batch=2 moments=2 passes=2 seconds=0.1",
    "serve": "cameras=1 image=32 calls=20 seconds=0 clients=3 load_s=0.3 load_turns=1 model_ms=1",
}


def bench(name, tmp_path, capsys, *more):
    path = tmp_path / f"{name}.json"
    assert cli.main(["bench", name, *TINY[name].split(), *more, "--json", str(path)]) == 0, capsys.readouterr().err
    rows = json.loads(path.read_text())
    assert all(set(r) == {f.name for f in dataclasses.fields(BenchRow)} for r in rows)
    assert all(r["command"].startswith("mmseq") and " cores of " in r["machine"] for r in rows)
    better = [(r["value"] - r["baseline_value"]) * (1 if r["better"] == "higher" else -1) for r in rows if r["n"] == 1]
    assert [b > 0 for b in better] == [r["ratio"] > 1 for r in rows if r["n"] == 1]
    return {r["name"]: r for r in rows}, capsys.readouterr().out


def test_throughput_has_the_same_tokens_on_both_sides(tmp_path, capsys):
    pytest.importorskip("deepspeed")
    pytest.importorskip("transformers")
    rows, out = bench("throughput", tmp_path, capsys, "dtype=fp32", "peak_tflops=1")
    assert set(rows) == {f"throughput.{name}" for name in ("useful_tokens", "peak_memory", "mfu")}
    assert rows["throughput.useful_tokens"]["ratio"] == pytest.approx(rows["throughput.mfu"]["ratio"])
    notes = [line for line in out.splitlines() if " slots for " in line]
    used = [note.split(" slots for ")[1].split()[0] for note in notes]
    slots = [int(note.split(" parameters, ")[1].split()[0].replace(",", "")) for note in notes]
    assert len(used) == 2
    assert used[0] == used[1]
    assert all(slot >= int(used[0].replace(",", "")) for slot in slots)  # the last rows and the baseline are padded


def processes_with(value):
    """Command lines of living processes that have `value` in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if value in (process / "environ").read_text(errors="replace"):
                found.append((process / "cmdline").read_text().replace("\0", " "))
    return [line for line in found if line and "resource_tracker" not in line]  # which is this process's own


def test_loader_reads_what_lerobot_reads_and_ends_its_processes(tmp_path, capsys, monkeypatch):
    pytest.importorskip("lerobot")
    monkeypatch.setenv("BENCH_TEST", str(tmp_path))
    rows, out = bench("loader", tmp_path, capsys)
    until = time.monotonic() + 5
    while processes_with(f"BENCH_TEST={tmp_path}") and time.monotonic() < until:
        time.sleep(0.1)
    assert processes_with(f"BENCH_TEST={tmp_path}") == []
    assert set(rows) == {"loader.tokens", "loader.tokens.read", "loader.live", "loader.live.read"}
    assert all(r["value"] > 0 and r["baseline_name"] == "lerobot" for r in rows.values())
    assert "differ from lerobot's by at most 0 of 255" in out
    assert "2 episodes, 1 camera(s) of 32x48x3; windows of 1" in out


@pytest.mark.slow
def test_loader_reads_windows(tmp_path, capsys):
    pytest.importorskip("lerobot")
    rows, out = bench("loader", tmp_path, capsys, "window=4")
    assert rows["loader.live"]["value"] > 0
    assert "windows of 4" in out


@pytest.mark.slow
def test_loader_reads_columns_of_other_names(tmp_path, capsys):
    pytest.importorskip("lerobot")
    data = write_lerobot(tmp_path / "set", episodes=2, length=12, height=32, width=48)
    given = "map={image.eye: observation.images.front, proprio: action}"
    rows, out = bench("loader", tmp_path, capsys, f"data={data}", given)
    assert rows["loader.live"]["value"] > 0
    assert "differ from lerobot's by at most 0 of 255" in out


def test_loss_holds_a_part_of_the_logits(tmp_path, capsys):
    rows, out = bench("loss", tmp_path, capsys)
    assert set(rows) == {"loss.peak_memory", "loss.peak_memory_of_logits", "loss.time"}
    assert rows["loss.peak_memory_of_logits"]["baseline_value"] == pytest.approx(64 * 20000 * 4 / 2**20)
    assert rows["loss.peak_memory"]["baseline_value"] > 64 * 20000 * 4 / 2**20  # the baseline does build them
    nats = [line.split("s, ")[1] for line in out.splitlines() if "nats per position" in line]
    assert len(nats) == 2
    assert nats[0] == nats[1]


def test_packing_fills_rows_and_loses_nothing(tmp_path, capsys):
    rows, _ = bench("packing", tmp_path, capsys)
    assert rows["packing.20_to_8000"]["value"] >= 0.995
    assert rows["packing.demo_mix"]["value"] >= 0.99  # of one block; the last row of a block counts for more
    assert rows["packing.demo_mix.lost"]["value"] == rows["packing.20_to_8000.lost"]["value"] == 0


def test_decode_computes_what_transformers_computes(tmp_path, capsys):
    pytest.importorskip("transformers")
    rows, out = bench("decode", tmp_path, capsys)
    assert set(rows) == {"decode.passes", "decode.tokens", "decode.passes_against_tokens"}
    assert " ms, 2 forward passes a chunk" in out
    assert out.count(" ms, 8 forward passes a chunk") == 2
    assert "logits agree to" in out


@pytest.fixture
def trained(tmp_path):
    """Options that name a checkpoint, trained for few passes, and episodes of its robot and others."""
    model = tiny.model()
    model.tasks, model.parallel = {"policy": "text, image, proprio -> action[4]"}, ["policy"]
    model.save_pretrained(tmp_path / "checkpoint")
    episodes = [tiny.video(0), *(tiny.episode(i) for i in range(2))]
    tiny.write_episodes(tmp_path / "episodes", episodes, (tiny.embodiment(),))
    return f"checkpoint={tmp_path / 'checkpoint'}", f"data={tmp_path / 'episodes'}"


def test_guessed_chunks_are_those_of_one_pass_per_token(tmp_path, capsys, trained):
    rows, out = bench("chunks", tmp_path, capsys, *trained)
    assert set(rows) == {"chunks.guessed", "chunks.2 passes"}
    assert "guessed:" in out
    assert "0.00% of the codes are others" in out.split("guessed:")[1].splitlines()[0]
    assert "one pass per token: 16.0 passes in the mean, 16 at most" in out
    assert "2 passes: 2.0 passes in the mean, 2 at most" in out
    for change, message in (
        ("batch=3", "has 2 episodes that fill .*, 3 are wanted"),
        ("policy=image -> text", "does not end with a chunk of actions"),
        ("batch=0", "batch must be positive"),
    ):
        assert cli.main(["bench", "chunks", *trained, change]) == 2
        assert re.search(message, capsys.readouterr().err)


def test_serve_answers_every_client_with_its_own(tmp_path, capsys):
    pytest.importorskip("fastapi")
    rows, _ = bench("serve", tmp_path, capsys)
    load = {f"serve.load.{name}" for name in ("answers_per_s", "fairness", "p99_ms", "health_p99_ms", "crossed")}
    assert set(rows) == {"serve.round_trip.p50", "serve.round_trip.p99"} | load
    assert rows["serve.load.crossed"]["value"] == rows["serve.load.crossed"]["baseline_value"] == 0
    assert 0 < rows["serve.load.fairness"]["value"] <= 1
    assert 0 < rows["serve.round_trip.p50"]["value"] <= rows["serve.round_trip.p99"]["value"]
    assert "openpi" in rows["serve.round_trip.p99"]["baseline_name"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("throughputs", "did you mean 'throughput'"),
        ("throughput widht=64", "did you mean 'width'"),
        ("throughput width=100", "width must be a multiple of 64"),
        ("throughput samples=1", "samples=1 do not fill steps=2. Raise samples"),
        ("throughput dtype=fp16", "dtype must be bf16 or fp32"),
        ("throughput tokens=x", "mix, tokens and tokenizers belong together"),
        ("loader window=0", "window must be positive"),
        ("loader window=99", "window=99 does not fit into length=50"),
        ("loader map.action=x", "map is of a dataset, and data names none"),
        ("loader data=x swap_colours=[a]", "lerobot cannot exchange colours"),
        ("loss positions=-1", "positions must be positive"),
        ("decode width=65", "width must be a multiple of 64"),
        ("decode axes=27", "axes must be at most 26"),
        ("packing blocks=0", "blocks must be positive"),
        ("serve clients=0", "clients must be positive"),
        ("packing --jsn x", "did you mean '--json'"),
    ],
)
def test_mistakes_are_named(arguments, message, capsys):
    assert cli.main(["bench", *arguments.split()]) == 2
    assert message in capsys.readouterr().err


def test_turns_alternate_and_the_ratio_is_of_each_turn():
    order, clock = [], iter(range(1, 100))
    runs = {name: lambda name=name: order.append(name) or float(next(clock)) for name in "ab"}
    found = take_turns(runs, seconds=0.0)
    assert "".join(order) == "abbaab"
    assert found == {"a": Spread((1.0, 4.0, 5.0)), "b": Spread((2.0, 3.0, 6.0))}
    made = row("x.y", "s", found["a"], "b", found["b"], better="lower")
    assert (made.value, made.baseline_value, made.n) == (4.0, 3.0, 3)
    assert made.ratio == pytest.approx(1.2)  # the median of 2/1, 3/4, 6/5
