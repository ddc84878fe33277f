"""Training on this machine from within another command: torchrun, as a user would start it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from mmseq.errors import MMSeqError
from mmseq.training.distributed import EXIT_PREEMPTED, Preempted

SAID = ("step ", "stopped ")  # beginnings of the lines that are passed on
TAIL_LINES = 15
# the line of a traceback that names the exception, as Python prints it and as torch does in a rank
_EXCEPTION = re.compile(
    r"(?P<rank>\[rank\d+\]: ?)?(?P<what>[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit)(?::.*)?)$"
)


def local_ranks() -> int:
    """One rank per GPU; without one, two where there are two cores."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.device_count()
    return 2 if (os.cpu_count() or 1) >= 2 else 1


def train_here(
    recipe: Path, overrides: Sequence[str], *, ranks: int, log: Path, say: Callable[[str], None] = print
) -> None:
    """Run `mmseq train RECIPE overrides...` in `ranks` processes. log: gets all that they print; say: the progress.

    SIGTERM is handed on. Raises: Preempted when the ranks saved and ended for it; MMSeqError with the end of the log
    when they failed.
    """
    command = [
        *(sys.executable, "-m", "mmseq.training.torchrun", "--nproc-per-node", str(ranks)),
        # torchrun listens on a port of its own choice; one chosen here could be taken before it gets there.
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"),
        *("-m", "mmseq", "train", str(recipe)),
        *overrides,
    ]
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    env = {**os.environ, "OMP_NUM_THREADS": threads, "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
    with log.open("w") as file:
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=file, text=True)
        assert process.stdout is not None
        before = signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(number))
        try:
            shown = False
            for line in process.stdout:
                file.write(line)
                shown = line.startswith(SAID) or "parameters" in line or (shown and line.startswith("  "))
                if shown:
                    say(line.rstrip())
            code = process.wait()
        except BaseException:  # the command was interrupted: its ranks must not train on
            process.terminate()
            process.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
    if code == EXIT_PREEMPTED:
        raise Preempted("asked to stop: the same command goes on from what was saved")
    if code:
        lines = log.read_text(errors="replace").splitlines()
        raise MMSeqError(f"training ended with code {code} ({log}): {what_failed(lines, code)}")


def what_failed(lines: Sequence[str], code: int) -> str:
    """Of what ranks and torchrun said, the line that tells why; the end of it all where none does.

    It is an error of ours, else the exception of the rank that failed first (others may only have lost it), which
    torch marks with `[rank0]:` once ranks have met; torchrun's table says nothing of either.
    """
    own = [line for line in lines if line.startswith("mmseq: error")]
    if own:
        return own[0]
    found = [match for line in lines if (match := _EXCEPTION.match(line))]
    marked = [match for match in found if match["rank"]]
    killed = code - 128 if code > 128 else 0
    by = f"a rank was killed by {signal.Signals(killed).name if killed in set(signal.Signals) else killed}"
    if killed == signal.SIGKILL:  # others only lose it
        return f"{by}, as the system does when memory runs out"
    if marked:
        return f"{marked[0]['rank']}{marked[0]['what']}"
    if killed and not (killed == signal.SIGABRT and found):  # some libraries abort on the way out
        return by
    if found:
        return found[-1]["what"]
    return "\n".join(lines[-TAIL_LINES:])
