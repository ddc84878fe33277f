"""RunLog: metrics.jsonl always, a readable line to the console now and then, and what the recipe asks for besides."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import resource
import time
import zlib
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from mmseq.data.moments import Sample
from mmseq.errors import DependencyError, require
from mmseq.plugins import find
from mmseq.training.config import TrainConfig
from mmseq.training.validation import Measured

SAID_SAMPLES = 1000  # of a step that was skipped
SAID_MEASURES = 3  # of a task in a line of the console


def memory_gib(device: torch.device) -> float:
    """The most this process has held so far: on the GPU where there is one, else of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Logger(Protocol):
    """Where numbers go besides metrics.jsonl.

    Made with the run's folder, its config and the step that it goes on from, 0 for a new one. A class may name the
    `package` that it needs.
    """

    def write(self, step: int, numbers: dict[str, float]) -> None: ...

    def draw(self, step: int, pictures: dict[str, np.ndarray]) -> None:
        """Pictures uint8 (H, W, 3) by name."""
        ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `<out>/tensorboard`; what an earlier try wrote after the step it resumes from is hidden."""

    package = "tensorboard"

    def __init__(self, out: Path, config: TrainConfig, after: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=after + 1 if after else None)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def draw(self, step: int, pictures: dict[str, np.ndarray]) -> None:
        for name, picture in pictures.items():
            self.writer.add_image(name, picture, step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """wandb; trackio shares its interface. A run goes on when it is resumed, under one identity for its folder.

    Wants no network with WANDB_MODE=offline.
    """

    package = "wandb"

    def __init__(self, out: Path, config: TrainConfig, after: int):
        from omegaconf import OmegaConf

        package = self.package
        self.module = importlib.import_module(package)
        settings = OmegaConf.to_container(OmegaConf.structured(config))
        project = os.environ.get(f"{package.upper()}_PROJECT", "mmseq")
        options: dict[str, Any] = {"project": project, "config": settings, "resume": "allow"}
        if package == "wandb":
            options |= {"name": config.name, "dir": str(out), "id": _run_id(out)}
        else:  # which knows runs by their names alone
            options |= {"name": f"{config.name}-{_run_id(out)}"}
        try:
            self.module.init(**options)
        except Exception as error:  # each has its own kinds: no key, no network, no space
            offline = "set WANDB_MODE=offline, or " if package == "wandb" else ""
            raise DependencyError(
                f"loggers: {package} could not start: {error}", fix=f"{offline}leave {package} out of loggers"
            ) from error

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self.module.log(numbers, step=step)

    def draw(self, step: int, pictures: dict[str, np.ndarray]) -> None:
        self.module.log({name: self.module.Image(picture) for name, picture in pictures.items()}, step=step)

    def close(self) -> None:
        self.module.finish()


class Trackio(Wandb):
    """trackio, which writes to this machine and wants no network."""

    package = "trackio"


def _run_id(out: Path) -> str:
    """One identity for all tries of a run: kept in its folder."""
    path = out / "run_id.txt"
    if not path.is_file():
        path.write_text(os.urandom(4).hex())
    return path.read_text().strip()


def require_loggers(names: list[str]) -> None:
    """Raises: DependencyError for a logger whose package is not installed."""
    for name in names:
        package = getattr(find("loggers", name), "package", None)
        if package is not None:
            require(package, "train" if package == "tensorboard" else package)


def _open_loggers(out: Path, config: TrainConfig, after: int) -> list[Logger]:
    return [find("loggers", name)(out, config, after) for name in config.loggers]


def _open(path: Path, after: int) -> IO[str]:
    kept = path.read_text().splitlines() if path.is_file() and after else []
    kept = [line for line in kept if _step_of(line) <= after]
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(line + "\n" for line in kept))
    partial.replace(path)
    return path.open("a")


def _answers(measures: dict[str, float]) -> str:
    """The first few measures of a task; its bits stand before them."""
    shown = [f"{name} {value:.3g}" for name, value in measures.items() if not name.endswith("bits_per_token")]
    more = [f"{len(shown) - SAID_MEASURES} more"] if len(shown) > SAID_MEASURES else []
    return ", ".join(shown[:SAID_MEASURES] + more)


def _step_of(line: str) -> float:
    """Infinite for a line that was cut short."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _numbers(record: dict[str, Any], prefix: str) -> dict[str, float]:
    """Nested numbers as `prefix/name`."""
    out: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            out |= _numbers(value, f"{prefix}/{key}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            out[f"{prefix}/{key}"] = float(value)
    return out


class RunLog:
    """Metrics of one run. after: the step it goes on from; later lines of an earlier try are dropped.

    Bits per token are averaged by task between two records."""

    def __init__(self, out: Path, config: TrainConfig, tasks: list[str], *, total: int, enabled: bool, after: int = 0):
        self.out, self.tasks, self.total, self.enabled = out, tasks, total, enabled
        self.file = _open(out / "metrics.jsonl", after) if enabled else None
        self.loggers = _open_loggers(out, config, after) if enabled else []
        self.console = Console(highlight=False, soft_wrap=True)
        self._nats = [0.0] * len(tasks)
        self._counts = [0.0] * len(tasks)
        self._records: list[dict[str, Any]] = []
        self._said = 0.0

    def say(self, text: str) -> None:
        if self.enabled:
            self.console.print(text, markup=False)

    def _write(self, kind: str, record: dict[str, Any]) -> None:
        assert self.file is not None
        self.file.write(json.dumps({"kind": kind, **record}, allow_nan=False) + "\n")
        self.file.flush()
        for logger in self.loggers:
            logger.write(record["step"], _numbers({k: v for k, v in record.items() if k != "step"}, kind))

    def step(self, record: dict[str, Any], samples: list[Sample], *, every: int) -> None:
        """Gather one step; write a line every `every` steps. samples: what the step read, of all ranks."""
        if self.file is None:
            return
        bits, counts = record.pop("bits_per_token"), record.pop("targets")
        if not record["skipped"]:
            for i, (b, n) in enumerate(zip(bits, counts)):
                self._nats[i] += b * n
                self._counts[i] += n
        self._records.append(record)
        if record["step"] % every and record["step"] != self.total:
            return
        rows, taken = self._records, [r for r in self._records if not r["skipped"]]
        mean = lambda key: sum(r[key] for r in rows) / len(rows)
        last = {k: v for k, v in record.items() if k not in ("skipped", "spike", "loss") and v is not None}
        if not math.isfinite(last.get("gradient_norm", 0.0)):
            del last["gradient_norm"]  # of a step that was skipped, which has a line of its own
        line = {
            **last,
            **{k: mean(k) for k in ("fill", "tokens_per_s", "tflops", "data_wait_s")},
            **({"loss": sum(r["loss"] for r in taken) / len(taken)} if taken else {}),
            "bits_per_token": {t: n / c for t, n, c in zip(self.tasks, self._nats, self._counts) if c},
            "samples_crc": zlib.crc32(repr(samples).encode()),  # two runs that read the same have the same
        }
        if "mfu" in line:
            line["mfu"] = mean("mfu")
        self._write("train", line)
        self._nats, self._counts, self._records = [0.0] * len(self.tasks), [0.0] * len(self.tasks), []
        if time.perf_counter() - self._said > 5 or record["step"] == self.total:
            self._said = time.perf_counter()
            self._say_progress(line)

    def _say_progress(self, line: dict[str, Any]) -> None:
        left = line["seconds"] / line["step"] * (self.total - line["step"])
        busy = f", MFU {line['mfu']:.1%}" if "mfu" in line else ""
        waiting = line["data_wait_s"] > 0.01
        loss = f"{line['loss']:.3f}" if "loss" in line else "none"
        self.console.print(
            f"step {line['step']}/{self.total}  loss {loss}  {line['tokens_per_s'] / 1e3:.1f}k tokens/s"
            f"{busy}, {line['fill']:.1%} useful  "
            + (f"waiting {line['data_wait_s']:.2f} s for data  " if waiting else "")
            + f"{line['memory_gib']:.1f} GiB  rate {line['learning_rate']:.2g}  {left / 60:.1f} min left  bits/token: "
            + ", ".join(f"{t} {b:.2f}" for t, b in line["bits_per_token"].items()),
            markup=False,
        )

    def unusual(self, step: int, record: dict[str, Any], samples: list[str]) -> None:
        """A step that was skipped, or a spike that was not, with what it was made of."""
        if self.file is None:
            return
        reason = record["skipped"] or "spike"
        what = "skipped" if record["skipped"] else "not skipped"
        found = {"reason": reason, "loss": str(record["loss"]), "gradient_norm": str(record["gradient_norm"])}
        self._write(what.replace(" ", "_"), {"step": step, **found, "samples": samples[:SAID_SAMPLES]})
        self.say(
            f"step {step} {what}: its {reason} is out of bounds (loss {found['loss']}, gradient norm "
            f"{found['gradient_norm']}); metrics.jsonl names its {len(samples)} samples, the first is {samples[0]}"
        )

    def validation(self, step: int, measured: Measured) -> None:
        """A line, the pictures as PNG and to the loggers, and a line to the console."""
        if self.file is None:
            return
        record = {"bits_per_token": measured.bits_per_token, "teacher_forced": measured.teacher_forced}
        self._write("validation", {"step": step, **record})
        if measured.pictures:
            folder = self.out / "validation" / f"step_{step:08d}"
            folder.mkdir(parents=True, exist_ok=True)
            for name, picture in measured.pictures.items():
                Image.fromarray(picture).save(folder / (re.sub(r"[^\w.-]+", "_", name) + ".png"))
            for logger in self.loggers:
                logger.draw(step, {f"validation/pictures/{n}": p for n, p in measured.pictures.items()})
        self.say(f"step {step}, held out:")
        for task, bits in measured.bits_per_token.items():
            self.say(f"  {task:<24}{bits:8.3f} bits/token  {_answers(measured.teacher_forced.get(task, {}))}".rstrip())

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        for logger in self.loggers:
            logger.close()
