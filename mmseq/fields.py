"""What the fields of a dataclass are: the comment beside each, where it is declared.

    minutes: float = 10.0  # about how long it may take

A longer text stands in the lines above its field. The command's options and docs/reference.md are made of these.
"""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize
from dataclasses import MISSING, fields
from functools import cache
from typing import Any


@cache
def field_texts(schema: type) -> dict[str, str]:
    """The text of every field of a dataclass, those of its bases first; empty where none is written."""
    texts: dict[str, str] = {}
    for base in reversed(schema.__mro__):
        if "__dataclass_fields__" in vars(base):
            texts |= _own_texts(base)
    return {f.name: texts.get(f.name, "") for f in fields(schema)}


def default_of(schema: type, name: str) -> Any:
    """A field's default; MISSING where it has to be given."""
    field = next(f for f in fields(schema) if f.name == name)
    value = field.default if field.default_factory is MISSING else field.default_factory()
    return MISSING if value == "???" else value


def _own_texts(schema: type) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(schema))
    lines = source.splitlines()
    comments = {  # line -> its comment
        token.start[0]: token.string.lstrip("#").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    texts = {}
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno
            while first - 1 in comments and lines[first - 2].lstrip().startswith("#"):
                first -= 1
            parts = [comments[n] for n in (*range(first, node.lineno), node.end_lineno) if n in comments]
            texts[node.target.id] = " ".join(parts)
    return texts
