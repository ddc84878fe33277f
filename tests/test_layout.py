"""The layout that everything relies on: what may stand where, what is shipped, and who may import whom."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mmseq.streams import STREAMS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mmseq"
PLAIN_FOLDERS = ("tokenizers", "train", "serve", "data_mixes", "tests")
HEAVY = ("deepspeed", "lerobot", "mujoco", "fastapi", "torch", "torchvision", "transformers", "av", "pyarrow")

# the nouns, and the settings that anything may read
NOUNS = {"errors", "config", "fields", "files", "episode", "embodiment", "tasks", "vocabulary", "sequence", "packing"}
NOUNS |= {"grammar", "layout", "statistics", "mp4", "streams", "inputs", "plugins", "reading"}
# what the modules of a part may import when they are loaded, beside their own part; tests of import
# direction skip imports inside functions, which are how a lower part reaches for a higher one on demand
ALLOWED = {
    "nouns": set(),
    "tokenization": {"nouns"},
    "model": {"nouns", "tokenization"},
    "data": {"nouns", "tokenization", "model"},
    "training": {"nouns", "tokenization", "model", "data"},
    "inference": {"nouns", "tokenization", "model"},
    "serving": {"nouns", "tokenization", "model", "inference"},
    "simulation": {"nouns"},
    "recipes": set(),
    "demo": {"nouns", "data", "evaluation", "progress"},
    "cli": {"nouns"},
    "evaluation": {"nouns", "tokenization", "model", "inference", "simulation", "labelling"},
    "evaluation.lfv": {"nouns", "data", "labelling", "serving", "simulation", "evaluation"},
    "labelling": {"nouns", "tokenization", "model", "data", "inference"},
    "bench": {
        "nouns",
        "tokenization",
        "model",
        "data",
        "training",
        "inference",
        "progress",
        "evaluation",
        "recipes",
        "testing",
    },
}


def python(code: str, *, root: Path = ROOT, cwd: Path | None = None) -> str:
    """The output of a fresh interpreter that has the root on its path, as a multi-node launcher sets it."""
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_root_on_the_path_does_not_shadow_hugging_face_tokenizers(tmp_path):
    code = "import tokenizers; print(tokenizers.__file__, hasattr(tokenizers, 'Tokenizer'))"
    assert python(code).endswith("True")
    # and it would: with an __init__.py the folder of that name wins
    (tmp_path / "tokenizers").mkdir()
    (tmp_path / "tokenizers" / "__init__.py").write_text("")
    assert python(code, root=tmp_path).endswith("False")


@pytest.mark.parametrize("folder", PLAIN_FOLDERS)
def test_plain_folders_are_no_packages(folder):
    own = [ROOT / "serve/client/mmseq_client", ROOT / "serve/lerobot/lerobot_policy_mmseq"]  # distributions
    assert [p for p in (ROOT / folder).rglob("__init__.py") if p.parent not in own] == []


def test_no_module_is_named_like_the_folder_of_tokenizers():
    assert not (PACKAGE / "tokenizers").exists()
    assert not (PACKAGE / "tokenizers.py").exists()


def test_every_folder_of_the_package_is_a_package():
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_the_wheel_holds_the_package_and_its_data_and_nothing_else(tmp_path):
    copy = tmp_path / "source"
    shutil.copytree(PACKAGE, copy / "mmseq", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    for name in ("README.md", "LICENSE"):
        (copy / name).write_bytes((ROOT / name).read_bytes() if (ROOT / name).exists() else b"to come\n")
    for folder in PLAIN_FOLDERS:
        (copy / folder).mkdir()
        (copy / folder / "recipe.py").write_text("")
        (copy / folder / "recipe.yaml").write_text("a: 1\n")
    python(f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})", cwd=copy)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"mmseq"}
    shipped = {"*.py", "*.yaml", "*.json", "*.html", "*.css", "*.js"}
    wanted = {path.relative_to(ROOT).as_posix() for pattern in shipped for path in PACKAGE.rglob(pattern)}
    assert wanted - names == set()


def test_import_is_quick_and_loads_nothing_heavy():
    code = (
        "import sys, time; start = time.perf_counter(); import mmseq; took = time.perf_counter() - start\n"
        f"print(took, *[name for name in {HEAVY} if name in sys.modules])"
    )
    took, *loaded = python(code).split()
    print(f"import mmseq: {float(took):.2f} s")
    assert loaded == []
    assert float(took) < 5  # it is 0.1 s; a loaded machine may take longer


def part_of(module: str) -> str:
    """The part of the package that `mmseq.<...>` belongs to; a module of the top level that is no noun is its own, and
    so is a folder below another that has a line in ALLOWED."""
    names = module.split(".")[1:3]
    name = ".".join(names) if ".".join(names) in ALLOWED else "".join(names[:1])
    return "nouns" if name in NOUNS or not name else name


def imports_when_loaded(tree: ast.Module, module: str) -> set[str]:
    """The modules of mmseq that a file imports outside functions and `if TYPE_CHECKING`."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(filter(None, [*module.split(".")[: -node.level], base]))
            found.add(base)
            found.update(f"{base}.{alias.name}" for alias in node.names if base == "mmseq")
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    # `from mmseq import Episode` names nouns; modules below mmseq are lower case
    return {name for name in found if name.startswith("mmseq.") and name.split(".")[1].islower()}


def test_imports_point_one_way():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        own = part_of(".".join(parts if parts[1:] != ("__init__",) else parts[:1]))
        allowed = ALLOWED.get(own)
        for name in sorted(imports_when_loaded(ast.parse(path.read_text()), ".".join(parts))):
            other = part_of(name)
            if other == "cli" and own not in ("cli", "__main__"):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}: nothing imports the command line")
            elif allowed is not None and other != own and other not in allowed:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}: {own} may import {sorted(allowed)}")
    assert wrong == []


def test_the_reader_of_imports_sees_what_it_must():
    source = (
        "import mmseq.data.video\nfrom mmseq import Episode, tasks\nfrom . import shards\nfrom mmseq.model import x\n"
        "if TYPE_CHECKING:\n    import mmseq.cli\ntry:\n    import mmseq.serving\nexcept ImportError: pass\n"
        "def f():\n    import mmseq.training\n"
    )
    found = imports_when_loaded(ast.parse(source), "mmseq.data.importing")
    assert found == {"mmseq.data.video", "mmseq.tasks", "mmseq.data", "mmseq.model", "mmseq.serving"}


def test_every_folder_has_its_place_in_the_direction_of_imports():
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert folders - {"testing"} - set(ALLOWED) == set(), "a new folder needs a line in ALLOWED"


def _texts(node: ast.AST) -> set[str]:
    """The texts that an expression spells out, those inside of its tuples, lists and sets too."""
    if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
        return set().union(*map(_texts, node.elts))
    return {node.value} if isinstance(node, ast.Constant) and isinstance(node.value, str) else set()


def stream_literals(tree: ast.AST) -> list[int]:
    """Lines of tuples, lists, sets and dictionaries that spell out several streams by their names, nested or not."""
    lines = []
    for node in ast.walk(tree):
        named = _texts(node)
        if isinstance(node, ast.Dict):  # a table; what fills streams with values is none, nor are names of arrows
            table = all(isinstance(v, ast.Constant) and "->" not in str(v.value) for v in node.values)
            named = set().union(*(_texts(key) for key in node.keys if key is not None)) if table else set()
        lines += [node.lineno] if len(named & set(STREAMS)) > 1 else []
    return lines


def stream_comparisons(tree: ast.AST) -> dict[int, set[str]]:
    """Lines that compare something with the name of a stream, and the names."""
    found: dict[int, set[str]] = {}
    for node in ast.walk(tree):
        sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
        sides = [node.value] if isinstance(node, ast.MatchValue) else sides
        if named := set().union(*map(_texts, sides)) & set(STREAMS):
            found[node.lineno] = found.get(node.lineno, set()) | named
    return found


# What is really about one stream, or about a word of another format that happens to be the name of one: where (the
# beginning of a path), the words, and why. Whatever holds for other streams too belongs into a field of their table.
ABOUT_ONE = [
    ("data/lerobot", {"action"}, "whether an action is absolute or a difference is asked of that stream alone"),
    ("data/hdf5", {"action"}, "actions of these formats lie beside the states, with lengths and names of their own"),
    ("data/lerobot", {"image", "video"}, "kinds of columns in meta/info.json"),
    ("data/hdf5_layout", {"text"}, "a kind of column"),
    ("data/mapping", {"text"}, "a kind of column"),
    ("data/mapping", {"action", "plan", "success"}, "words in the names of columns"),
    ("data/mapping", {"image"}, "`image` alone names no camera"),
    ("data/contract", {"action"}, "max_step limits what moves the robot"),
    ("episode", {"text", "plan"}, "these two are fields of an episode"),
    ("evaluation/", {"action"}, "baselines and counterfactuals of what the robot does"),
    ("evaluation/", {"text", "plan", "answer", "video", "latent"}, "what a measure or a report says of that one"),
    ("inference/decoding", {"action"}, "what is committed to the robot already are actions"),
    ("serving/", {"action"}, "what is sent to the motors, and gated"),
    ("serving/policy", {"text"}, "whether the prompt is read"),
    ("serving/net/websocket", {"text"}, "a kind of message"),
    ("serving/keys", {"image"}, "what LeRobot calls the only camera"),
    ("serving/observed", {"demo"}, "a demonstration comes under keys of its own"),
    ("simulation/base", {"proprio"}, "LeRobot calls it the state"),
    ("grammar", {"image"}, "nothing else has an `@end`"),
    ("testing/", {"action"}, "data that are made up"),
]


def test_streams_are_listed_in_their_table_and_nowhere_else():
    """What exists is decided in `streams.py`: a list elsewhere would have to be found again for each new stream."""
    found = {
        f"{path.relative_to(ROOT)}:{line}"
        for path in PACKAGE.rglob("*.py")
        if path.name != "streams.py"
        for line in stream_literals(ast.parse(path.read_text()))
    }
    assert found == set()


def test_a_stream_is_compared_with_by_its_name_only_where_it_is_about_that_one():
    """`row.clock == "commanded"` holds for a stream that comes tomorrow, `stream == "action"` does not."""
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        for line, words in stream_comparisons(ast.parse(path.read_text())).items() if name != "streams.py" else ():
            for word in sorted(words):
                said = any(name.startswith(where) and word in about for where, about, _ in ABOUT_ONE)
                wrong += [] if said else [f"{name}:{line} names {word!r}: ask its row, or say why in ABOUT_ONE"]
    assert wrong == []
    assert all(why for _, _, why in ABOUT_ONE)


def test_the_reader_of_literals_sees_what_it_must():
    source = (
        "a = ('action', 'proprio')\nb = ['text', x]\nc = {'image': 1, 'video': 2}\nd = {'plan', 'other', 'answer'}\n"
    )
    source += "e = {'image': frames, 'action': f(x)}\nf = {'plan': 'text -> plan', 'success': '-> success'}\n"
    source += "g = (('text', 'texts'), ('plan', 'plans'))\nh = [('text', 'action[2]'), (x, 'other')]\n"
    assert stream_literals(ast.parse(source)) == [1, 3, 4, 7]


def test_the_reader_of_comparisons_sees_what_it_must():
    source = "a = s.stream == 'action'\nb = 'motion' != s\nc = s in ('text', 'other')\nd = s == 'other'\n"
    source += "match s:\n    case 'plan' | x:\n        pass\n"
    found = stream_comparisons(ast.parse(source))
    assert found == {1: {"action"}, 2: {"motion"}, 3: {"text"}, 6: {"plan"}}
