"""Worker: a side of a bench in a process of its own, so that its memory is its own; and clocks and memory there."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class PeakMemory:
    """Bytes that this process had at most since `start`, above what it had then.

    On a GPU what torch has allocated there, else the resident set as Linux counts it.
    """

    def start(self) -> None:
        import torch

        self.gpu = torch.cuda.is_available()
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
            self.before = _status("VmRSS")

    def read(self) -> int:
        import torch

        return (torch.cuda.max_memory_allocated() if self.gpu else _status("VmHWM")) - self.before


def _status(field: str) -> int:
    found = re.search(field + r":\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def peak_allocated(call: Callable[[], Any]) -> int:
    """The most bytes that torch holds at once during `call` beyond what it held before, exact to the tensor."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()  # type: ignore[attr-defined]
        peak = max(peak, held)
    return peak


def synchronised_clock() -> float:
    """Seconds; the GPU has finished what it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def milliseconds(run: Callable[[], object]) -> float:
    """How long a call takes, the GPU's part of it included."""
    began = synchronised_clock()
    run()
    return 1000 * (synchronised_clock() - began)


class Worker:
    """An object in a process of its own, so that its memory is its own; calls wait for their answer.

    make: a function at the top level of a module, with its arguments. Raises: what the call raised there, as text.
    """

    def __init__(self, make: Callable[..., Any], *args: Any):
        import multiprocessing

        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, args))
        self._process.start()
        theirs.close()
        self._answer()

    def __call__(self, method: str, *args: Any) -> Any:
        self._pipe.send((method, args))
        return self._answer()

    def _answer(self) -> Any:
        from mmseq.errors import MMSeqError

        try:
            fine, value = self._pipe.recv()
        except EOFError:
            raise MMSeqError(
                "a process of the bench ended, perhaps for want of memory", fix="use a smaller size"
            ) from None
        if not fine:
            raise MMSeqError(f"a process of the bench failed: {value}")
        return value

    def close(self) -> None:
        self._pipe.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()


def _serve(pipe: Any, make: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import multiprocessing
    import traceback

    try:
        made = make(*args)
        pipe.send((True, None))
        while True:
            method, arguments = pipe.recv()
            pipe.send((True, getattr(made, method)(*arguments)))
    except EOFError:
        pass
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    for child in multiprocessing.active_children():  # of a loader: they would outlive this process
        child.kill()
    os._exit(0)  # DeepSpeed's threads can abort a normal exit
