"""`mmseq labeller` and `mmseq label`: actions and states for video."""

from __future__ import annotations

import argparse

from mmseq.cli.parser import Group, Parser, add_overrides, add_reading, filled


def add(commands: Group) -> None:
    labeller = commands.group("labeller", "train what reads actions off video")
    labeller.add(
        "train",
        _train,
        lambda c: add_overrides(c, "sources=[A,B] out=FOLDER and other settings"),
        "from a robot's episodes: demonstrations, and undirected play above all",
        "mmseq labeller train sources=[runs/demo/data/episodes/robot] out=runs/labeller steps=500",
    )
    commands.add("label", _label, _label_options, "give video a robot's actions and states, as a LeRobot dataset")


def _label_options(c: Parser) -> None:
    from mmseq.labelling.labels import LabelConfig

    c.add_argument("labeller", metavar="LABELLER", help="what `mmseq labeller train` wrote, or a checkpoint")
    c.add_argument("source", metavar="SOURCE", help="videos, shards or a dataset")
    c.add_argument("out", metavar="OUT", help="the LeRobot v3 dataset that is written")
    c.add_argument("--embodiment", metavar="NAME", help="the robot, of a checkpoint that knows several")
    c.fields(LabelConfig, camera="NAME", min_confidence="SHARE", workers="N")
    add_reading(c)


def _train(args: argparse.Namespace) -> None:
    from mmseq.config import load_config
    from mmseq.labelling.training import LabellerConfig, train_labeller
    from mmseq.progress import progress

    config = load_config(LabellerConfig, None, args.overrides)
    with progress("labeller", "steps") as update:
        report = train_labeller(config, update)
    for name, value in (report.get("held_out") or {}).get("labels", {}).items():
        kind = "right" if name in report["held_out"]["switches"] else "R2"
        print(f"{name}: {kind} {value:.2f}, shuffled {report['held_out']['shuffled'][name]:.2f}")
    print(f"{config.out}: a labeller, taught by {report['taught']} episodes; judge it on tasks that it was not taught")


def _label(args: argparse.Namespace) -> None:
    from mmseq.labelling.labels import LabelConfig, label_source
    from mmseq.progress import progress

    config = filled(LabelConfig, args)
    with progress("labelling", "episodes") as update:
        report = label_source(
            args.labeller, args.source, args.out, config, embodiment=args.embodiment, on_progress=update
        )
    print(f"{args.out}: {report['episodes']} episodes, confidence {report['confidence']:.2f} on average")
    if report["left_out"]:
        print(f"{len(report['left_out'])} left out for a confidence below {config.min_confidence}")
