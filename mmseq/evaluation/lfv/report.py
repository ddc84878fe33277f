"""What came out of the cells: a table on the console, and one page with every task (`report.html` beside the rows)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmseq.evaluation.lfv.manifest import LADDER, Config
from mmseq.evaluation.lfv.rows import Row
from mmseq.evaluation.report import environment
from mmseq.evaluation.report.figures import track
from mmseq.evaluation.results import bootstrap, wilson

BASELINE = "model"  # what taught by demonstrations alone does: gains are over it
KEYS = ("method", "floor_of", "demonstrations", "video", "group", "shift")


def summarise(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each method, robot data, video, group and shift: successes over tasks and seeds, and the Wilson interval.

    gain: over `BASELINE` on the same layouts, with its 95 % interval by a bootstrap over layouts; None without one.
    """
    key = lambda row: tuple(getattr(row, name) for name in KEYS)
    out = []
    for one in dict.fromkeys(map(key, rows)):
        chosen = [row for row in rows if key(row) == one]
        wins, count = sum(sum(r.outcomes) for r in chosen), sum(len(r.outcomes) for r in chosen)
        low, high = wilson(wins, count)
        found = dict(zip(KEYS, one)) | {"successes": wins, "episodes": count, "share": wins / count}
        found |= {"low": low, "high": high, "seeds": len({r.seed for r in chosen})}
        found |= {"minutes": max(r.minutes for r in chosen), "gain": _gain(chosen, rows)}
        out.append(found)
    return out


def _gain(chosen: Sequence[Row], rows: Sequence[Row]) -> tuple[float, float, float] | None:
    same = ("demonstrations", "video", "seed", "group", "task", "shift")
    beside = {tuple(getattr(r, n) for n in same): r for r in rows if r.method == BASELINE}
    gains, layouts = [], []
    for row in chosen:
        base = beside.get(tuple(getattr(row, n) for n in same))
        if base is None or row.method == BASELINE or len(base.outcomes) != len(row.outcomes):
            continue
        gains += [float(a) - float(b) for a, b in zip(row.outcomes, base.outcomes)]
        layouts += [f"{row.task} {i}" for i in range(len(row.outcomes))]
    interval = bootstrap(np.array(gains), layouts, seed=0) if gains else None
    return (float(np.mean(gains)), *interval) if interval else None


def named(method: str, floor_of: str | None) -> str:
    """What tables call a method; of a floor also whose policy it was."""
    return f"{method} of {floor_of}" if floor_of else method


def print_summary(rows: Sequence[Row], published: Mapping[str, float]) -> None:
    """A table of `summarise`, and what others have `published`, by method."""
    from rich.console import Console
    from rich.table import Table

    table = Table("method", "demos", "video", "tasks", "shift", "success", "95 %", f"over {BASELINE}", "seeds", "min")
    for row in summarise(rows):
        gain = row["gain"] and "{:+.0%} ({:+.0%} to {:+.0%})".format(*row["gain"])
        table.add_row(
            *(
                named(row["method"], row["floor_of"]),
                str(row["demonstrations"]),
                row["video"],
                row["group"],
                row["shift"],
            ),
            *(f"{row['successes']}/{row['episodes']} = {row['share']:.0%}", f"{row['low']:.0%} to {row['high']:.0%}"),
            *(gain or "", str(row["seeds"]), f"{row['minutes']:.1f}"),
        )
    Console().print(table)
    if published:
        print("published: " + ", ".join(f"{name} {share:.1%}" for name, share in published.items()))


def write_page(path: Path, rows: Sequence[Row], config: Config, command: str) -> None:
    """Write the page, which needs nothing beside it. Raises: DependencyError without jinja2."""
    made = environment(Path(__file__).parent)
    made.globals["bar"] = lambda row: track(
        row["share"], None, 0, 1, "good" if (row["gain"] or (0, 0, 0))[1] > 0 else "plain", (row["low"], row["high"])
    )
    column = lambda r: (named(r.method, r.floor_of), r.demonstrations, r.video, r.shift)
    methods = list(dict.fromkeys(map(column, rows)))
    tasks = list(dict.fromkeys((r.group, r.task) for r in rows))
    wins: dict[tuple, list[bool]] = {}
    for row in rows:
        wins.setdefault((*column(row), row.task), []).extend(row.outcomes)
    made.globals["named"] = named
    page = made.get_template("page_of_cells.html").render(
        groups={group: [r for r in summarise(rows) if r["group"] == group] for group in ("video", "robot")},
        methods=methods,
        tasks=tasks,
        wins=wins,
        config=config,
        ladder=LADDER,
        command=command,
        manifest=rows[0].manifest,
        machine=rows[0].machine,
    )
    path.write_text(page, encoding="utf-8")
