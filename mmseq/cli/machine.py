"""`mmseq demo` and `mmseq doctor`: what a new machine runs first."""

from __future__ import annotations

import argparse

from mmseq.cli.parser import Group, Parser, add_reading, filled


def add(commands: Group) -> None:
    commands.add(
        "demo", _demo, _demo_options, "the whole loop on a laptop: data, tokenizers, training, serving, an HTML report"
    )
    commands.add("doctor", _doctor, None, "what this machine has and what will be used")


def _demo_options(c: Parser) -> None:
    from mmseq.demo.config import DemoConfig

    c.fields(DemoConfig, out="DIR", seed=None, minutes=None, tasks="A,B", data="LEROBOT_V3", episodes=None)
    add_reading(c)


def _demo(args: argparse.Namespace) -> None:
    from mmseq.demo.config import DemoConfig
    from mmseq.demo.run import run_demo

    run_demo(filled(DemoConfig, args))


def _doctor(args: argparse.Namespace) -> None:
    from mmseq.doctor import print_report

    print_report()
