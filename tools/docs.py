"""Writes what the documentation says of the code: docs/reference.md, and the files in docs/architecture.md.

make docs                          or: python tools/docs.py

The settings are the fields of the dataclasses that hold them, the files are their own first sentences;
tests/test_reference.py says when this has to run again.
"""

from __future__ import annotations

import ast
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from inspect import get_annotations
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mmseq.fields import default_of, field_texts

ROOT = Path(__file__).parents[1]
REFERENCE, ARCHITECTURE = ROOT / "docs/reference.md", ROOT / "docs/architecture.md"
BEGIN, END = "<!-- files: written by `make docs` -->\n", "<!-- end of files -->\n"
FOLDERS = ("mmseq", "tokenizers", "data_mixes", "train", "serve", "tools")
COMMENTS = {  # how a file says what it is for, beside the docstring of Python
    ".yaml": r"^# (.+)$",
    ".sh": r"^# (.+)$",
    ".sbatch": r"^# (.+)$",
    ".service": r"^# (.+)$",
    ".css": r"^/\* (.+?) \*/",
    ".html": r"^\{# (.+?) #\}",
    ".md": r"^# (.+)$",
}
BENCHES = ("throughput", "loader", "loss", "packing", "decode", "chunks", "serve")
SCHEMAS = {  # section -> module, class, where it is written
    "Training": ("mmseq.training.config", "TrainConfig", "`mmseq train RECIPE key=value`"),
    "Data mix": ("mmseq.data.mixture", "MixConfig", "a mix, such as `data_mixes/demo.yaml`"),
    "Tokenizers": ("mmseq.tokenization.recipe", "TokenizerConfig", "`mmseq tokenizer train RECIPE key=value`"),
    "Server": ("mmseq.serving.launch", "ServeSettings", "`mmseq serve --config FILE key=value`"),
    "Fine-tuning": ("mmseq.training.finetune", "FinetuneConfig", "options of `mmseq finetune`"),
    "Closed loop": ("mmseq.evaluation.closed_loop", "ClosedLoopConfig", "options of `mmseq eval`"),
    "Demo": ("mmseq.demo.config", "DemoConfig", "options of `mmseq demo`"),
    **{f"Bench: {name}": (f"mmseq.bench.{name}", "Config", f"`mmseq bench {name} key=value`") for name in BENCHES},
}


def settings(schema: type, prefix: str = "") -> Iterator[tuple[str, Any, Any, str]]:
    """(key, type, default, text) of every setting, those of groups behind a dot; what a schema inherits comes last."""
    hints, texts = get_type_hints(schema), field_texts(schema)
    own = get_annotations(schema)
    for field in sorted(fields(schema), key=lambda field: field.name not in own):
        key, hint = prefix + field.name, hints[field.name]
        parts = [hint, *get_args(hint)]
        group = next((part for part in parts if is_dataclass(part)), None)
        if group is None or texts[field.name]:
            yield key, hint, default_of(schema, field.name), texts[field.name]
        if group is not None:
            yield from settings(group, key + {dict: ".NAME.", list: "[]."}.get(get_origin(hint), "."))


def schemas() -> Iterator[tuple[str, str, type]]:
    """(section, where it is written, dataclass)"""
    for section, (module, name, where) in SCHEMAS.items():
        yield section, where, getattr(import_module(module), name)


def reference() -> str:
    parts = [
        "# Settings\n\nWritten by `make docs` from the fields that hold them. An unknown key is an error. A setting "
        "without a default is needed, or its text says what is taken.\n"
    ]
    for section, where, schema in schemas():
        rows = [
            f"| `{key}` | {_type(hint)} | {_default(default)} | {text.replace('|', chr(92) + '|')} |"
            for key, hint, default, text in settings(schema)
        ]
        head = "| setting | type | default | |\n| --- | --- | --- | --- |\n"
        parts.append(f"## {section}\n\n{where}\n\n{head}" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _type(hint: Any) -> str:
    inner = [a for a in get_args(hint) if a not in (type(None), ...)]
    if get_origin(hint) is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if get_origin(hint) in (types.UnionType, typing.Union):
        return _type(inner[0])
    if get_origin(hint) in (list, tuple):
        return "list" if is_dataclass(inner[0]) else f"list of {_type(inner[0])}"
    if get_origin(hint) is dict:
        return "map" if is_dataclass(inner[1]) else f"map to {_type(inner[1])}"
    return "group" if is_dataclass(hint) else hint.__name__


def _default(value: Any) -> str:
    if value is MISSING or value is None or value == [] or value == {}:
        return ""
    return (
        f"`{str(value).lower()}`"
        if isinstance(value, bool)
        else f"`{list(value) if isinstance(value, tuple) else value}`"
    )


def first_sentence(path: Path) -> str:
    """What a file says it is for; empty where it says nothing."""
    text = path.read_text()
    if path.suffix == ".py":
        found = ast.get_docstring(ast.parse(text)) or ""
    else:
        match = re.search(COMMENTS.get(path.suffix, r"^# (.+)$"), text, re.MULTILINE)
        found = match[1] if match else ""
    sentence = re.match(r".*?(?<! al)[.!?](?=\s|$)", " ".join(found.split("\n\n")[0].split()))
    return (sentence[0] if sentence else found.split("\n")[0]).rstrip(".:")


def listed(folder: Path) -> list[Path]:
    """The files of a folder that say what they are for, and the folders that hold some; files first."""
    kept = [p for p in sorted(folder.iterdir()) if not p.name.startswith((".", "__pycache__")) and p.suffix != ".json"]
    return [p for p in kept if p.is_file() and ((p.suffix == ".py" and p.stat().st_size) or first_sentence(p))] + [
        p for p in kept if p.is_dir() and not p.name.endswith(".egg-info") and listed(p)
    ]


def tree() -> str:
    lines = []

    def walk(folder: Path, depth: int) -> None:
        lines.append("  " * depth + folder.name + "/")
        for path in listed(folder):
            if path.is_dir():
                walk(path, depth + 1)
            else:
                lines.append(f"{'  ' * (depth + 1) + path.name:<30} {first_sentence(path)}")

    for name in FOLDERS:
        walk(ROOT / name, 0)
    return "```\n" + "\n".join(line.rstrip() for line in lines) + "\n```\n"


def architecture() -> str:
    before, _, rest = ARCHITECTURE.read_text().partition(BEGIN)
    return before + BEGIN + "\n" + tree() + "\n" + END + rest.partition(END)[2]


def main() -> None:
    REFERENCE.write_text(reference())
    ARCHITECTURE.write_text(architecture())


if __name__ == "__main__":
    main()
