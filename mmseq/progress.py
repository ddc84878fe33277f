"""Progress of long work: a bar with a rate and the time left; in a log file, a line every ten seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LINE_EVERY_S = 10.0


@contextmanager
def progress(title: str, unit: str) -> Iterator[Callable[..., None]]:
    """Gives a function (done, total or None, note="") to call as often as you like.

    unit: what is counted, in the plural: `episodes`.
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
        )
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=None, rate="")
            started, stage = time.monotonic(), ""

            def update(done: int, total: int | None = None, note: str = "") -> None:
                nonlocal started, stage
                if note != stage:  # another stage has its own rate
                    started, stage = time.monotonic() if stage else started, note
                    bar.reset(task)
                rate = done / max(time.monotonic() - started, 1e-9)
                bar.update(task, completed=done, total=total, rate=f"{rate:.1f} {unit}/s  {note}".rstrip())

            yield update
        return
    started = said = time.monotonic()
    stage = ""

    def line(done: int, total: int | None = None, note: str = "") -> None:
        nonlocal started, said, stage
        now = time.monotonic()
        if note != stage:  # another stage has its own rate
            stage, started = note, now if stage else started
        if now - said < LINE_EVERY_S and done != total:
            return
        said = now
        rate = done / max(now - started, 1e-9)
        left = f", {(total - done) / rate:.0f} s left" if total and rate else ""
        text = f"{title}: {done}{f' of {total}' if total else ''} {unit}, {rate:.1f}/s{left}"
        print(f"{text}  {note}".rstrip(), file=sys.stderr, flush=True)

    yield line
