"""Numbers and pictures of a real run reach the trackers, offline, and a resumed run stays one run there."""

import json
import sqlite3

import pytest

SETTINGS = ["steps=4", "validate_every=2", "validation_samples=4", "deepspeed.zero_stage=1", "deepspeed.dtype=fp32"]
PSNR = "validation/teacher_forced/forward_dynamics/psnr_db"
PICTURE = "validation/pictures/forward_dynamics/"


def run(trainer, out, package: str, environment: dict[str, str]) -> None:
    """Two steps, and two more from the checkpoint."""
    for stop in ("2", "0"):
        more = [*SETTINGS, f"loggers=[{package}]", f"data.mix={trainer.root}/holdout.yaml", f"stop_after={stop}"]
        done = trainer.run(out, 1, *more, environment=environment)
        assert done.codes == [0], done.output[-3000:]


def test_wandb_offline(trainer, tmp_path):
    pytest.importorskip("wandb", reason="pip install 'mmseq[wandb]'")
    out = tmp_path / "run"
    run(trainer, out, "wandb", {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(tmp_path)})
    name = (out / "run_id.txt").read_text().strip()
    tries = sorted(out.glob("wandb/offline-run-*"))
    assert len(tries) == 2
    assert all(t.name.endswith(name) for t in tries)
    for place in tries:
        (record,) = place.glob("*.wandb")
        content = record.read_bytes()
        assert b"train/bits_per_token/policy" in content
        assert PSNR.encode() in content
        assert len(list(place.glob(f"files/media/images/{PICTURE}*.png"))) in (4, 8)  # of one validation or two


def test_wandb_without_a_key_says_what_to_do(trainer, tmp_path):
    pytest.importorskip("wandb", reason="pip install 'mmseq[wandb]'")
    environment = {"WANDB_MODE": "online", "HOME": str(tmp_path), "WANDB_API_KEY": "", "NETRC": str(tmp_path / "none")}
    done = trainer.run(tmp_path / "run", 1, *SETTINGS, "loggers=[wandb]", environment=environment)
    assert done.codes == [2], done.output[-3000:]
    assert "loggers: wandb could not start: No API key configured" in done.output
    assert "set WANDB_MODE=offline" in done.output.replace("Set", "set")
    assert "Traceback" not in done.output


def test_trackio(trainer, metrics, tmp_path):
    pytest.importorskip("trackio", reason="pip install 'mmseq[trackio]'")
    out, store = tmp_path / "run", tmp_path / "store"
    run(trainer, out, "trackio", {"TRACKIO_DIR": str(store), "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    with sqlite3.connect(store / "mmseq.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert {name for name, _, _ in rows} == {f"tiny-{(out / 'run_id.txt').read_text().strip()}"}
    found = [(step, json.loads(values)) for _, step, values in rows]
    assert [s for s, values in found if "train/loss" in values] == [1, 2, 3, 4]
    seen = {step: values[PSNR] for step, values in found if PSNR in values}
    expected = metrics(out, "validation")
    assert seen == {r["step"]: pytest.approx(r["teacher_forced"]["forward_dynamics"]["psnr_db"]) for r in expected}
    pictures = [values for _, values in found if any(key.startswith(PICTURE) for key in values)]
    assert len(pictures) == len(expected) == 3
    for values in pictures:
        assert len(values) == 4
        for picture in values.values():
            assert (store / "media" / picture["file_path"]).is_file()
