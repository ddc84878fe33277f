"""Files on disk that others have to read, and which code wrote them."""

from __future__ import annotations

import json
import stat
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mmseq

if TYPE_CHECKING:
    from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file with the permissions of any other new file. Raises: whatever safetensors does."""
    from safetensors.torch import save_file

    path.unlink(missing_ok=True)
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)  # what the umask and the folder give
    save_file(dict(tensors), path, metadata=metadata)  # which moves a file of 0600 there
    path.chmod(mode)


def code_revision() -> dict[str, Any]:
    """Which code runs: its `version`, and from a checkout its `commit` and whether files are `changed` since."""
    found: dict[str, Any] = {"version": mmseq.__version__}
    root = Path(mmseq.__file__).parents[1]
    if (root / ".git").exists():
        git = ["git", "-C", str(root), "--no-optional-locks"]
        try:
            run = lambda *words: subprocess.run([*git, *words], capture_output=True, text=True, check=True).stdout
            found["commit"] = run("rev-parse", "HEAD").strip()
            found["changed"] = bool(run("status", "--porcelain").strip())
        except (OSError, subprocess.CalledProcessError):  # no git here, or not our repository to ask
            pass
    return found


def record_revision(path: Path) -> list[str]:
    """Write which code runs to a JSON file. Returns `code OLD -> NEW` where another code wrote it before."""
    now = code_revision()
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError):  # the first time, or nothing that one can compare with
        before = now
    path.write_text(json.dumps(now) + "\n")
    return [] if before == now else [f"code {_named(before)} -> {_named(now)}"]


def _named(code: dict[str, Any]) -> str:
    return f"{code.get('commit') or code.get('version')}{' with changes' if code.get('changed') else ''}"
