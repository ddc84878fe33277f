"""The `mmseq` command. Each command imports what it needs when it runs, so that `mmseq --help` is quick.

An error that a user can act on is one line on stderr and exit code 2; `--debug` shows its traceback.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from mmseq import __version__
from mmseq.errors import ConfigError, DataError, MMSeqError, did_you_mean

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
BENCHES = ("throughput", "loader", "loss", "packing", "decode", "chunks", "serve")


class _Usage(Exception):
    """A command line that cannot be understood."""


class _Parser(argparse.ArgumentParser):
    """argparse with whole option names only, and with a suggestion for a name that is unknown."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
        self.set_defaults(parser=self)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            what = "command" if isinstance(action, argparse._SubParsersAction) else str(action.metavar or action.dest)
            raise _Usage(f"unknown {what} {value!r}: {did_you_mean(str(value), map(str, action.choices))}")

    def error(self, message: str) -> NoReturn:
        raise _Usage(f"{message}; see `{self.prog} --help`")

    def options(self) -> list[str]:
        return [name for name in self._option_string_actions if name.startswith("--")]


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="mmseq",
        description="One transformer for robot episodes, video, images and text: trains it, and runs any arrow.",
    )
    parser.add_argument("--version", action="version", version=f"mmseq {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(group: Any, name: str, run: Any, help: str, description: str = "") -> _Parser:
        command = group.add_parser(name, help=help, description=f"{help}\n\n{description}".strip())
        command.set_defaults(run=run)
        return command

    def group(name: str, help: str) -> Any:
        outer = commands.add_parser(name, help=help, description=help)
        return outer.add_subparsers(dest="subcommand", metavar="COMMAND", required=True)

    c = add(commands, "demo", _demo, "the whole loop on a laptop: data, tokenizers, training, serving, an HTML report")
    c.add_argument("--out", default="runs/demo", metavar="DIR", help="default: runs/demo")
    c.add_argument("--seed", type=int, default=0)
    c.add_argument("--minutes", type=float, default=10.0, help="about how long it may take (default: 10)")
    c.add_argument("--tasks", metavar="A,B", help="Meta-World tasks; default: six in which the image matters")
    c.add_argument("--data", metavar="LEROBOT", help="your own dataset in place of the simulator")
    c.add_argument("--episodes", type=int, default=20, help="closed-loop episodes per task (default: 20)")

    add(commands, "doctor", _doctor, "what this machine has and what will be used")

    data = group("data", "import, tokenize and check data")
    c = add(data, "import", _data_import, "a LeRobot dataset, HDF5 files or videos become episode shards")
    c.add_argument("src", metavar="SRC")
    c.add_argument("out", metavar="OUT")
    c.add_argument("--format", choices=("lerobot", "video", "hdf5"), help="default: what is found at SRC")
    c.add_argument("--rate-hz", type=float, help="steps per second; default: the source's")
    c.add_argument("--size", type=int, help="crop frames to a square and scale it to this many pixels")
    c.add_argument("--name", help="of the dataset; default: the name of SRC")
    c.add_argument("--embodiment", metavar="FILE", help="the contract to hold the data to (JSON)")
    _foreign(c)
    c.add_argument("--overwrite", action="store_true", help="replace OUT")

    c = add(data, "tokenize", _data_tokenize, "the sources of a mix become token shards; resumable")
    c.add_argument("mix", metavar="MIX")
    c.add_argument("out", metavar="OUT")
    c.add_argument("--tokenizers", required=True, metavar="DIR")
    c.add_argument("--root", metavar="DIR", help="where the paths of the sources begin; default: the mix's folder")
    c.add_argument("--overwrite", action="store_true", help="replace shards of other data or tokenizers")

    c = add(data, "lint", _data_lint, "every problem of a mix before it costs GPU hours, and its shares")
    c.add_argument("mix", metavar="MIX")
    c.add_argument("--tokens", required=True, metavar="DIR", help="what `mmseq data tokenize` wrote")
    c.add_argument("--tokenizers", required=True, metavar="DIR")
    c.add_argument("--root", metavar="DIR", help="where the paths of the sources begin; default: the mix's folder")
    c.add_argument("--row-tokens", type=int, default=2048, help="length of a packed row (default: 2048)")

    c = add(data, "preview", _data_preview, "look at sequences: segments, roles, texts, frames")
    c.add_argument("mix", metavar="MIX")
    c.add_argument("--tokens", required=True, metavar="DIR", help="what `mmseq data tokenize` wrote")
    c.add_argument("--tokenizers", required=True, metavar="DIR")
    c.add_argument("-n", type=int, default=3, dest="count", help="how many sequences (default: 3)")
    c.add_argument("--row-tokens", type=int, default=2048, help="length of a packed row (default: 2048)")
    c.add_argument("--seed", type=int, default=0)
    c.add_argument("--out", metavar="DIR", help="write the frames there as PNG")

    tokenizer = group("tokenizer", "train and measure tokenizers")
    c = add(tokenizer, "train", _tokenizer_train, "text, vision and bins from a recipe")
    _recipe(c)
    c = add(tokenizer, "eval", _tokenizer_eval, "measure tokenizers on a dataset")
    c.add_argument("tokenizers", metavar="DIR")
    c.add_argument("--data", required=True, metavar="SRC", help="episode shards, LeRobot, HDF5 or videos")
    c.add_argument("--out", metavar="FILE", help="write the report there as JSON")

    c = add(
        commands,
        "train",
        _train,
        "train a model; the same command resumes",
        "also: torchrun --nproc-per-node 2 -m mmseq train RECIPE",
    )
    _recipe(c)
    c.add_argument("--dry-run", action="store_true", help="only say what it would cost, and everything that is wrong")
    c.add_argument("--gpus", type=int, metavar="N", help="of a dry run: how many ranks (default: those there are)")
    c.add_argument("--gpu", metavar="NAME", help="of a dry run: a100, h100, h200, b200, ...")
    c.add_argument("--mfu", type=float, default=0.4, help="of a dry run: the share of its peak (default: 0.4)")

    c = add(
        commands,
        "finetune",
        _finetune,
        "put a checkpoint on a new robot, from a LeRobot dataset; the same command resumes",
        "mmseq finetune runs/demo/checkpoint --dataset PATH --embodiment robot.yaml --lora --hours 2",
    )
    c.add_argument("checkpoint", metavar="CHECKPOINT")
    c.add_argument("--dataset", required=True, metavar="LEROBOT", help="or HDF5 files")
    _foreign(c)
    c.add_argument("--embodiment", metavar="FILE", help="what the dataset does not say: units, gripper (YAML)")
    c.add_argument("--out", default="runs/finetune", metavar="DIR", help="default: runs/finetune")
    c.add_argument("--lora", action="store_true", help="train adapters instead of every weight")
    c.add_argument("--lora-rank", type=int, default=16, help="of the adapters (default: 16)")
    c.add_argument("--hours", type=float, default=2.0, help="at most (default: 2)")
    c.add_argument("--steps", type=int, default=20_000, help="at most (default: 20000)")
    c.add_argument(
        "--task", action="append", default=[], metavar="ARROW", help="instead of the checkpoint's; repeatable"
    )
    c.add_argument("--rate-hz", type=float, help="steps per second; default: the dataset's")
    c.add_argument("--keep", type=float, default=0.2, help="share of rehearsed samples (default: 0.2)")
    c.add_argument("--tokens", metavar="DIR", help="the checkpoint's own token shards; default: where they were")
    c.add_argument("--ranks", type=int, help="processes on this machine; default: one per GPU")
    c.add_argument("--seed", type=int, default=0)
    c.add_argument("--prepare-only", action="store_true", help="stop before training: OUT/recipe.yaml runs anywhere")
    c.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the training recipe")

    c = add(
        commands,
        "predict",
        _predict,
        "fill the right side of an arrow at one moment of an episode",
        'mmseq predict runs/demo/checkpoint "image, action[8] -> image@+8" --episode shards/robot:3 --t 10 --out out',
    )
    c.add_argument("checkpoint", metavar="CHECKPOINT")
    c.add_argument("arrow", metavar="ARROW", help="an arrow, or the name of a built-in one such as policy")
    c.add_argument(
        "--episode", required=True, metavar="SRC:N", help="shards, a dataset, a video file or a folder of them"
    )
    c.add_argument("--t", type=int, default=0, help="the step that is now (default: 0)")
    c.add_argument("--text", help="in place of the episode's own")
    c.add_argument("--question")
    c.add_argument("--rate-hz", type=float, help="resample the episode; default: its own rate")
    c.add_argument("--embodiment", metavar="NAME", help="treat the episode as this robot's")
    c.add_argument("--temperature", type=float, default=0.0, help="0 takes the best code (default)")
    c.add_argument("--seed", type=int, default=0)
    c.add_argument("--device", help="default: cuda where there is one")
    c.add_argument("--out", metavar="DIR", help="write JSON, PNG and MP4 there")

    c = add(commands, "serve", _serve, "serve a checkpoint to robots, on openpi's websocket protocol and HTTP")
    c.add_argument("checkpoint", metavar="CHECKPOINT", nargs="?", help="what to serve; or see --config, --replay")
    c.add_argument("overrides", nargs="*", metavar="key=value", help="settings, such as gate.too_fast=refuse")
    c.add_argument("--config", metavar="FILE", help="settings as YAML; serve/server.yaml has them all")
    c.add_argument("--replay", metavar="DATASET:EPISODE", help="send the recorded actions of an episode: a dry run")
    c.add_argument("--host", help="default: 127.0.0.1; a public address needs a token")
    c.add_argument("--port", type=int, help="default: 8000; 0 takes a free one")
    c.add_argument("--token-file", metavar="FILE", help="clients must send its content as `Authorization: Api-Key`")
    c.add_argument("--insecure-public", action="store_true", default=None, help="a public address without a token")
    c.add_argument("--tls-cert", metavar="FILE", help="serve https and wss with this PEM certificate")
    c.add_argument("--tls-key", metavar="FILE", help="its private key")
    c.add_argument("--chunking", metavar="MODE", help="plain, ensemble or realtime, for clients that do not do it")
    c.add_argument("--execute", type=int, help="control steps between two requests of such a client")
    c.add_argument("--policy", metavar="ARROW", help="the arrow, or the mix's task, that answers `infer`")
    c.add_argument("--embodiment", metavar="NAME", help="the one robot to serve; default: all it knows")
    c.add_argument("--passes", type=int, metavar="N", help="forward passes per chunk, of a policy trained for it")
    c.add_argument("--device", help="default: cuda where there is one")

    c = add(commands, "eval", _eval, "drive the simulator through the server")
    c.add_argument("checkpoint", metavar="CHECKPOINT")
    c.add_argument("--tasks", metavar="A,B", help="Meta-World tasks; default: the demo's")
    c.add_argument("--episodes", type=int, default=20, help="unseen layouts per task (default: 20)")
    c.add_argument("--seed", type=int, default=100_000, help="of the first layout")
    c.add_argument("--execute", type=int, default=1, help="control steps of each chunk before the next request")
    c.add_argument("--chunking", default="plain", metavar="MODE", help="plain, ensemble or realtime (default: plain)")
    c.add_argument("--delay-ms", type=float, default=0, help="of an answer, in the simulator's time (default: 0)")
    c.add_argument("--jitter-ms", type=float, default=0, help="the delay varies by up to this much (default: 0)")
    c.add_argument("--passes", type=int, metavar="N", help="forward passes per chunk, of a policy trained for it")
    c.add_argument("--spread", type=float, help="of the layouts; default: the demo's")
    c.add_argument("--baselines", action="store_true", help="also blanked images, random actions and the expert")
    c.add_argument("--device", help="default: cuda where there is one")
    c.add_argument("--json", type=_file_to_write, metavar="FILE", help="write the results there")

    c = add(
        commands,
        "bench",
        _bench,
        "measure a part beside what one would use in its place, in turns; docs/benchmarks.md has figures",
        "throughput   training against transformers + DeepSpeed: width=256 layers=4 vocabulary=50000 seconds=120 ...\n"
        "loader       token shards and live video against lerobot: data=PATH_TO_LEROBOT_V3 window=1 seconds=60 ...\n"
        "loss         the range loss against full fp32 logits: positions=4096 vocabulary=150000 ...\n"
        "packing      useful slots of packed rows: blocks=4\n"
        "decode       a chunk of actions against transformers' generate: width=256 layers=4 passes=4 seconds=60 ...\n"
        "chunks       guessed and checked chunks of a checkpoint: checkpoint=CHECKPOINT data=EPISODES batch=8 ...\n"
        "serve        the server against openpi's: image=224 cameras=3 clients=32 seconds=20 ...",
    )
    c.add_argument("what", metavar="BENCH", choices=BENCHES)
    c.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the bench")
    c.add_argument("--json", type=_file_to_write, metavar="FILE", help="write the rows there as JSON")

    c = add(commands, "export", _export, "a checkpoint as a language model of transformers, or a policy of LeRobot")
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

    c = add(commands, "inspect", _inspect, "what a checkpoint is, or the size of a recipe's model")
    c.add_argument("path", metavar="CHECKPOINT|RECIPE")
    c.add_argument("overrides", nargs="*", metavar="key=value", help="for a recipe")
    c.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _foreign(command: argparse.ArgumentParser) -> None:
    """Options for datasets as others made them."""
    command.add_argument(
        "--map", metavar="STREAM=COLUMN,...", help="what other columns are, as action=actions,image.front=rgb; or YAML"
    )
    command.add_argument(
        "--swap-colours",
        type=lambda names: [name.strip() for name in names.split(",") if name.strip()],
        default=[],
        metavar="CAMERA,...",
        help="cameras whose red and blue were exchanged when they were stored",
    )
    command.add_argument(
        "--skip-bad",
        type=int,
        default=0,
        metavar="N",
        help="leave out up to N episodes that cannot be read (default: 0)",
    )


def _recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", metavar="RECIPE")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    try:
        args = _parse(argv)
        return args.run(args) or 0
    except (_Usage, MMSeqError) as error:
        if debug:
            raise
        message = " ".join(str(error).split("\n"))
        print(f"mmseq: error{_rank_note()}: {message}", file=sys.stderr, flush=True)
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
            raise _Usage("the deepspeed launcher adds --local_rank, which is not read: give it --no_local_rank")
        hint = did_you_mean(name, args.parser.options())
        if hasattr(args, "overrides"):
            hint += f"; a setting is written without dashes, {name.lstrip('-').replace('-', '_')}=VALUE"
        raise _Usage(f"unknown option {name!r} of `{args.parser.prog}`: {hint}")
    if rest and hasattr(args, "overrides"):  # argparse stops at the first option between positionals
        args.overrides = [*args.overrides, *rest]
    elif rest:
        raise _Usage(f"unexpected {rest[0]!r}; see `{args.parser.prog} --help`")
    return args


def _demo(args: argparse.Namespace) -> None:
    from mmseq.demo import DemoConfig, run_demo

    run_demo(
        DemoConfig(
            out=args.out,
            seed=args.seed,
            minutes=args.minutes,
            tasks=[t.strip() for t in args.tasks.split(",") if t.strip()] if args.tasks else [],
            data=args.data,
            episodes=args.episodes,
        )
    )


def _serve(args: argparse.Namespace) -> None:
    import logging
    from dataclasses import replace

    from mmseq.config import load_config
    from mmseq.serving.launch import ServeSettings, launch

    overrides = list(args.overrides)
    if args.checkpoint and "=" in args.checkpoint and not Path(args.checkpoint).exists():
        overrides, args.checkpoint = [args.checkpoint, *overrides], None
    settings = load_config(ServeSettings, args.config, overrides)
    if args.replay and args.config and not args.checkpoint:
        settings.checkpoint = None  # the file's settings, another thing to serve
    names = ("replay", "host", "port", "token_file", "insecure_public", "tls_cert", "tls_key", "policy", "embodiment")
    for name in ("checkpoint", *names, "passes", "device"):
        if getattr(args, name) is not None:
            setattr(settings, name, getattr(args, name))
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
    from mmseq.simulation.experts import DEMO_SPREAD, DEMO_TASKS

    config = ClosedLoopConfig(
        tasks=[t.strip() for t in args.tasks.split(",")] if args.tasks else list(DEMO_TASKS),
        episodes=args.episodes,
        seed=args.seed,
        chunking=args.chunking,
        execute=args.execute,
        delay_ms=args.delay_ms,
        jitter_ms=args.jitter_ms,
        passes=args.passes,
        spread=DEMO_SPREAD if args.spread is None else args.spread,
        keep=0,
        controllers=CONTROLLERS if args.baselines else ("policy", "random"),
    )
    with progress("driving the simulator", "episodes") as update:
        rollouts = evaluate_checkpoint(args.checkpoint, config, device=args.device, on_progress=update)
    print_summary(rollouts)
    if args.json:
        results = success_results(rollouts, args.seed) + splice_results(rollouts, args.seed)
        write_results(args.json, results)


def _doctor(args: argparse.Namespace) -> None:
    from mmseq.doctor import print_report

    print_report()


def _data_import(args: argparse.Namespace) -> None:
    from mmseq.data.importing import import_episodes
    from mmseq.data.mapping import read_map
    from mmseq.embodiment import Embodiment
    from mmseq.progress import progress

    with progress(f"importing {args.src}", "episodes") as update:
        manifest = import_episodes(
            args.src,
            args.out,
            format=args.format,
            rate_hz=args.rate_hz,
            embodiment=Embodiment.load(args.embodiment) if args.embodiment else None,
            map=read_map(args.map),
            swap_colours=args.swap_colours,
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
        )
    for source, what in done.items():
        text = "already complete, left as it is" if what == "kept" else "written"
        print(f"{Path(args.out) / source}: {text}")


def _data_lint(args: argparse.Namespace) -> int:
    from mmseq.data.lint import lint_mix

    lint = lint_mix(args.mix, args.tokens, args.tokenizers, row_tokens=args.row_tokens, root=args.root)
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

    if args.count < 1:
        raise ConfigError(f"-n {args.count} shows nothing", fix="give at least 1")
    tokenizers = Tokenizers.load(args.tokenizers)
    mixture = Mixture(load_mix(args.mix), args.tokens, tokenizers, row_tokens=args.row_tokens, seed=args.seed)
    for i, sample in enumerate(choose_samples(mixture, args.count)):
        sequence = mixture.build(sample)
        print(describe(mixture, sample, sequence), end="\n\n")
        if args.out:
            name = "".join(x if x.isalnum() else "_" for x in mixture.task_names[sample.task])
            for path in save_frames(mixture, sequence, args.out, f"{i:02d}_{name}"):
                print(path)


def _tokenizer_train(args: argparse.Namespace) -> None:
    from mmseq.config import load_config
    from mmseq.progress import progress
    from mmseq.tokenization.recipe import TokenizerConfig
    from mmseq.training.tokenizers import train_tokenizers

    config = load_config(TokenizerConfig, args.recipe, args.overrides)
    with progress("tokenizers", "steps") as update:
        report = train_tokenizers(config, on_progress=lambda stage, n, total: update(n, total, note=stage))
    _print_report(report)
    print(f"\n{config.out}: tokenizers and report.json")


def _tokenizer_eval(args: argparse.Namespace) -> None:
    from mmseq.data.sources import open_source
    from mmseq.tokenization.bundle import Tokenizers
    from mmseq.training.tokenizers import evaluate_tokenizers

    tokenizers = Tokenizers.load(args.tokenizers)
    source = open_source(args.data, embodiments=tokenizers.embodiments)
    report = evaluate_tokenizers(tokenizers, {Path(args.data).name: source})
    _print_report(report)
    if args.out:
        Path(args.out).write_text(json.dumps(report, indent=2) + "\n")


def _print_report(report: dict[str, Any]) -> None:
    from mmseq.inspection import flat

    for name, value in flat(report):
        print(f"{name}: {value}")


def _rank_note() -> str:
    """Which rank an error is of, where there are several."""
    from mmseq.training.ranks import find_ranks

    try:
        ranks = find_ranks(os.environ)
    except MMSeqError:
        return ""
    return f" (rank {ranks.rank})" if ranks.rank else ""


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
        line = f"mmseq: error{_rank_note()}: {' '.join(str(error).splitlines())}"
        print(line, file=sys.stderr, flush=True)
        # other ranks may wait in a collective for this one: the launcher ends them when this process is gone
        leave(EXIT_ERROR, line)
        return EXIT_ERROR
    leave(0)
    return 0


def _finetune(args: argparse.Namespace) -> int:
    from mmseq.data.mapping import read_map
    from mmseq.progress import progress
    from mmseq.training.distributed import EXIT_PREEMPTED, Preempted
    from mmseq.training.finetune import FinetuneConfig, before_and_after, prepare
    from mmseq.training.local import local_ranks, train_here

    out = Path(args.out)
    config = FinetuneConfig(
        checkpoint=args.checkpoint,
        dataset=args.dataset,
        out=args.out,
        map=read_map(args.map),
        swap_colours=args.swap_colours,
        skip_bad=args.skip_bad,
        embodiment=args.embodiment,
        rate_hz=args.rate_hz,
        tasks=args.task,
        lora=args.lora,
        lora_rank=args.lora_rank,
        hours=args.hours,
        steps=args.steps,
        keep=args.keep,
        tokens=args.tokens,
        seed=args.seed,
        settings=args.overrides,
        ranks=args.ranks or local_ranks(),
    )
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
    plan = dry_run(config, gpus=gpus, gpu=args.gpu, mfu=args.mfu)
    print_plan(plan)
    for problem in plan.problems:
        print(f"mmseq: error: {problem}", file=sys.stderr)
    return EXIT_ERROR if plan.problems else 0


def _predict(args: argparse.Namespace) -> None:
    from mmseq.data.sources import open_source
    from mmseq.inference.output import to_json, write_prediction
    from mmseq.model.device import default_device
    from mmseq.model.sequence_model import SequenceModel

    model = SequenceModel.from_pretrained(args.checkpoint, device=args.device or default_device())
    assert model.tokenizers is not None
    path, index = _episode_address(args.episode)
    source = open_source(path, rate_hz=args.rate_hz, embodiments=model.tokenizers.embodiments)
    if index >= len(source):
        raise DataError(f"{path} has {len(source)} episodes, numbered from 0: there is no {index}")
    episode = source[index]
    if args.embodiment:
        episode.embodiment = model.tokenizers.embodiment(args.embodiment).name
    prediction = model.predict(
        args.arrow,
        episode,
        args.t,
        text=args.text,
        question=args.question,
        temperature=args.temperature,
        seed=args.seed,
    )
    record = write_prediction(prediction, episode, model.tokenizers, args.out)
    print(to_json(record))


def _file_to_write(text: str) -> Path:
    """A file that is written at the end of long work: its folder has to be there before."""
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: {path.absolute().parent} must be a folder")
    return path


def _episode_address(text: str) -> tuple[Path, int]:
    """`SRC:N`, or `SRC` alone for its first episode."""
    path, colon, number = text.rpartition(":")
    if colon and number.isdigit():
        return Path(path), int(number)
    if colon and not Path(text).exists():
        raise ConfigError(f"--episode {text!r}: {number!r} is not a number", fix="write SRC:N, such as shards/robot:3")
    return Path(text), 0


def _bench(args: argparse.Namespace) -> None:
    from importlib import import_module

    from mmseq.bench.rows import report
    from mmseq.config import load_config

    bench = import_module(f"mmseq.bench.{args.what}")
    rows, notes = bench.bench(load_config(bench.Config, None, args.overrides))
    report(rows, args.json, notes)


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
