"""`mmseq data`: import, tokenize, lint and preview."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmseq.cli.parser import EXIT_ERROR, Group, Parser, add_reading, filled, given
from mmseq.errors import ConfigError
from mmseq.plugins import names
from mmseq.reading import Reading


def add(commands: Group) -> None:
    data = commands.group("data", "import, tokenize and check data")
    data.add("import", _data_import, _import_options, "a LeRobot dataset, HDF5 files or videos become episode shards")
    data.add("tokenize", _data_tokenize, _tokenize_options, "the sources of a mix become token shards; resumable")
    data.add("lint", _data_lint, _lint_options, "every problem of a mix before it costs GPU hours, and its shares")
    data.add("preview", _data_preview, _preview_options, "look at sequences: segments, roles, texts, frames")


def _import_options(c: Parser) -> None:
    c.add_argument("src", metavar="SRC")
    c.add_argument("out", metavar="OUT")
    c.add_argument("--format", choices=names("readers"), help="default: what is found at SRC")
    c.add_argument("--rate-hz", type=float, help="steps per second; default: the source's")
    c.add_argument("--size", type=int, help="crop frames to a square and scale it to this many pixels")
    c.add_argument("--name", help="of the dataset; default: the name of SRC")
    c.add_argument(
        "--embodiment", metavar="FILE", help="the contract to hold it to, or what the data leave open (JSON, YAML)"
    )
    add_reading(c)
    c.add_argument("--skip-bad", type=int, default=0, metavar="N", help="leave out up to N bad episodes (default: 0)")
    c.add_argument("--overwrite", action="store_true", help="replace OUT")


def _tokenize_options(c: Parser) -> None:
    c.add_argument("mix", metavar="MIX")
    c.add_argument("out", metavar="OUT")
    c.add_argument("--tokenizers", required=True, metavar="DIR")
    _root(c)
    c.add_argument("--overwrite", action="store_true", help="replace shards of other data or tokenizers")


def _lint_options(c: Parser) -> None:
    _tokens_of_mix(c)
    _root(c)


def _preview_options(c: Parser) -> None:
    _tokens_of_mix(c)
    c.add_argument("-n", type=int, default=3, dest="count", help="how many sequences (default: 3)")
    c.add_argument("--seed", type=int, default=0)
    c.add_argument("--out", metavar="DIR", help="write the frames there as PNG")


def _tokens_of_mix(c: Parser) -> None:
    from mmseq.training.config import DataConfig

    c.add_argument("mix", metavar="MIX")
    c.add_argument("--tokens", required=True, metavar="DIR", help="what `mmseq data tokenize` wrote")
    c.add_argument("--tokenizers", required=True, metavar="DIR")
    c.fields(DataConfig, row_tokens=None)


def _root(c: Parser) -> None:
    c.add_argument("--root", metavar="DIR", help="where the paths of the sources begin; default: the mix's folder")


def _data_import(args: argparse.Namespace) -> None:
    from mmseq.data.importing import import_episodes
    from mmseq.progress import progress

    with progress(f"importing {args.src}", "episodes") as update:
        manifest = import_episodes(
            args.src,
            args.out,
            filled(Reading, args),
            format=args.format,
            rate_hz=args.rate_hz,
            embodiment=args.embodiment,
            size=args.size,
            name=args.name,
            overwrite=args.overwrite,
            skip_bad=args.skip_bad,
            say=lambda note: print(f"note: {note}", file=sys.stderr, flush=True),
            on_progress=update,
        )
    robots = ", ".join(manifest["embodiments"]) or "no embodiment"
    skipped = f", {len(manifest['skipped'])} left out" if manifest["skipped"] else ""
    print(f"{args.out}: {manifest['samples']} episodes of {robots}{skipped}")


def _data_tokenize(args: argparse.Namespace) -> None:
    from mmseq.data.tokenize import tokenize_mix
    from mmseq.progress import progress

    with progress(f"tokenizing {args.mix}", "episodes") as update:
        done = tokenize_mix(
            args.mix,
            args.out,
            args.tokenizers,
            args.root,
            args.overwrite,
            on_progress=lambda source, n, total: update(n, total, note=source),
            say=lambda note: print(f"note: {note}", file=sys.stderr, flush=True),
        )
    for source, what in done.items():
        text = "already complete, left as it is" if what == "kept" else "written"
        print(f"{Path(args.out) / source}: {text}")


def _data_lint(args: argparse.Namespace) -> int:
    from mmseq.data.lint import lint_mix

    lint = lint_mix(args.mix, args.tokens, args.tokenizers, root=args.root, **given(args, "row_tokens"))
    for note in lint.notes:
        print(f"note: {note}")
    for problem in lint.problems:
        print(f"mmseq: error: {problem}", file=sys.stderr)
    if lint.problems:
        return EXIT_ERROR
    from rich.console import Console
    from rich.table import Table

    rule = "multiplied with the moments of each source" if lint.weighting == "frames" else "as they are"
    table = Table(
        "task", "source", "samples", "tokens", "tokens/sample", "moments", "episodes", box=None, pad_edge=False
    )
    print(f"weighting: {lint.weighting} (weights of sources are taken {rule})")
    for row in lint.shares:
        shares = [f"{row['samples']:.1%}", f"{row['tokens']:.1%}", f"{row['tokens_per_sample']:.0f}"]
        table.add_row(row["task"], row["source"], *shares, f"{row['moments']:,}", f"{row['episodes']:,}")
    Console(highlight=False, soft_wrap=True).print(table)
    return 0


def _data_preview(args: argparse.Namespace) -> None:
    from mmseq.data.mixture import Mixture, load_mix
    from mmseq.data.preview import choose_samples, describe, save_frames
    from mmseq.tokenization.bundle import Tokenizers
    from mmseq.training.config import DataConfig

    if args.count < 1:
        raise ConfigError(f"-n {args.count} shows nothing", fix="give at least 1")
    tokenizers = Tokenizers.load(args.tokenizers)
    rows = filled(DataConfig, args, mix=args.mix).row_tokens
    mixture = Mixture(load_mix(args.mix), args.tokens, tokenizers, row_tokens=rows, seed=args.seed)
    for i, sample in enumerate(choose_samples(mixture, args.count)):
        sequence = mixture.build(sample)
        print(describe(mixture, sample, sequence), end="\n\n")
        if args.out:
            name = "".join(x if x.isalnum() else "_" for x in mixture.task_names[sample.task])
            for path in save_frames(mixture, sequence, args.out, f"{i:02d}_{name}"):
                print(path)
