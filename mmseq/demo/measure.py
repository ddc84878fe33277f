"""Measures what the demo trained, and writes the report, the model card and the picture."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmseq.config import to_yaml
from mmseq.data.importing import EpisodeShardReader
from mmseq.data.mixture import MixConfig, Mixture, held_out, task_name
from mmseq.demo.config import DemoConfig
from mmseq.demo.stages import Stages
from mmseq.episode import Episode


def measure(config: DemoConfig, tasks: list[str], out: Path, mix: MixConfig, stages: Stages) -> Path:
    from mmseq.evaluation.generation import evaluate_generation
    from mmseq.evaluation.pictures import write_picture
    from mmseq.evaluation.reader import STEPS
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
    with stages.stage("Measuring every direction on held-out episodes", "tasks") as update:
        generated, media = evaluate_generation(
            model,
            robot,
            human,
            arrows,
            train_episodes=seen,
            seed=config.seed,
            reader_steps=STEPS,
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


def _split(out: Path, mix: MixConfig) -> tuple[list[Episode], list[Episode], list[Episode]]:
    """Held-out robot episodes, held-out videos, and what was trained on."""
    held: dict[str, list[Episode]] = {"robot": [], "human": []}
    seen: list[Episode] = []
    for name in mix.sources:
        for episode in EpisodeShardReader(out / "data/episodes" / name):
            (held[name] if held_out(f"{name}/{episode.id}", mix.holdout) else seen).append(episode)
    return held["robot"], held["human"], seen


def _drive(config: DemoConfig, tasks: list[str], out: Path, stages: Stages) -> tuple[list[Any], list[Any]]:
    from mmseq.evaluation.closed_loop import ClosedLoopConfig, evaluate_checkpoint, success_results
    from mmseq.simulation.experts import DEMO_SPREAD

    common = {"tasks": tasks, "spread": DEMO_SPREAD, "execute": config.execute, "seed": 100_000 + 1000 * config.seed}
    rollouts = []
    with stages.stage(
        f"Driving the simulator through the server, {config.episodes} unseen layouts a task", "episodes"
    ) as update:
        loop = ClosedLoopConfig(**common, episodes=config.episodes)  # type: ignore[arg-type]
        rollouts += evaluate_checkpoint(out / "checkpoint", loop, on_progress=update)
    fewer = max(1, config.episodes // 3)
    others = "Comparing it with itself blindfold, with random actions, and with the expert through the action bins"
    with stages.stage(others, "episodes") as update:
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
