"""Closed loop: a policy drives the simulator through the server, with the client that robots use.

    mmseq eval runs/demo/checkpoint --tasks window-open --episodes 20

The server runs in this process; each worker is a simulator in a process of its own that connects to
it over loopback. Baselines run beside it: the same policy with blanked images, and those of `controllers`.

Time is the simulator's: one control step passes while the loop does one tick, however long a request takes here,
and its answer arrives `delay_ms` (+- `jitter_ms`) of that time later. What a delay costs can so be measured on
any machine:

    mmseq eval CHECKPOINT --chunking realtime --execute 8 --delay-ms 200 --jitter-ms 50
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmseq.errors import ConfigError, did_you_mean, require
from mmseq.evaluation.controllers import make_controller
from mmseq.evaluation.driver import Driver
from mmseq.evaluation.results import Result, wilson
from mmseq.evaluation.splices import Splices
from mmseq.plugins import find
from mmseq.simulation.experts import DEMO_SPREAD, DEMO_TASKS
from mmseq.simulation.workers import environment, run_jobs

CONTROLLERS = ("policy", "blanked_images", "random", "hold", "replay", "expert_tokens")


@dataclass(kw_only=True)
class ClosedLoopConfig:
    """What is driven and how."""

    tasks: list[str] = field(default_factory=list)  # default: all of the simulator's; the demo's in Meta-World
    episodes: int = 20  # unseen layouts per task
    seed: int = 100_000  # of the first layout; episode i of a task uses seed + i
    policy: str | None = None  # the arrow, or the mix's task, that drives; default: the one called policy
    chunking: str = "plain"  # how chunks become actions: plain, ensemble or realtime
    execute: int = 1  # control steps of each chunk before the next request
    delay_ms: float = 0.0  # of an answer, in the simulator's time
    jitter_ms: float = 0.0  # the delay varies by up to this much to either side, never below 0
    passes: int | None = None  # forward passes per chunk, of a policy trained for it
    max_steps: int = 90  # control steps after which an episode has failed
    simulator: str = "metaworld"  # a name among the simulators, built in or a plug-in's
    spread: float | None = None  # how far layouts vary, where the simulator takes it; default: the demo's in Meta-World
    keep: int = 1  # episodes per task whose frames are returned
    workers: int = 2  # simulators at once, each in a process of its own
    controllers: tuple[str, ...] = ("policy",)  # among `CONTROLLERS`


@dataclass
class Rollout:
    """One episode. frames: uint8 (steps, H, W, 3), kept for some. seconds: of waiting for the server. held: control
    steps without a valid action. splices: where a new chunk took over from another (see `Splices`)."""

    controller: str
    task: str
    seed: int
    success: bool
    steps: int
    requests: int = 0
    seconds: float = 0.0
    held: int = 0
    splices: Splices | None = None
    frames: np.ndarray | None = None


def evaluate_checkpoint(
    checkpoint: str | Path,
    config: ClosedLoopConfig,
    *,
    device: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Rollout]:
    """Run every controller on every task; rollouts in the order (controller, task, seed).

    device: default a GPU where there is one.

    Raises: ConfigError for an unknown task or controller, before anything starts.
    """
    from mmseq.serving.model_policy import ModelPolicy

    simulator = find("simulators", config.simulator)
    known = simulator.tasks()
    config = _with_defaults(config, known)
    for task in config.tasks:
        if task not in known:
            raise ConfigError(f"{config.simulator} has no task {task!r}: {did_you_mean(task, known)}")
    unknown = set(config.controllers) - set(CONTROLLERS)
    if unknown or not config.tasks or config.episodes < 1:
        raise ConfigError(
            f"nothing to evaluate: tasks {config.tasks}, episodes {config.episodes}, "
            f"unknown controllers {sorted(unknown)}",
            fix=f"name tasks, episodes of at least 1, and controllers among {', '.join(CONTROLLERS)}",
        )
    if config.delay_ms < 0 or config.jitter_ms < 0:
        raise ConfigError(f"delay_ms is {config.delay_ms}, jitter_ms {config.jitter_ms}", fix="use 0 or more")
    client = require("mmseq_client", "./serve/client")
    try:
        client.Chunking(config.chunking, config.execute)
    except client.ClientError as error:
        raise ConfigError(str(error)) from error
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - config.workers))  # the simulators need the cores more than small products do
    try:
        policy = ModelPolicy.from_pretrained(checkpoint, device=device, arrow=config.policy, passes=config.passes)
        return _serve_and_drive(policy, simulator, config, on_progress)
    finally:
        torch.set_num_threads(threads)


def _with_defaults(config: ClosedLoopConfig, known: Sequence[str]) -> ClosedLoopConfig:
    """The config with what its simulator decides. Meta-World's tasks are too many, and too alike in their layouts, to
    be driven by default; another simulator need not know of a spread."""
    if config.simulator != "metaworld":
        return replace(config, tasks=config.tasks or list(known))
    spread = DEMO_SPREAD if config.spread is None else config.spread
    return replace(config, tasks=config.tasks or list(DEMO_TASKS), spread=spread)


def _serve_and_drive(
    policy: Any, simulator: Any, config: ClosedLoopConfig, on_progress: Callable[[int, int], None] | None
) -> list[Rollout]:
    from mmseq.serving import Server, ServerConfig
    from mmseq.serving.model_policy import ModelPolicy

    if config.execute > policy.horizon:
        raise ConfigError(
            f"execute is {config.execute}, the policy's chunks have {policy.horizon} control steps", fix="use fewer"
        )
    bins = policy.tokenizers["action"].size
    with Server(policy, ServerConfig(port=0)) as seeing:
        options = {"arrow": str(policy.arrow), "name": policy.name, "passes": policy.passes}
        blind = ModelPolicy(policy.model, **options, blank_images=True)
        with Server(blind, ServerConfig(port=0)) as blanked:
            ports = {"policy": seeing.port, "blanked_images": blanked.port}
            jobs = [
                (
                    *(simulator, controller, task, start, min(start + 5, config.episodes)),
                    *(asdict(config), ports.get(controller), bins),
                )
                for controller in config.controllers
                for task in config.tasks
                for start in range(0, config.episodes, 5)
            ]
            total = len(config.controllers) * len(config.tasks) * config.episodes
            return list(run_jobs(_drive, jobs, config.workers, total, on_progress))


def _drive(job: tuple) -> list[Rollout]:
    """A few episodes of one task under one controller, in a worker process."""
    simulator, controller, task, start, stop, settings, port, bins = job
    scene = {} if settings["spread"] is None else {"spread": settings["spread"]}
    env = environment((simulator, task, settings["spread"]), lambda: simulator(task, **scene))
    client = None
    if port is not None:
        from mmseq_client import Client

        client = Client("127.0.0.1", port)
    try:
        out = []
        for index in range(start, stop):
            seed = settings["seed"] + index
            keep = index < settings["keep"] and controller == "policy"
            out.append(_episode(env, controller, seed, client, settings, bins, keep))
        return out
    finally:
        if client is not None:
            client.close()


def _episode(env: Any, controller: str, seed: int, client: Any, settings: dict, bins: int, keep: bool) -> Rollout:
    env.reset(seed)
    rollout = Rollout(controller, env.task, seed, False, 0)
    frames: list[np.ndarray] = []
    rng = np.random.default_rng(seed)
    driver = None if client is None else Driver(env, client, settings, rng, seed)
    steps = settings["max_steps"]
    act = driver.next_action if driver else make_controller(controller, env, seed, rng, bins=bins, max_steps=steps)
    while not rollout.success and rollout.steps < steps:
        if keep:
            frames.append(env.render())
        rollout.success = bool(env.act(act()))
        rollout.steps += 1
    if keep:
        rollout.frames = np.stack([*frames, env.render()])
    if driver is not None:
        rollout.requests, rollout.held = driver.loop.counts["requests"], driver.loop.counts["held"]
        rollout.seconds, rollout.splices = driver.executor.busy_s, driver.splices.found
    return rollout


def success_results(rollouts: Sequence[Rollout], seed: int) -> list[Result]:
    """Success overall and per task, with the blanked policy, random actions and the expert beside it."""

    def rate(controller: str, task: str | None = None) -> float | None:
        chosen = [r.success for r in rollouts if r.controller == controller and task in (None, r.task)]
        return sum(chosen) / len(chosen) if chosen else None

    out: list[Result] = []
    tasks = sorted({r.task for r in rollouts})
    count = lambda controller, task=None: sum(r.controller == controller and task in (None, r.task) for r in rollouts)

    def add(name: str, controller: str, baselines: tuple[str, ...], task: str | None = None) -> None:
        value = rate(controller, task)
        baseline = next((b for b in baselines if rate(b, task) is not None), None)
        if value is not None and baseline is not None:
            out.append(
                Result(
                    name=name,
                    value=value,
                    unit="share",
                    better="higher",
                    baseline_name=baseline,
                    baseline_value=rate(baseline, task),  # type: ignore[arg-type]
                    n=count(controller, task),
                    seed=seed,
                )
            )

    add("policy.success", "policy", ("blanked_images", "random"))
    add("policy.success_over_random", "policy", ("random",))
    for controller in ("expert_tokens", "hold", "replay"):
        add(f"{controller}.success", controller, ("random",))
    for task in tasks:
        add(f"policy.success.{task}", "policy", ("blanked_images", "random"), task)
        add(f"expert_tokens.success.{task}", "expert_tokens", ("random",), task)
    return out


def summarise(rollouts: Sequence[Rollout]) -> list[dict[str, Any]]:
    """Rows for a table: per controller and task, successes, episodes and the Wilson interval."""
    rows = []
    for controller in CONTROLLERS:
        for task in [*sorted({r.task for r in rollouts}), None]:
            chosen = [r for r in rollouts if r.controller == controller and task in (None, r.task)]
            if chosen:
                wins = sum(r.success for r in chosen)
                low, high = wilson(wins, len(chosen))
                rows.append(
                    {
                        "controller": controller,
                        "task": task or "all",
                        "successes": wins,
                        "episodes": len(chosen),
                        "low": low,
                        "high": high,
                    }
                )
    return rows


def splice_results(rollouts: Sequence[Rollout], seed: int) -> list[Result]:
    """How smoothly the policy's chunks followed each other, and for how much of the time it had none."""
    driven = [r for r in rollouts if r.controller == "policy" and r.splices is not None]
    steps = sum(r.steps for r in driven)
    if not steps:
        return []
    held = sum(r.held for r in driven) / steps
    none = {"baseline_name": "none", "baseline_value": 0.0}
    return [
        *Splices.join(r.splices for r in driven if r.splices).results(seed),
        Result(name="policy.held", value=held, unit="share of steps", better="lower", n=steps, seed=seed, **none),
    ]


def print_summary(rollouts: Sequence[Rollout]) -> None:
    """A table to the console: success per controller and task with 95 % Wilson intervals, then the splices."""
    from rich.console import Console
    from rich.table import Table

    table = Table("controller", "task", "success", "95 % interval")
    for row in summarise(rollouts):
        share = row["successes"] / row["episodes"]
        table.add_row(
            row["controller"],
            row["task"],
            f"{share:.0%} of {row['episodes']}",
            f"{row['low']:.0%} to {row['high']:.0%}",
        )
    console = Console()
    console.print(table)
    for result in splice_results(rollouts, 0):
        beside = f"{result.baseline_name} {result.baseline_value:.3g}"
        console.print(f"{result.name}: {result.value:.3g} {result.unit} (n = {result.n}; {beside})")
