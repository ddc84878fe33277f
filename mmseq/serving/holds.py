"""The operators' holds: each with an id and a reason, ended one by one, kept in a file where one is named.

A robot moves again when none is left. With a file they are in force again after the process ended in whatever way;
a file that cannot be read is a hold by itself. A file belongs to one server, which locks `FILE.lock` beside it.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
from pathlib import Path
from typing import IO, Any

from mmseq.errors import ServeError
from mmseq.serving.errors import RequestError

log = logging.getLogger("mmseq.serving")

NO_REASON = "no reason given"
REASON_LENGTH = 500  # characters
READ = 1 << 16  # bytes of a body in which the reason is looked for
READ_FILE = 16 << 20
MOST = 1000  # holds with an id of their own
SHARED = "more"  # the id of those beyond


def reason_of(body: bytes | bytearray) -> str:
    """What a hold's body says, in whatever form: `{"reason": text}`, or any text. One line."""
    text = body[:READ].decode("utf-8", "replace")
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        given = text
    if isinstance(given, dict):
        given = given.get("reason")
    return clean(given if isinstance(given, str) else "" if given is None else str(given))


def clean(reason: str) -> str:
    """Without what would write lines of its own into a log or a terminal."""
    reason = "".join(c if c.isprintable() else " " for c in reason[:REASON_LENGTH]).strip()
    return reason or NO_REASON


_WRITABLE = "name a hold_file in a folder that may be written"


def _locked(path: Path) -> IO[str]:
    """The lock of a file of holds, while it is open. Raises: ServeError."""
    try:
        if path.exists() and not path.is_file():
            raise ServeError(f"hold_file {path} is no file", fix=_WRITABLE)
        lock = open(path.with_name(f"{path.name}.lock"), "w")  # noqa: SIM115
    except OSError as error:
        raise ServeError(f"hold_file {path} cannot be written: {error.strerror}", fix=_WRITABLE) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise ServeError(
            f"hold_file {path} is used by another server, and each would end the other's holds",
            fix="name another one, or stop that server",
        ) from error
    except OSError as error:  # a file system without locks
        log.warning("hold_file %s cannot be locked: %s; no other server may use it", path, error.strerror)
    return lock


class Holds:
    """Those in force. begun: how many since the start; what was asked before the last one is not answered after it.

    path: where they are written. Raises: ServeError when they cannot be, or when it is another server's.
    """

    def __init__(self, path: str | Path | None = None):
        self.path = None if path is None else Path(os.path.realpath(path))  # a link stays one
        self._lock: IO[str] | None = None
        self.reasons: dict[str, str] = {}  # by id, the oldest first
        self.begun = 0
        self.problem: str | None = None  # why the file does not say what is in force
        if self.path is not None:
            self._lock = _locked(self.path)
            self._read(self.path)

    def close(self) -> None:
        """Another server may have the file."""
        if self._lock is not None:
            self._lock.close()

    def __str__(self) -> str:
        """The reasons, as a robot is told them."""
        reasons = list(self.reasons.values())
        return "; ".join(reasons[:3]) + (f"; and {len(reasons) - 3} more" if len(reasons) > 3 else "")

    def listed(self) -> list[dict[str, str]]:
        return [{"id": id, "reason": reason} for id, reason in self.reasons.items()]

    def begin(self, reason: str, id: str | None = None) -> str:
        """The id of a new hold; with that of one in force, its reason is another from now on."""
        if id is None:
            id = secrets.token_hex(4) if len(self.reasons) < MOST else SHARED
        if id not in self.reasons:
            self.begun += 1
        self.reasons[id] = reason
        self._write()
        return id

    def end(self, id: str | None = None, *, every: bool = False) -> dict[str, str]:
        """End the hold `id`, without one the only hold, or every one. Returns: what was ended.

        Raises: RequestError that lists those in force.
        """
        if id is not None and id not in self.reasons:
            raise self._refusal("not_found", f"there is no hold {id[:40]!r}", "use an id of `holds`")
        if id is None and not every and len(self.reasons) > 1:
            listed = ", ".join(f"{id} ({reason[:60]})" for id, reason in list(self.reasons.items())[:8])
            what = f"{len(self.reasons)} holds are in force: {listed}"
            raise self._refusal("ambiguous", what, "end one with ?id=ID, or every one with ?all=true")
        ended = {id: self.reasons.pop(id) for id in ([id] if id is not None else list(self.reasons))}
        self._write()
        return ended

    def _refusal(self, code: str, message: str, fix: str) -> RequestError:
        return RequestError(code, message, key="id", fix=fix, details={"holds": self.listed()})

    def _read(self, path: Path) -> None:
        try:
            with open(path) as file:
                found: Any = json.loads(file.read(READ_FILE))["holds"]
            self.reasons = {clean(str(id)): clean(reason) for id, reason in found.items()}
        except FileNotFoundError:
            pass  # the first start
        except Exception as error:  # whatever it is, what it said is not known
            log.error("hold_file %s cannot be read, so every robot is held: %r", path, error)
            self.reasons = {
                secrets.token_hex(4): f"hold_file {path} cannot be read: see the log, and release when it is safe"
            }
            return  # and keep it as it is until an operator has decided
        self._write()
        if self.problem is not None:
            raise ServeError(self.problem, fix=_WRITABLE)
        for id, reason in self.reasons.items():
            log.warning("held as before this start: %s (%s)", reason, id)

    def _write(self) -> None:
        """So that it is there also after power is lost. What is in force does not wait for it."""
        if self.path is None:
            return
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}.partial")
        try:
            with open(partial, "w") as file:
                json.dump({"holds": self.reasons}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.path)
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
            self.problem = None
        except OSError as error:
            self.problem = f"hold_file {self.path} cannot be written: {error.strerror}"
            log.error("%s", self.problem)
