"""`mmseq predict` and `mmseq eval`."""

from __future__ import annotations

import argparse
from pathlib import Path

from mmseq.cli.parser import Group, Parser, add_reading, file_to_write, filled, given
from mmseq.errors import ConfigError, DataError
from mmseq.reading import Reading


def add(commands: Group) -> None:
    commands.add(
        "predict",
        _predict,
        _predict_options,
        "fill the right side of an arrow at one moment of an episode",
        'mmseq predict runs/demo/checkpoint "image, action[8] -> image@+8" --episode shards/robot:3 --t 10 --out out',
    )
    commands.add("eval", _eval, _eval_options, "drive the simulator through the server")


def _predict_options(c: Parser) -> None:
    c.add_argument("checkpoint", metavar="CHECKPOINT")
    c.add_argument("arrow", metavar="ARROW", help="an arrow, or the name of a built-in one such as policy")
    c.add_argument(
        "--episode", required=True, metavar="SRC:N", help="shards, a dataset, a video file or a folder of them"
    )
    add_reading(c)
    c.add_argument("--t", type=int, default=0, help="the step that is now (default: 0)")
    c.add_argument("--text", help="in place of the episode's own")
    c.add_argument("--question")
    c.add_argument("--rate-hz", type=float, help="resample the episode; default: its own rate")
    c.add_argument("--embodiment", metavar="NAME", help="treat the episode as this robot's")
    c.add_argument("--temperature", type=float, help="0 takes the best code (default)")
    c.add_argument("--seed", type=int, default=0)
    c.add_argument("--device", help="default: cuda where there is one")
    c.add_argument("--out", metavar="DIR", help="write JSON, PNG and MP4 there")


def _eval_options(c: Parser) -> None:
    from mmseq.evaluation.closed_loop import ClosedLoopConfig

    c.add_argument("checkpoint", metavar="CHECKPOINT")
    c.fields(ClosedLoopConfig, tasks="A,B", episodes=None, seed=None, execute=None, chunking="MODE", delay_ms=None)
    c.fields(ClosedLoopConfig, policy="ARROW", jitter_ms=None, passes="N", max_steps="N", simulator="NAME", spread=None)
    c.add_argument("--baselines", action="store_true", help="also blanked images, random actions and the expert")
    c.add_argument("--device", help="default: cuda where there is one")
    c.add_argument("--json", type=file_to_write, metavar="FILE", help="write the results there")


def _predict(args: argparse.Namespace) -> None:
    from mmseq.data.sources import open_source
    from mmseq.inference.output import to_json, write_prediction
    from mmseq.model.device import default_device
    from mmseq.model.sequence_model import SequenceModel

    reading = filled(Reading, args)  # its mistakes are told before anything is loaded
    model = SequenceModel.from_pretrained(args.checkpoint, device=args.device or default_device())
    assert model.tokenizers is not None
    path, index = _episode_address(args.episode)
    source = open_source(path, reading, rate_hz=args.rate_hz, embodiments=model.tokenizers.embodiments)
    if index >= len(source):
        raise DataError(f"{path} has {len(source)} episodes, numbered from 0: there is no {index}")
    episode = source[index]
    if args.embodiment:
        episode.embodiment = model.tokenizers.embodiment(args.embodiment).name
    prediction = model.predict(
        args.arrow,
        episode,
        args.t,
        seed=args.seed,
        **given(args, "text", "question", "temperature"),
    )
    record = write_prediction(prediction, episode, model.tokenizers, args.out)
    print(to_json(record))


def _episode_address(text: str) -> tuple[Path, int]:
    """`SRC:N`, or `SRC` alone for its first episode."""
    path, colon, number = text.rpartition(":")
    if colon and number.isdigit():
        return Path(path), int(number)
    if colon and not Path(text).exists():
        raise ConfigError(f"--episode {text!r}: {number!r} is not a number", fix="write SRC:N, such as shards/robot:3")
    return Path(text), 0


def _eval(args: argparse.Namespace) -> None:
    from mmseq.evaluation.closed_loop import (
        CONTROLLERS,
        ClosedLoopConfig,
        evaluate_checkpoint,
        print_summary,
        splice_results,
        success_results,
    )
    from mmseq.evaluation.results import write_results
    from mmseq.progress import progress

    config = filled(ClosedLoopConfig, args, keep=0, controllers=CONTROLLERS if args.baselines else ("policy", "random"))
    with progress("driving the simulator", "episodes") as update:
        rollouts = evaluate_checkpoint(args.checkpoint, config, device=args.device, on_progress=update)
    print_summary(rollouts)
    if args.json:
        results = success_results(rollouts, config.seed) + splice_results(rollouts, config.seed)
        write_results(args.json, results)
