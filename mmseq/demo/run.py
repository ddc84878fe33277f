"""Runs the demo: records, imports, tokenizes and trains, then has it measured."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path

import torch

from mmseq.config import load_config
from mmseq.data.importing import EpisodeShardReader, import_episodes
from mmseq.data.mixture import MixConfig, least_holdout, load_mix, save_mix
from mmseq.data.sources import streams_of
from mmseq.data.tokenize import tokenize_mix
from mmseq.demo.config import DemoConfig
from mmseq.demo.measure import measure
from mmseq.demo.stages import Stages, speed_here
from mmseq.errors import DataError
from mmseq.files import code_revision
from mmseq.tasks import Task

RECIPES = Path(__file__).parents[1] / "recipes"
# Gentler than Meta-World's own experts, from which policies of long chunks learn little (docs/log.md)
EXPERTS = {"gain": 0.5, "noise": 0.5}


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

        if len(open_source(config.data, config)) < 4:
            raise DataError(f"{config.data} has fewer than four episodes", fix="one part is held out: give more")
        if Path(config.data).resolve().is_relative_to(out.resolve()):
            raise DataError(f"{config.data} lies in {out}, which this run replaces", fix="choose another --out")
    _clear(out)
    # threads wait for each other on a busy machine: two trained the tokenizer many times slower than one does
    torch.set_num_threads(1)
    speed = speed_here()
    stages.say(
        f"{config.steps:,} training steps and all around them take about {max(1, config.minutes / speed):.0f} min "
        f"here: a core computes {speed:.2g} times what it does where they take {config.minutes:g}"
    )
    sources = {"robot": Path(config.data)} if config.data else _record(config, tasks, out, stages)
    for name, path in sources.items():
        with stages.stage(f"Importing {name} episodes", "episodes") as update:
            size = 64 if config.data else None
            import_episodes(path, out / "data/episodes" / name, config, size=size, name=name, on_progress=update)
    mix = _mix(config, out, list(sources))
    _tokenize(config, out, mix, stages)
    _train(config, out, stages)
    return measure(config, tasks, out, mix, stages)


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
    (out / "demo.json").write_text(json.dumps({"command": shlex.join(sys.argv), "code": code_revision()}) + "\n")


def _record(config: DemoConfig, tasks: list[str], out: Path, stages: Stages) -> dict[str, Path]:
    from mmseq.simulation.dataset import write_lerobot
    from mmseq.simulation.experts import DEMO_SPREAD, VIDEO_TASKS
    from mmseq.simulation.human import write_human_videos
    from mmseq.simulation.record import record_episodes

    robot, human, count = out / "data/lerobot", out / "data/human", config.demonstrations
    said = f"Recording {count} expert episodes of {len(tasks)} tasks as a LeRobot v3 dataset"
    with stages.stage(said, "episodes") as update:
        settings = {"seed": config.seed, "spread": DEMO_SPREAD, **EXPERTS}
        write_lerobot(record_episodes(tasks, count, on_progress=update, **settings), robot)
    filmed = [*tasks, *[t for t in VIDEO_TASKS if t not in tasks][:4]]
    with stages.stage(
        f"Filming {config.videos} human videos of {len(filmed)} tasks, without actions", "videos"
    ) as update:
        write_human_videos(human, filmed, config.videos, seed=config.seed + 1, spread=DEMO_SPREAD, on_progress=update)
    return {"robot": robot, "human": human}


def _mix(config: DemoConfig, out: Path, sources: list[str]) -> MixConfig:
    """The demo's mix, cut to what this data can fill."""
    mix = load_mix(RECIPES / "demo_mix.yaml")
    mix.sources = {name: mix.sources[name] for name in sources}
    readers = {name: EpisodeShardReader(out / "data/episodes" / name) for name in sources}
    notes = [note for reader in readers.values() for note in reader.metadata]
    if config.data:
        shortest = min(notes, key=lambda note: note["length"])
        limit = max(1, shortest["length"] // 2)  # of a chunk: half of the shortest episode
        for task in mix.tasks:
            task.task = str(Task.parse(task.task).at_most(limit, float(shortest["rate_hz"])))
    names = [[f"{name}/{note['id']}" for note in reader.metadata] for name, reader in readers.items()]
    mix.holdout = max(mix.holdout, *map(least_holdout, names))
    kept = []
    for task in mix.tasks:
        parsed = Task.parse(task.task)
        if any(not parsed.missing(streams_of(r.metadata)) for r in readers.values()):
            kept.append(task)
    mix.tasks = kept
    save_mix(mix, out / "mix.yaml")
    return mix


def _tokenize(config: DemoConfig, out: Path, mix: MixConfig, stages: Stages) -> None:
    from mmseq.tokenization.recipe import TokenizerConfig
    from mmseq.training.tokenizers import train_tokenizers

    overrides = [f"out={out / 'tokenizers'}", f"seed={config.seed}", f"holdout={mix.holdout}"]
    overrides += [f"vision.steps={config.vision_steps}"]
    overrides += [f"sources.{name}.path={out / 'data/episodes' / name}" for name in mix.sources]
    with stages.stage("Training the tokenizers: text, vision, actions") as update:
        recipe = load_config(TokenizerConfig, RECIPES / "demo_tokenizers.yaml", overrides)
        train_tokenizers(recipe, lambda stage, done, total: update(done, total) if stage == "vision" else None)
    with stages.stage("Tokenizing", "episodes") as update:
        tokenize_mix(
            out / "mix.yaml",
            out / "tokens",
            out / "tokenizers",
            root=out / "data",
            on_progress=lambda source, done, total: update(done, total, source),
        )


def _train(config: DemoConfig, out: Path, stages: Stages) -> None:
    """Two ranks under torchrun where there are two cores, as a user would start it."""
    from mmseq.training.local import local_ranks, train_here

    ranks = local_ranks()
    settings = [
        *(f"data.mix={out / 'mix.yaml'}", f"data.tokens={out / 'tokens'}", f"data.tokenizers={out / 'tokenizers'}"),
        *(f"out={out / 'train'}", f"seed={config.seed}", f"steps={config.steps}"),
    ]
    with stages.stage(f"Training one model on every task: {config.steps:,} steps, {ranks} ranks"):
        train_here(
            RECIPES / "demo_train.yaml",
            settings,
            ranks=ranks,
            log=out / "train.log",
            say=lambda line: stages.say("   " + line),
        )
    shutil.copytree(out / "train/checkpoint", out / "checkpoint")
