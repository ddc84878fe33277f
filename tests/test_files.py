"""Whoever may read a folder may read the files that are written into it; and a run says which code it was."""

import json
import os
import stat
import subprocess

import pytest
import torch

import mmseq
from mmseq.files import code_revision, record_revision, save_tensors
from mmseq.testing import tiny


@pytest.fixture(params=[0o022, 0o027, 0o002], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder):
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}


def test_checkpoints_tokenizers_exports_and_shards_keep_to_the_umask(umask, tmp_path):
    from mmseq.model.export import export_hf

    model = tiny.model()
    model.save_pretrained(tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "hf", dtype="fp32", text_only=False)
    tiny.write_episodes(tmp_path / "episodes", [tiny.episode(0, 4)], (tiny.embodiment(),))
    found = modes(tmp_path)
    assert {"model.safetensors", "vision.safetensors", "text.model", "shard-000000.tar", "config.json"} <= set(found)
    assert {name: oct(mode) for name, mode in found.items() if mode != 0o666 & ~umask} == {}


def test_tensors_replace_what_was_there(umask, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_text("old")
    path.chmod(0o600)
    save_tensors({"x": torch.arange(3)}, path, {"a": "b"})
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        assert file.get_tensor("x").tolist() == [0, 1, 2]
        assert file.metadata() == {"a": "b"}
    assert modes(tmp_path) == {path.name: 0o666 & ~umask}


def test_the_revision_is_the_checkouts_or_the_versions(tmp_path, monkeypatch):
    package = tmp_path / "mmseq"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(mmseq, "__file__", str(package / "__init__.py"))
    assert code_revision() == {"version": mmseq.__version__}
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert code_revision() == {"version": mmseq.__version__}  # without a commit
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    found = code_revision()
    assert len(found["commit"]) == 40
    assert found["changed"] is False
    (package / "more.py").write_text("")
    assert code_revision() == found | {"changed": True}


def test_a_run_that_goes_on_with_other_code_says_so(tmp_path):
    path = tmp_path / "code.json"
    assert record_revision(path) == []
    now = json.loads(path.read_text())
    assert record_revision(path) == []
    path.write_text(json.dumps({"version": "0.0.1", "changed": True}))
    assert record_revision(path) == [
        f"code 0.0.1 with changes -> {now.get('commit', now['version'])}"
        + (" with changes" if now.get("changed") else "")
    ]
    assert json.loads(path.read_text()) == now
