"""Demo: the whole loop with the real parts, small enough for two CPU cores, ending in an HTML report.

mmseq demo                                     Meta-World: record, train, serve, drive, measure
mmseq demo --data PATH_TO_LEROBOT_V3           the same on your own robot's data, without the simulator

runs/demo/data/{lerobot,human,episodes}   tokenizers/   tokens/   mix.yaml
         train/   checkpoint/   report.html   results.json
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from mmseq.config import load_config, to_yaml
from mmseq.data.importing import EpisodeShardReader, import_episodes
from mmseq.data.mixture import MixConfig, Mixture, held_out, least_holdout, load_mix, save_mix, task_name
from mmseq.data.tokenize import tokenize_mix
from mmseq.episode import Episode
from mmseq.errors import ConfigError, DataError
from mmseq.progress import progress
from mmseq.tasks import Task

RECIPES = Path(__file__).parent / "recipes"
# Shares of --minutes; the rest is reading, writing and measuring.
TRAIN_SHARE = 0.52
ROBOT_EPISODES = 100  # per task, at 10 minutes
HUMAN_VIDEOS = 24
VISION_STEPS = 800


@dataclass(kw_only=True)
class DemoConfig:
    """out: the run's folder; what an earlier demo left there is replaced. minutes: about how long
    it may take. tasks: Meta-World tasks (default: six in which the image matters). data: a LeRobot v3
    dataset to use instead of the simulator. episodes: closed-loop episodes per task."""

    out: str = "runs/demo"
    seed: int = 0
    minutes: float = 10.0
    tasks: list[str] = field(default_factory=list)
    data: str | None = None
    episodes: int = 20
    execute: int = 1

    def check(self) -> None:
        if not 0.5 <= self.minutes <= 24 * 60:
            raise ConfigError(f"minutes is {self.minutes:g}", fix="give at least 0.5 (10 is the intended size)")
        if not 0 <= self.seed < 1 << 31:
            raise ConfigError(f"seed is {self.seed}", fix="give 0 to 2147483647")
        if self.episodes < 1:
            raise ConfigError(f"episodes is {self.episodes}", fix="give at least 1")
        if self.data and self.tasks:
            raise ConfigError(
                "tasks are of the simulator and do not go together with data", fix="leave one of them out"
            )


class Stages:
    """Prints what is being done, with a rate and a time left, and keeps how long each stage took."""

    def __init__(self) -> None:
        self.console = Console(stderr=False, highlight=False)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[int, int], None]]:
        began = time.perf_counter()
        self.console.print(f"[bold]{name}[/bold]")
        with progress("  ", "items") as update:
            yield update
        self.seconds[name] = time.perf_counter() - began
        self.console.print(f"   {self.seconds[name]:.0f} s")


def run_demo(config: DemoConfig) -> Path:
    """Run everything and return the path of the report.

    Raises: MMSeqError before anything is written when the configuration or the data cannot work.
    """
    config.check()
    stages = Stages()
    out = Path(config.out)
    tasks = _check_tasks(config)
    if config.data:
        from mmseq.data.sources import open_source

        if len(open_source(config.data)) < 4:
            raise DataError(f"{config.data} has fewer than four episodes", fix="one part is held out: give more")
        if Path(config.data).resolve().is_relative_to(out.resolve()):
            raise DataError(f"{config.data} lies in {out}, which this run replaces", fix="choose another --out")
    _clear(out)
    scale = min(1.0, config.minutes / 10)
    if config.data:
        sources = {"robot": Path(config.data)}
    else:
        sources = _record(config, tasks, out, scale, stages)
    with stages.stage("Importing episodes") as update:
        for name, path in sources.items():
            size = 64 if config.data else None
            import_episodes(path, out / "data/episodes" / name, size=size, name=name, say=print, on_progress=update)
    mix = _mix(config, out, list(sources))
    _tokenize(config, out, mix, scale, stages)
    _train(config, out, stages)
    return _measure(config, tasks, out, mix, stages)


def _check_tasks(config: DemoConfig) -> list[str]:
    if config.data:
        return []
    from mmseq.simulation.experts import DEMO_TASKS, task_language

    tasks = list(config.tasks or DEMO_TASKS)
    for task in tasks:
        task_language(task)
    return tasks


def _clear(out: Path) -> None:
    """Make room for this run, and touch nothing that a demo did not make."""
    if out.exists() and any(out.iterdir()) and not (out / "demo.json").is_file():
        raise DataError(f"{out} exists and was not made by a demo", fix="choose another --out, or remove it yourself")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / "demo.json").write_text(json.dumps({"command": shlex.join(sys.argv)}) + "\n")


def _record(config: DemoConfig, tasks: list[str], out: Path, scale: float, stages: Stages) -> dict[str, Path]:
    from mmseq.simulation.dataset import write_lerobot
    from mmseq.simulation.experts import DEMO_SPREAD, VIDEO_TASKS
    from mmseq.simulation.human import write_human_videos
    from mmseq.simulation.record import record_episodes

    robot, human = out / "data/lerobot", out / "data/human"
    count = max(4, round(ROBOT_EPISODES * scale))
    with stages.stage(f"Recording {count} expert episodes of {len(tasks)} tasks as a LeRobot v3 dataset") as update:
        episodes = record_episodes(tasks, count, seed=config.seed, spread=DEMO_SPREAD, on_progress=update)
        write_lerobot(episodes, robot)
    others = [t for t in VIDEO_TASKS if t not in tasks][:4]
    videos = max(2, round(HUMAN_VIDEOS * scale))
    with stages.stage(
        f"Recording {videos} human videos of {len(tasks) + len(others)} tasks, without actions"
    ) as update:
        write_human_videos(
            human, [*tasks, *others], videos, seed=config.seed + 1, spread=DEMO_SPREAD, on_progress=update
        )
    return {"robot": robot, "human": human}


def _mix(config: DemoConfig, out: Path, sources: list[str]) -> MixConfig:
    """The demo's mix, cut to what this data can fill."""
    mix = load_mix(RECIPES / "demo_mix.yaml")
    mix.sources = {name: mix.sources[name] for name in sources}
    readers = {name: EpisodeShardReader(out / "data/episodes" / name) for name in sources}
    notes = [note for reader in readers.values() for note in reader.metadata]
    if config.data:
        shortest = min(note["length"] for note in notes)
        for task in mix.tasks:  # a chunk may take at most half of the shortest episode
            limit = max(1, shortest // 2)
            for number in (8, 4, 2):
                task.task = task.task.replace(f"[{number}]", f"[{min(number, limit)}]")
                task.task = task.task.replace(f"@+{number}", f"@+{min(number, limit)}")
    names = [[f"{name}/{note['id']}" for note in reader.metadata] for name, reader in readers.items()]
    mix.holdout = max(mix.holdout, *map(least_holdout, names))
    kept = []
    for task in mix.tasks:
        parsed = Task.parse(task.task)
        if any(not parsed.missing(_streams(r, i)) for r in readers.values() for i in range(min(4, len(r)))):
            kept.append(task)
    mix.tasks = kept
    save_mix(mix, out / "mix.yaml")
    return mix


def _streams(reader: EpisodeShardReader, index: int) -> list[str]:
    episode = reader[index]
    names = list(episode.streams)
    names += ["text"] if episode.texts else []
    names += ["plan"] if episode.plans else []
    return names + (["progress"] if episode.success is not False else [])


def _tokenize(config: DemoConfig, out: Path, mix: MixConfig, scale: float, stages: Stages) -> None:
    from mmseq.tokenization.recipe import TokenizerConfig
    from mmseq.training.tokenizers import train_tokenizers

    overrides = [f"out={out / 'tokenizers'}", f"seed={config.seed}", f"holdout={mix.holdout}"]
    overrides += [f"vision.steps={max(40, round(VISION_STEPS * scale))}"]
    overrides += [f"sources.{name}.path={out / 'data/episodes' / name}" for name in mix.sources]
    with stages.stage("Training the tokenizers: text, vision, actions") as update:
        recipe = load_config(TokenizerConfig, RECIPES / "demo_tokenizers.yaml", overrides)
        train_tokenizers(recipe, lambda stage, done, total: update(done, total))
    with stages.stage("Tokenizing") as update:
        tokenize_mix(
            out / "mix.yaml",
            out / "tokens",
            out / "tokenizers",
            root=out / "data",
            on_progress=lambda source, done, total: update(done, total),
        )


def _train(config: DemoConfig, out: Path, stages: Stages) -> None:
    """Two ranks under torchrun where there are two cores, as a user would start it."""
    from mmseq.training.local import local_ranks, train_here

    ranks = local_ranks()
    settings = [
        *(f"data.mix={out / 'mix.yaml'}", f"data.tokens={out / 'tokens'}", f"data.tokenizers={out / 'tokenizers'}"),
        *(f"out={out / 'train'}", f"seed={config.seed}", f"max_minutes={config.minutes * TRAIN_SHARE:g}"),
    ]
    with stages.stage(f"Training one model on every task, {ranks} ranks"):
        train_here(
            RECIPES / "demo_train.yaml",
            settings,
            ranks=ranks,
            log=out / "train.log",
            say=lambda line: stages.console.print("  " + line, soft_wrap=True, markup=False),
        )
    shutil.copytree(out / "train/checkpoint", out / "checkpoint")


def _split(out: Path, mix: MixConfig) -> tuple[list[Episode], list[Episode], list[Episode]]:
    """Held-out robot episodes, held-out videos, and what was trained on."""
    held: dict[str, list[Episode]] = {"robot": [], "human": []}
    seen: list[Episode] = []
    for name in mix.sources:
        for episode in EpisodeShardReader(out / "data/episodes" / name):
            (held[name] if held_out(f"{name}/{episode.id}", mix.holdout) else seen).append(episode)
    return held["robot"], held["human"], seen


def _measure(config: DemoConfig, tasks: list[str], out: Path, mix: MixConfig, stages: Stages) -> Path:
    from mmseq.evaluation.generation import evaluate_generation
    from mmseq.evaluation.pictures import write_picture
    from mmseq.evaluation.report import write_report
    from mmseq.evaluation.results import write_results
    from mmseq.model.sequence_model import SequenceModel
    from mmseq.training.checkpoint import complete_checkpoints, read_state

    results, rollouts = [], []
    if tasks:
        rollouts, success = _drive(config, tasks, out, stages)
        results += success
    model = SequenceModel.from_pretrained(out / "checkpoint")
    arrows = {task_name(t): t.task for t in mix.tasks}
    robot, human, seen = _split(out, mix)
    with stages.stage("Measuring every direction on held-out episodes") as update:
        generated, media = evaluate_generation(
            model,
            robot,
            human,
            arrows,
            train_episodes=seen,
            seed=config.seed,
            on_progress=lambda what, done, total: update(done, total),
        )
    results += generated
    write_results(out / "results.json", results)
    _write_card(out, results)
    tokenizers = model.tokenizers
    assert tokenizers is not None
    mixture = Mixture(mix, out / "tokens", tokenizers, row_tokens=2048, seed=config.seed)
    steps = read_state(complete_checkpoints(out / "train/checkpoints")[-1]).step
    shown = [
        {"task": r.task, "success": r.success, "policy": r.controller, "rate_hz": 20.0}
        | ({"video": r.frames} if r.frames is not None else {})
        for r in rollouts
        if r.controller in ("policy", "blanked_images")
    ]
    write_report(
        out / "report.html",
        title="mmseq demo: one model, every direction",
        results=results,
        media=media,
        training=out / "train/metrics.jsonl",
        accounting=mixture.shares(),
        rollouts=shown,
        timings=stages.seconds,
        config=to_yaml(mix) + "\n" + (out / "train/config.yaml").read_text(),
        command=shlex.join(["mmseq", *sys.argv[1:]]),
        facts={
            "parameters": f"{model.parameters_count / 1e6:.2f} M",
            "tasks": str(len(arrows)),
            "training steps": str(steps),
            "robot episodes": str(sum(e.embodiment is not None for e in [*robot, *seen])),
            "videos": str(sum(e.embodiment is None for e in [*human, *seen])),
        },
    )
    write_picture(out / "demo.png", media, shown)
    _print_summary(stages, results, out)
    return out / "report.html"


def _drive(config: DemoConfig, tasks: list[str], out: Path, stages: Stages) -> tuple[list[Any], list[Any]]:
    from mmseq.evaluation.closed_loop import ClosedLoopConfig, evaluate_checkpoint, success_results
    from mmseq.simulation.experts import DEMO_SPREAD

    common = {"tasks": tasks, "spread": DEMO_SPREAD, "execute": config.execute, "seed": 100_000 + 1000 * config.seed}
    rollouts = []
    with stages.stage(f"Driving the simulator through the server, {config.episodes} unseen layouts a task") as update:
        loop = ClosedLoopConfig(**common, episodes=config.episodes)  # type: ignore[arg-type]
        rollouts += evaluate_checkpoint(out / "checkpoint", loop, on_progress=update)
    fewer = max(1, config.episodes // 3)
    with stages.stage("Baselines: blanked images, random actions, the expert through the action bins") as update:
        controllers = ("blanked_images", "random", "expert_tokens")
        loop = ClosedLoopConfig(**common, episodes=fewer, controllers=controllers)  # type: ignore[arg-type]
        rollouts += evaluate_checkpoint(out / "checkpoint", loop, on_progress=update)
    rows = [{k: v for k, v in asdict(r).items() if k not in ("frames", "splices")} for r in rollouts]
    (out / "rollouts.json").write_text(json.dumps(rows) + "\n")
    return rollouts, success_results(rollouts, config.seed)


def _write_card(out: Path, results: list[Any]) -> None:
    """The model card of the checkpoint, and its numbers beside it."""
    lines = [
        "# Model card",
        "",
        "Trained by `mmseq demo`.",
        "",
        "| measure | value | baseline | n |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r.name} | {r.value:.3g} {r.unit} | {r.baseline_name} {r.baseline_value:.3g} | {r.n} |" for r in results
    ]
    (out / "checkpoint/README.md").write_text("\n".join(lines) + "\n")
    shutil.copy(out / "results.json", out / "checkpoint/results.json")


def _print_summary(stages: Stages, results: list[Any], out: Path) -> None:
    from rich.table import Table

    table = Table("measure", "value", "unit", "baseline", "", "n")
    for column in table.columns:
        column.no_wrap = True
    for r in results:
        if r.name.count(".") < 2:
            row = (r.name, f"{r.value:.3f}", r.unit, f"{r.baseline_value:.3f}", r.baseline_name, str(r.n))
            table.add_row(*row)
    stages.console.width = max(stages.console.width, 130)  # a narrow log must not cut names
    stages.console.print(table)
    total = sum(stages.seconds.values())
    stages.console.print(f"\n{total / 60:.1f} minutes. Open {out / 'report.html'}")
