"""`mmseq train` and `mmseq finetune`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from mmseq.cli.parser import EXIT_ERROR, Group, Parser, add_overrides, add_reading, add_recipe, filled, given, rank_note
from mmseq.errors import ConfigError, MMSeqError


def add(commands: Group) -> None:
    commands.add(
        "train",
        _train,
        _train_options,
        "train a model; the same command resumes",
        "also: torchrun --nproc-per-node 2 -m mmseq train RECIPE",
    )
    commands.add(
        "finetune",
        _finetune,
        _finetune_options,
        "put a checkpoint on a new robot, from a LeRobot dataset; the same command resumes",
        "mmseq finetune runs/demo/checkpoint --dataset PATH --embodiment robot.yaml --lora --hours 2",
    )


def _train_options(c: Parser) -> None:
    add_recipe(c)
    c.add_argument("--dry-run", action="store_true", help="only say what it would cost, and everything that is wrong")
    c.add_argument("--gpus", type=int, metavar="N", help="of a dry run: how many ranks (default: those there are)")
    c.add_argument("--gpu", metavar="NAME", help="of a dry run: a100, h100, h200, b200, ...")
    c.add_argument("--mfu", type=float, help="of a dry run: the share of the GPU's peak (default: 0.4)")


def _finetune_options(c: Parser) -> None:
    from mmseq.training.finetune import FinetuneConfig

    c.add_argument("checkpoint", metavar="CHECKPOINT")
    c.fields(FinetuneConfig, dataset="LEROBOT")
    add_reading(c)
    c.fields(FinetuneConfig, skip_bad="N", embodiment="FILE", out="DIR", lora=None, lora_rank=None)
    c.fields(FinetuneConfig, hours=None, steps=None)
    c.add_argument(
        "--task", action="append", dest="tasks", metavar="ARROW", help="instead of the checkpoint's; repeatable"
    )
    c.fields(FinetuneConfig, rate_hz=None, keep=None, tokens="DIR", ranks=None, seed=None)
    c.add_argument("--prepare-only", action="store_true", help="stop before training: OUT/recipe.yaml runs anywhere")
    add_overrides(c, "settings of the training recipe")


def _train(args: argparse.Namespace) -> int:
    from mmseq.config import load_config
    from mmseq.training.config import TrainConfig

    if args.dry_run:
        return _dry_run(args)
    if args.gpus is not None or args.gpu is not None:
        raise ConfigError("--gpus and --gpu are for --dry-run", fix="a run takes the ranks that its launcher starts")
    from mmseq.training.distributed import EXIT_PREEMPTED, Preempted, leave
    from mmseq.training.train import train

    try:
        finished = train(load_config(TrainConfig, args.recipe, args.overrides))
        if finished is not None:
            print(finished, flush=True)
    except Preempted as reason:
        print(f"mmseq: {reason}", file=sys.stderr, flush=True)
        leave(EXIT_PREEMPTED, f"mmseq: {reason}")
        return EXIT_PREEMPTED
    except (MMSeqError, OSError) as error:
        if getattr(args, "debug", False):
            raise
        if isinstance(error, OSError):
            error = f"{error.filename}: {error.strerror}" if error.filename else error
        line = f"mmseq: error{rank_note()}: {' '.join(str(error).splitlines())}"
        print(line, file=sys.stderr, flush=True)
        # other ranks may wait in a collective for this one: the launcher ends them when this process is gone
        leave(EXIT_ERROR, line)
        return EXIT_ERROR
    leave(0)
    return 0


def _finetune(args: argparse.Namespace) -> int:
    from mmseq.progress import progress
    from mmseq.training.distributed import EXIT_PREEMPTED, Preempted
    from mmseq.training.finetune import FinetuneConfig, before_and_after, prepare
    from mmseq.training.local import local_ranks, train_here

    config = filled(FinetuneConfig, args, settings=args.overrides, ranks=args.ranks or local_ranks())
    out = Path(config.out)
    if args.ranks is not None and args.ranks < 1:
        raise ConfigError(f"--ranks is {args.ranks}", fix="give at least 1")
    with progress(f"preparing {args.dataset}", "episodes") as update:
        robot = prepare(config, say=print, on_progress=lambda stage, done, total: update(done, total, note=stage))
    print(f"{out / 'recipe.yaml'}: `mmseq train {out / 'recipe.yaml'}` runs it under any launcher")
    if args.prepare_only:
        return 0
    try:
        train_here(out / "recipe.yaml", [], ranks=config.ranks, log=out / "train.log")
    except Preempted as reason:
        print(f"mmseq: {reason}", file=sys.stderr, flush=True)
        return EXIT_PREEMPTED
    report = before_and_after(out)
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "before", "after", title=report["unit"], box=None, pad_edge=False)
    for name, bits in report["tasks"].items():
        before = "" if bits["before"] is None else f"{bits['before']:.3f}"
        table.add_row(name, before, f"{bits['after']:.3f}")
    Console(highlight=False, soft_wrap=True).print(table)
    print(f"{out / 'checkpoint'}: `mmseq serve {out / 'checkpoint'} --embodiment {robot}` serves it")
    return 0


def _dry_run(args: argparse.Namespace) -> int:
    from mmseq.config import load_config
    from mmseq.training.config import TrainConfig
    from mmseq.training.dry_run import dry_run, print_plan
    from mmseq.training.ranks import find_ranks

    config = load_config(TrainConfig, args.recipe, args.overrides)
    gpus = find_ranks(os.environ).world if args.gpus is None else args.gpus
    plan = dry_run(config, gpus=gpus, **given(args, "gpu", "mfu"))
    print_plan(plan)
    for problem in plan.problems:
        print(f"mmseq: error: {problem}", file=sys.stderr)
    return EXIT_ERROR if plan.problems else 0
