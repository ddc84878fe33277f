"""Doctor: what this machine has, and what mmseq will use of it.

mmseq doctor
"""

from __future__ import annotations

import ctypes.util
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
from dataclasses import dataclass


@dataclass
class Finding:
    """One line of the report. state: `ok`, `missing` (something cannot be used) or `info`."""

    topic: str
    state: str
    text: str


def examine() -> list[Finding]:
    """Everything that `mmseq doctor` prints."""
    import mmseq

    findings = [
        Finding("mmseq", "info", f"{mmseq.__version__} in {os.path.dirname(mmseq.__file__)}"),
        Finding("Python", "info", f"{platform.python_version()} on {platform.platform()}"),
        Finding("CPU", "info", f"{_cores()} of {os.cpu_count()} cores for this process"),
        Finding("memory", "info", _memory()),
    ]
    return [*findings, *_torch(), *_extras(), *_plugins(), *_tools()]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> str:
    try:
        with open("/proc/meminfo") as file:
            kib = {line.split(":")[0]: int(line.split()[1]) for line in file if line.split()[1:]}
        return f"{kib['MemAvailable'] / 2**20:.1f} GiB available of {kib['MemTotal'] / 2**20:.1f}"
    except (OSError, KeyError, ValueError):
        return "unknown"


def _torch() -> list[Finding]:
    import torch

    from mmseq.model.attention import BACKENDS, choose_backend, why_not
    from mmseq.model.device import default_device

    found = [Finding("torch", "info", f"{torch.__version__}, {torch.get_num_threads()} threads")]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            found.append(
                Finding(f"GPU {i}", "ok", f"{p.name}, {p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}")
            )
        fast = torch.cuda.is_bf16_supported()
        found.append(
            Finding("bf16", "ok" if fast else "missing", "in hardware" if fast else "this GPU has none: use fp32")
        )
    else:
        found.append(Finding("GPU", "info", "none: training and inference run on the CPU"))
        supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        fast = bool(supported and supported())
        text = "avx512_bf16, several times faster than fp32" if fast else "emulated: deepspeed.dtype=fp32 is faster"
        found.append(Finding("bf16", "ok" if fast else "info", text))
    device = default_device()
    backend, why = choose_backend(device)
    able = [name for name in BACKENDS if why_not(name, device) is None]
    unable = [f"{name} needs {why_not(name, device)}" for name in BACKENDS if name not in able]
    return [
        *found,
        Finding("attention", "ok", f"{backend} ({why})"),
        Finding("attention backends", "info", "; ".join([f"{', '.join(able)} can run", *unable])),
    ]


def _extras() -> list[Finding]:
    """What each extra of the distribution needs, and whether it is there."""
    try:
        lines = importlib.metadata.requires("mmseq") or []
    except importlib.metadata.PackageNotFoundError:
        return [Finding("extras", "info", "unknown: mmseq is not installed, only importable")]
    extras: dict[str, list[str]] = {}
    for line in lines:
        match = re.match(r"([A-Za-z0-9._-]+).*;\s*extra\s*==\s*['\"](\w+)['\"]", line)
        if match and match[1].lower() != "mmseq":
            extras.setdefault(match[2], []).append(match[1])
    found = []
    for extra, packages in extras.items():
        absent = [name for name in packages if not _installed(name)]
        text = f"lacks {', '.join(absent)}; install with: pip install 'mmseq[{extra}]'" if absent else "installed"
        found.append(Finding(f"extra {extra}", "missing" if absent else "ok", text))
    return found


def _plugins() -> list[Finding]:
    """What other packages bring, and whether it can be used."""
    from mmseq.plugins import installed

    found = [
        Finding(
            f"plug-in {one.group}",
            "missing" if one.problem else "ok",
            f"{one.name} of {one.distribution} ({one.target})" + (f": {one.problem}" if one.problem else ""),
        )
        for one in installed()
    ]
    return found or [Finding("plug-ins", "info", "none installed; docs/extending.md")]


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _tools() -> list[Finding]:
    ffmpeg = shutil.which("ffmpeg")
    egl = ctypes.util.find_library("EGL")
    return [
        Finding("video", "ok", f"PyAV {importlib.metadata.version('av')} (brings its own FFmpeg)"),
        Finding("ffmpeg", "info", ffmpeg or "not on PATH; mmseq does not need it"),
        Finding(
            "EGL",
            "ok" if egl else "missing",
            f"{egl}: MUJOCO_GL=egl renders without a screen"
            if egl
            else "not found: simulation renders with MUJOCO_GL=osmesa",
        ),
    ]


def print_report() -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    colours = {"ok": "green", "missing": "yellow", "info": "default"}
    for finding in examine():
        mark = {"ok": "yes", "missing": "no", "info": ""}[finding.state]
        table.add_row(finding.topic, f"[{colours[finding.state]}]{mark}[/]", finding.text.replace("[", r"\["))
    Console(soft_wrap=True, highlight=False).print(table)
