"""`mmseq serve`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from mmseq.cli.parser import Group, Parser, add_overrides, add_reading, given
from mmseq.reading import Reading

# the settings that are options too
OPTIONS: dict[str, str | None] = {
    "replay": "DATASET:EPISODE",
    "host": None,
    "port": None,
    "token_file": "FILE",
    "insecure_public": None,
    "tls_cert": "FILE",
    "tls_key": "FILE",
    "policy": "ARROW",
    "embodiment": "NAME",
    "passes": "N",
    "device": None,
}


def add(commands: Group) -> None:
    commands.add(
        "serve", _serve, _serve_options, "serve a checkpoint to robots, on openpi's websocket protocol and HTTP"
    )


def _serve_options(c: Parser) -> None:
    from mmseq.serving.launch import ServeSettings

    c.add_argument("checkpoint", metavar="CHECKPOINT", nargs="?", help="what to serve; or see --config, --replay")
    add_overrides(c, "settings, such as gate.too_fast=refuse")
    c.add_argument("--config", metavar="FILE", help="settings as YAML; serve/server.yaml has them all")
    c.fields(ServeSettings, **OPTIONS)
    add_reading(c)
    c.add_argument("--chunking", metavar="MODE", help="plain, ensemble or realtime, for clients that do not do it")
    c.add_argument("--execute", type=int, help="control steps between two requests of such a client")


def _serve(args: argparse.Namespace) -> None:
    import logging
    from dataclasses import fields, replace

    from mmseq.config import load_config
    from mmseq.serving.launch import ServeSettings, launch

    overrides = list(args.overrides)
    if args.checkpoint and "=" in args.checkpoint and not Path(args.checkpoint).exists():
        overrides, args.checkpoint = [args.checkpoint, *overrides], None
    settings = load_config(ServeSettings, args.config, overrides)
    if args.replay and args.config and not args.checkpoint:
        settings.checkpoint = None  # the file's settings, another thing to serve
    for name, value in given(args, "checkpoint", *OPTIONS).items():
        setattr(settings, name, value)
    settings.reading = replace(settings.reading, **given(args, *(f.name for f in fields(Reading))))
    changes = {"mode": args.chunking, "execute": args.execute}
    changes = {name: value for name, value in changes.items() if value is not None}
    settings.chunking = replace(settings.chunking, **changes)
    what = settings.checkpoint or f"the recorded actions of {settings.replay}"
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("mmseq").setLevel(logging.INFO)
    if not launch(settings, on_ready=lambda server: print(f"serving {what} at {server.url}", flush=True)):
        logging.shutdown()
        sys.stdout.flush()
        # a thread that is still inside C++ while the interpreter is taken down aborts the process
        os._exit(0)
