"""`mmseq bench`."""

from __future__ import annotations

import argparse
from importlib import import_module

from mmseq.cli.parser import Group, Parser, add_overrides, file_to_write

BENCHES = ("lfv", "mw7", "throughput", "loader", "loss", "packing", "decode", "chunks", "serve")


def add(commands: Group) -> None:
    commands.add(
        "bench",
        _bench,
        _bench_options,
        "measure a part beside what one would use in its place, in turns; docs/benchmarks.md has figures",
        "lfv          learning from video, in closed loop: out=runs/lfv methods=[model,labelled] video=[V0,V4] ...\n"
        "mw7          the same on the seven tasks of Meta-World that others have published, 5 demonstrations each\n"
        "throughput   training against transformers + DeepSpeed: width=256 layers=4 vocabulary=50000 seconds=120 ...\n"
        "loader       token shards and live video against lerobot: data=PATH_TO_LEROBOT_V3 window=1 seconds=60 ...\n"
        "loss         the range loss against full fp32 logits: positions=4096 vocabulary=150000 ...\n"
        "packing      useful slots of packed rows: blocks=4\n"
        "decode       a chunk of actions against transformers' generate: width=256 layers=4 passes=4 seconds=60 ...\n"
        "chunks       guessed and checked chunks of a checkpoint: checkpoint=CHECKPOINT data=EPISODES batch=8 ...\n"
        "serve        the server against openpi's: image=224 cameras=3 clients=32 seconds=20 ...",
    )


def _bench_options(c: Parser) -> None:
    c.add_argument("what", metavar="BENCH", choices=BENCHES)
    add_overrides(c, "settings of the bench")
    c.add_argument("--json", type=file_to_write, metavar="FILE", help="write the rows there as JSON")


def _bench(args: argparse.Namespace) -> None:
    from mmseq.bench.rows import report
    from mmseq.config import load_config

    if args.what in ("lfv", "mw7"):
        _learning_from_video(args)
        return
    bench = import_module(f"mmseq.bench.{args.what}")
    rows, notes = bench.bench(load_config(bench.Config, None, args.overrides))
    report(rows, args.json, notes)


def _learning_from_video(args: argparse.Namespace) -> None:
    from mmseq.config import load_config
    from mmseq.evaluation.lfv.manifest import MW7, Config
    from mmseq.evaluation.lfv.report import print_summary
    from mmseq.evaluation.lfv.rows import write_rows
    from mmseq.evaluation.lfv.run import run

    config = load_config(MW7 if args.what == "mw7" else Config, None, args.overrides)
    rows = run(config)
    print_summary(rows, config.published)
    print(f"{config.out}/report.html")
    if args.json:
        write_rows(args.json, rows)
