"""The examples in README.md and docs/ run, against a tiny model in a folder that looks like a demo's.

Every ```python block runs, in order, in one namespace per page, unless the line before it is
`<!-- not run: why -->`. A ```bash block runs when the line before it is `<!-- tested -->`.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mmseq.data.tokenize import tokenize_mix
from mmseq.testing import tiny

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "serve").rglob("*.md"))]
BLOCK = re.compile(r"^(?P<mark><!--[^\n]*-->\n)?```(?P<kind>python|bash)\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)
MIX = """
name: demo
sources: {robot: {path: episodes/robot}, human: {path: episodes/human}}
tasks: [{task: "text, image, proprio -> action[4]"}, {task: "video[4] -> text"}]
holdout: 0.3
"""


def blocks(page: Path) -> list[tuple[str, str]]:
    """(kind, code) of what is to run on a page, in order."""
    out = []
    for found in BLOCK.finditer(page.read_text()):
        mark, kind = found["mark"] or "", found["kind"]
        if ("tested" in mark) if kind == "bash" else ("not run:" not in mark):
            out.append((kind, found["code"]))
    return out


def links(page: Path) -> list[str]:
    return [
        target
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
        if "://" not in target and target != "docs/demo.png"  # the picture comes from a run of the demo
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """What `mmseq demo` leaves behind, in miniature."""
    root = tmp_path_factory.mktemp("docs")
    demo = root / "runs" / "demo"
    tiny.write_episodes(demo / "data/episodes/robot", [tiny.episode(i) for i in range(8)], (tiny.embodiment(),))
    tiny.write_episodes(demo / "data/episodes/human", [tiny.video(i) for i in range(8)])
    (demo / "mix.yaml").write_text(MIX)
    bundle = tiny.tokenizers()
    bundle.save(demo / "tokenizers")
    model = tiny.model(bundle)
    model.tasks = {"policy": "text, image, proprio -> action[2]"}
    model.save_pretrained(demo / "checkpoint")
    tokenize_mix(demo / "mix.yaml", demo / "tokens", bundle, root=demo / "data")
    tiny.language_model(root / "models/SmolLM2-135M")
    for folder in ("train", "data_mixes", "tokenizers"):
        shutil.copytree(ROOT / folder, root / folder)
    programs = root / "bin"
    programs.mkdir()
    for program, module in (("mmseq", "mmseq"), ("torchrun", "torch.distributed.run")):
        (programs / program).write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {module} "$@"\n')
        (programs / program).chmod(0o755)
    return root


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_the_examples_of_a_page_run(page, place, monkeypatch):
    monkeypatch.chdir(place)
    environment = os.environ | {
        "PATH": f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }
    names: dict = {"__name__": "__main__"}
    for kind, code in blocks(page):
        if kind == "python":
            exec(compile(code, str(page), "exec"), names)
        else:
            done = subprocess.run(
                ["bash", "-euc", code], env=environment, capture_output=True, text=True, check=False, timeout=300
            )
            assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    assert [target for target in links(page) if not (page.parent / target).exists()] == []


def test_the_table_of_tasks_says_what_the_names_mean():
    from mmseq.grammar import ALIASES

    for page in (ROOT / "README.md", ROOT / "docs" / "grammar.md"):
        rows = dict(re.findall(r"^\| `(\w+)` \| `([^`]*->[^`]*)` \|", page.read_text(), re.MULTILINE))
        assert rows.items() <= ALIASES.items(), page
        assert len(rows) >= 15
    assert rows == ALIASES  # docs/grammar.md has them all
