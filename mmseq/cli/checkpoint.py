"""`mmseq inspect` and `mmseq export`: what one can do with a finished checkpoint."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mmseq.cli.parser import Group, Parser, add_overrides
from mmseq.errors import ConfigError


def add(commands: Group) -> None:
    commands.add("inspect", _inspect, _inspect_options, "what a checkpoint is, or the size of a recipe's model")
    commands.add(
        "export", _export, _export_options, "a checkpoint as a language model of transformers, or a policy of LeRobot"
    )


def _inspect_options(c: Parser) -> None:
    c.add_argument("path", metavar="CHECKPOINT|RECIPE")
    add_overrides(c, "for a recipe")
    c.add_argument("--json", action="store_true", help="print JSON")


def _export_options(c: Parser) -> None:
    c.add_argument("checkpoint", metavar="CHECKPOINT")
    c.add_argument("format", metavar="FORMAT", choices=("hf", "lerobot"), help="hf or lerobot")
    c.add_argument("out", metavar="OUT", help="a new folder")
    c.add_argument("--dtype", help="hf: of the weights, fp32 (default), bf16 or fp16")
    c.add_argument("--text-only", action="store_true", help="hf: leave out the ids after those of text")
    c.add_argument("--server", metavar="HOST:PORT", help="lerobot: of `mmseq serve`; then no weights are written")
    c.add_argument("--policy", metavar="ARROW", help="lerobot: the arrow, or the task's name (default: policy)")
    c.add_argument("--embodiment", metavar="NAME", help="lerobot: the robot, where the checkpoint drives several")
    c.add_argument("--execute", type=int, metavar="N", help="lerobot: steps between chunks (default: half a chunk)")
    c.add_argument("--passes", type=int, metavar="N", help="lerobot: forward passes per chunk, as for serve")


def _inspect(args: argparse.Namespace) -> None:
    from mmseq import inspection

    if Path(args.path).suffix in (".yaml", ".yml"):
        found, show = inspection.inspect_recipe(args.path, args.overrides), inspection.print_recipe
    else:
        if args.overrides:
            raise ConfigError(f"{args.overrides[0]!r}: a checkpoint has no settings to replace")
        found, show = inspection.inspect_checkpoint(args.path), inspection.print_checkpoint
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        show(found)


def _export(args: argparse.Namespace) -> None:
    if args.format == "lerobot":
        if args.dtype or args.text_only:
            raise ConfigError("--dtype and --text-only are for hf", fix="leave them out")
        from mmseq.serving.lerobot_directory import export_lerobot

        names = ("policy", "embodiment", "server", "execute", "passes")
        print(export_lerobot(args.checkpoint, args.out, **{name: getattr(args, name) for name in names}))
        return
    names = ("server", "policy", "embodiment", "execute", "passes")
    given = [name for name in names if getattr(args, name) is not None]
    if given:
        raise ConfigError(f"--{given[0]} is for lerobot", fix="leave it out")
    from mmseq.model.export import export_hf

    print(export_hf(args.checkpoint, args.out, dtype=args.dtype or "fp32", text_only=args.text_only))
