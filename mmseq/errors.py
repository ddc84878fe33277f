"""Errors that a user can act on: what was wrong, where, and the way out.

The command line prints an `MMSeqError` as one line and exits with code 2; anything else is a bug
and exits with a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MMSeqError(Exception):
    """Base of all errors caused by input, configuration or files. `fix` says what to do."""

    def __init__(self, message: str, *, fix: str | None = None):
        stop = "" if message.endswith((".", "?", "!")) else "."
        super().__init__(message if fix is None else f"{message}{stop} {fix[0].upper()}{fix[1:]}.")
        self.fix = fix


class TaskError(MMSeqError):
    """An arrow that does not parse, or that an episode cannot fill."""


class EpisodeError(MMSeqError):
    """An episode whose streams are missing, wrong-shaped, NaN or out of range."""


class EmbodimentError(MMSeqError):
    """A robot contract that is incomplete or contradicts the data."""


class FingerprintError(MMSeqError):
    """Two artefacts that do not belong together: tokenizer, embodiment, shard, checkpoint."""


class ConfigError(MMSeqError):
    """An unknown key, a bad value, or settings that contradict each other."""


class DataError(MMSeqError):
    """A dataset, video, shard or mix that is empty, truncated, corrupt or unknown."""


class CheckpointError(MMSeqError):
    """A directory that is not a checkpoint, or an incomplete one."""


class DependencyError(MMSeqError):
    """An optional package that is needed here and not installed."""


class ModelError(MMSeqError):
    """A model that computes numbers that are not finite: nothing that it says may be used."""


class ServeError(MMSeqError):
    """A server that cannot start, or a request that it must refuse."""


def raise_all(problems: Iterable[MMSeqError]) -> None:
    """Raise what was found, as one error of the kind of the first; nothing when there is none."""
    found = list(problems)
    if len(found) == 1:
        raise found[0]
    if found:
        raise type(found[0])(f"{len(found)} problems: " + "; ".join(str(p).rstrip(".") for p in found))


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """A sentence naming the closest option, else all of them: `did you mean 'image'?`"""
    options = sorted(set(options))
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"choose one of: {', '.join(options)}" if options else "there are none to choose from"


def require(package: str, extra: str):
    """Import an optional package, or say which extra installs it.

    extra: of mmseq, or where a package of ours lies. Raises: DependencyError when it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        where = extra if "/" in extra else f"'mmseq[{extra}]'"
        raise DependencyError(
            f"{package!r} is not installed ({error})", fix=f"install it with: pip install {where}"
        ) from error
