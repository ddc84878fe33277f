"""`mmseq tokenizer`: train and measure tokenizers."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from mmseq.cli.parser import Group, Parser, add_reading, add_recipe, filled
from mmseq.reading import Reading


def add(commands: Group) -> None:
    tokenizer = commands.group("tokenizer", "train and measure tokenizers")
    tokenizer.add("train", _tokenizer_train, add_recipe, "text, vision and bins from a recipe")
    tokenizer.add("eval", _tokenizer_eval, _eval_options, "measure tokenizers on a dataset")


def _eval_options(c: Parser) -> None:
    c.add_argument("tokenizers", metavar="DIR")
    c.add_argument("--data", required=True, metavar="SRC", help="episode shards, LeRobot v3, HDF5 or videos")
    add_reading(c)
    c.add_argument("--out", metavar="FILE", help="write the report there as JSON")


def _tokenizer_train(args: argparse.Namespace) -> None:
    from mmseq.config import load_config
    from mmseq.progress import progress
    from mmseq.tokenization.recipe import TokenizerConfig
    from mmseq.training.tokenizers import train_tokenizers

    config = load_config(TokenizerConfig, args.recipe, args.overrides)
    with progress("tokenizers", "steps") as update:
        report = train_tokenizers(
            config,
            on_progress=lambda stage, n, total: update(n, total, note=stage),
            say=lambda note: print(f"note: {note}", file=sys.stderr, flush=True),
        )
    _print_report(report)
    print(f"\n{config.out}: tokenizers and report.json")


def _tokenizer_eval(args: argparse.Namespace) -> None:
    from mmseq.data.sources import open_source
    from mmseq.tokenization.bundle import Tokenizers
    from mmseq.training.tokenizers import evaluate_tokenizers

    tokenizers = Tokenizers.load(args.tokenizers)
    source = open_source(args.data, filled(Reading, args), embodiments=tokenizers.embodiments)
    report = evaluate_tokenizers(tokenizers, {Path(args.data).name: source})
    _print_report(report)
    if args.out:
        Path(args.out).write_text(json.dumps(report, indent=2) + "\n")


def _print_report(report: dict[str, Any]) -> None:
    from mmseq.inspection import flat

    for name, value in flat(report):
        print(f"{name}: {value}")
