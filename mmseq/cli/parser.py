"""How a command is declared: argparse with whole names and suggestions, and options that are fields of a dataclass."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from mmseq.errors import MMSeqError, did_you_mean
from mmseq.fields import default_of, field_texts
from mmseq.reading import Reading

EXIT_ERROR = 2


class Usage(Exception):
    """A command line that cannot be understood."""


class Parser(argparse.ArgumentParser):
    """argparse with whole option names only, and with a suggestion for a name that is unknown.

    declare: adds the options of a command, when it is the one that runs: others need not be imported.
    """

    def __init__(self, *args: Any, declare: Callable[[Parser], None] | None = None, **options: Any):
        super().__init__(*args, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
        self.set_defaults(parser=self)
        self._declare = declare

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._declare is not None:
            declare, self._declare = self._declare, None
            declare(self)
        return super().parse_known_args(args, namespace)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            what = "command" if isinstance(action, argparse._SubParsersAction) else str(action.metavar or action.dest)
            raise Usage(f"unknown {what} {value!r}: {did_you_mean(str(value), map(str, action.choices))}")

    def error(self, message: str) -> NoReturn:
        raise Usage(f"{message}; see `{self.prog} --help`")

    def options(self) -> list[str]:
        return [name for name in self._option_string_actions if name.startswith("--")]

    def fields(self, schema: type, **metavars: str | None) -> None:
        """An option for each named field of a dataclass: its name, type, default and text. `filled` reads them back.

        A list is written with commas. metavars: field -> what stands for its value in the help.
        """
        hints, texts = get_type_hints(schema), field_texts(schema)
        for name, metavar in metavars.items():
            default, hint = default_of(schema, name), hints[name]
            kind = next((part for part in get_args(hint) if part is not type(None)), hint)
            stated = isinstance(default, (str, int, float)) and "default" not in texts[name]
            said = f" (default: {_plain(default)})" if stated else ""
            how: dict[str, Any] = {"metavar": metavar, "type": _words if get_origin(hint) is list else kind}
            if kind is bool:
                how, said = {"action": "store_true"}, ""
            self.add_argument(
                f"--{name.replace('_', '-')}",
                dest=name,
                default=None,
                required=default is MISSING,
                help=(texts[name] + said).replace("%", "%%"),
                **how,
            )


class Group:
    """Commands beside each other, of `mmseq` or of one of its commands."""

    def __init__(self, parser: Parser, dest: str):
        self._commands = parser.add_subparsers(dest=dest, metavar="COMMAND", required=True)

    def add(
        self, name: str, run: Callable, declare: Callable[[Parser], None] | None, help: str, description: str = ""
    ) -> None:
        """run(args): may return an exit code. declare: adds the command's options."""
        full = f"{help}\n\n{description}".strip()
        self._commands.add_parser(name, help=help, description=full, declare=declare).set_defaults(run=run)

    def group(self, name: str, help: str) -> Group:
        return Group(self._commands.add_parser(name, help=help, description=help), "subcommand")


def filled[T](schema: type[T], args: argparse.Namespace, **more: Any) -> T:
    """The dataclass with what the command line gave; its own defaults for the rest."""
    return schema(**given(args, *(f.name for f in fields(schema))) | more)  # type: ignore[arg-type]


def given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Which of these options were given, by name."""
    return {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}


def add_overrides(command: Parser, of: str) -> None:
    command.add_argument("overrides", nargs="*", metavar="key=value", help=of)


def add_recipe(command: Parser) -> None:
    command.add_argument("recipe", metavar="RECIPE")
    add_overrides(command, "settings that replace the recipe's")


def add_reading(command: Parser) -> None:
    """Options for datasets as others made them, at every command that opens one; `filled(Reading, args)` has them."""
    command.fields(Reading, map="STREAM=COLUMN,...", swap_colours="CAMERA,...", assume_success=None)


def file_to_write(text: str) -> Path:
    """A file that is written at the end of long work: its folder has to be there before."""
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: {path.absolute().parent} must be a folder")
    return path


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _plain(value: str | float) -> str:
    return str(value) if isinstance(value, (str, int)) else f"{value:g}"


def rank_note() -> str:
    """Which rank an error is of, where there are several."""
    from mmseq.training.ranks import find_ranks

    try:
        ranks = find_ranks(os.environ)
    except MMSeqError:
        return ""
    return f" (rank {ranks.rank})" if ranks.rank else ""
