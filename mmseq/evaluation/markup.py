"""Small pieces of HTML that the parts of the report share."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

import numpy as np

from mmseq.evaluation.pictures import data_uri, png
from mmseq.evaluation.wording import task_title

Section = tuple[str, str, str]  # id, title, HTML


def table(head: Iterable[str], rows: Iterable[Iterable[str]], *, fit: bool = False) -> str:
    """A table; cells that begin with `>` are numbers, aligned to the right. fit: as wide as what it holds."""

    def cell(text: str, tag: str) -> str:
        return f'<{tag} class="n">{text[1:]}</{tag}>' if text.startswith(">") else f"<{tag}>{text}</{tag}>"

    top = "".join(cell(h, "th") for h in head)
    body = "".join("<tr>" + "".join(cell(c, "td") for c in row) + "</tr>" for row in rows)
    css = ' class="fit"' if fit else ""
    return f'<div class="scroll"><table{css}><tr>{top}</tr>{body}</table></div>'


def image_tag(frame: np.ndarray, alt: str) -> str:
    css = ' class="pixels"' if frame.shape[0] <= 96 else ""
    return f'<img{css} alt="{escape(alt)}" src="{data_uri(png(frame), "image/png")}">'


def split_name(name: str) -> tuple[str, str]:
    task, _, measure = name.partition(".")
    return task, measure or "value"


def task_of(key: str) -> str:
    """The task of a key of the media: `chain.plan` and `caption_human` -> `chain`, `caption`."""
    return key.split(".")[0].removesuffix("_human")


def key_title(key: str) -> str:
    part = f" ({key.split('.', 1)[1]})" if "." in key else ""
    human = ", human video" if key.split(".")[0].endswith("_human") else ""
    return task_title(task_of(key)) + part + human


def duration(value: float) -> str:
    if value < 60:
        return f"{value:.1f} s"
    if value < 3600:
        return f"{int(value // 60)} min {int(value % 60):02d} s"
    return f"{int(value // 3600)} h {int(value % 3600 // 60):02d} min"
