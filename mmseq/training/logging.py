"""RunLog: metrics.jsonl always, and a readable line to the console now and then."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import IO, Any


def _open(path: Path, after: int) -> IO[str]:
    kept = path.read_text().splitlines() if path.is_file() else []
    kept = [line for line in kept if line.endswith("}") and json.loads(line)["step"] <= after]
    path.write_text("".join(line + "\n" for line in kept))
    return path.open("a")


class RunLog:
    """Metrics of one run. after: the step it goes on from; later lines of an earlier try are dropped.

    Bits per token are averaged by task between two records."""

    def __init__(self, out: Path, tasks: list[str], *, total: int, enabled: bool, after: int = 0):
        self.tasks, self.total, self.enabled = tasks, total, enabled
        self.file = _open(out / "metrics.jsonl", after) if enabled else None
        self._nats = [0.0] * len(tasks)
        self._counts = [0.0] * len(tasks)
        self._records: list[dict[str, Any]] = []
        self._said = 0.0

    def say(self, text: str) -> None:
        if self.enabled:
            print(text, flush=True)

    def step(self, record: dict[str, Any], *, every: int) -> None:
        """Gather one step; write a line every `every` steps."""
        if self.file is None:
            return
        bits, counts = record.pop("bits_per_token"), record.pop("targets")
        for i, (b, n) in enumerate(zip(bits, counts)):
            self._nats[i] += b * n
            self._counts[i] += n
        self._records.append(record)
        if record["step"] % every and record["step"] != self.total:
            return
        rows = self._records
        mean = lambda key: sum(r[key] for r in rows) / len(rows)
        line = {
            **record,
            **{k: mean(k) for k in ("loss", "fill", "tokens_per_s", "data_wait_s")},
            "bits_per_token": {t: n / c for t, n, c in zip(self.tasks, self._nats, self._counts) if c},
        }
        self.file.write(json.dumps({"kind": "train", **line}) + "\n")
        self.file.flush()
        self._nats, self._counts, self._records = [0.0] * len(self.tasks), [0.0] * len(self.tasks), []
        if time.perf_counter() - self._said > 5 or record["step"] == self.total:
            self._said = time.perf_counter()
            left = record["seconds"] / record["step"] * (self.total - record["step"])
            worst = ", ".join(f"{t} {b:.2f}" for t, b in line["bits_per_token"].items())
            self.say(
                f"step {record['step']}/{self.total}  loss {line['loss']:.3f}  "
                f"{line['tokens_per_s'] / 1e3:.1f}k tokens/s  "
                f"fill {line['fill']:.1%}  {left / 60:.1f} min left  bits/token: {worst}"
            )

    def validation(self, step: int, bits: dict[str, float]) -> None:
        if self.file is None:
            return
        self.file.write(json.dumps({"kind": "validation", "step": step, "bits_per_token": bits}) + "\n")
        self.file.flush()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
