"""The `mmseq` command: a file for each group of commands, which import what they need when they run.

An error that a user can act on is one line on stderr and exit code 2; `--debug` shows its traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import mmseq
from mmseq.cli import bench, checkpoint, data, label, machine, predict, serve, tokenizer, train
from mmseq.cli.parser import EXIT_ERROR, Group, Parser, Usage, rank_note
from mmseq.errors import MMSeqError, did_you_mean

EXIT_INTERRUPTED = 130


def build_parser() -> Parser:
    parser = Parser(
        prog="mmseq",
        description="One transformer for robot episodes, video, images and text: trains it, and runs any arrow.",
    )
    parser.add_argument("--version", action="version", version=f"mmseq {mmseq.__version__}")
    commands = Group(parser, "command")
    for part in (machine, data, tokenizer, train, label, predict, serve, bench, checkpoint):
        part.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    try:
        args = _parse(argv)
        return args.run(args) or 0
    except (Usage, MMSeqError) as error:
        if debug:
            raise
        message = " ".join(str(error).split("\n"))
        print(f"mmseq: error{rank_note()}: {message}", file=sys.stderr, flush=True)
        return EXIT_ERROR
    except (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        if debug:
            raise
        print(f"mmseq: error: {error.filename}: {error.strerror}", file=sys.stderr, flush=True)
        return EXIT_ERROR
    except RecursionError:
        if debug:
            raise
        print("mmseq: error: a file is nested too deeply to be read", file=sys.stderr, flush=True)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("mmseq: interrupted", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `mmseq ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    args, rest = build_parser().parse_known_args(argv)
    unknown = [a for a in rest if a.startswith("-")]
    if unknown:
        name = unknown[0].partition("=")[0]
        if name.startswith("--local_rank"):
            raise Usage("the deepspeed launcher adds --local_rank, which is not read: give it --no_local_rank")
        hint = did_you_mean(name, args.parser.options())
        if hasattr(args, "overrides"):
            hint += f"; a setting is written without dashes, {name.lstrip('-').replace('-', '_')}=VALUE"
        raise Usage(f"unknown option {name!r} of `{args.parser.prog}`: {hint}")
    if rest and hasattr(args, "overrides"):  # argparse stops at the first option between positionals
        args.overrides = [*args.overrides, *rest]
    elif rest:
        raise Usage(f"unexpected {rest[0]!r}; see `{args.parser.prog} --help`")
    return args
