"""`mmseq serve`: from a checkpoint, or a recorded episode, and a file of settings to a running server.

mmseq serve runs/demo/checkpoint --chunking realtime --execute 8
mmseq serve --config serve/server.yaml gate.too_fast=refuse
mmseq serve --replay shards/robot:3
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

from mmseq.errors import ConfigError, DataError, did_you_mean
from mmseq.plugins import find
from mmseq.reading import AS_IT_IS, Reading
from mmseq.serving.policy import Policy, ReplayPolicy
from mmseq.serving.server import Listening, Server, ServerConfig, is_loopback, serve

log = logging.getLogger("mmseq.serving")


@dataclass(kw_only=True)
class ServeSettings(Listening):
    """What `mmseq serve` can be told, by a YAML file and `key=value`."""

    checkpoint: str | None = None  # a checkpoint's folder; or replay
    replay: str | None = None  # send the recorded actions of an episode: a dry run
    replay_horizon: int = 16  # control steps of each chunk of a replay
    reading: Reading = AS_IT_IS
    policy_class: str = "model"  # what answers, among the policies of plug-ins; `model` is a checkpoint as it is
    device: str | None = None  # default: cuda where there is one
    policy: str | None = None  # the arrow, or the mix's task, that answers `infer`; default: the one called policy
    embodiment: str | None = None  # the one robot to serve; default: all it knows
    passes: int | None = None  # forward passes per chunk, of a policy trained for it
    speculate: bool = True  # without passes: guess a chunk and check it, which gives the chunk of one pass per token
    # compile what every control step repeats, while it warms up; on a GPU as CUDA graphs
    compile: bool = False
    token_file: str | None = None  # clients must send its content as `Authorization: Api-Key TOKEN`


def server_config(settings: ServeSettings) -> ServerConfig:
    """Raises: ConfigError for a token that cannot be read, ServeError for what cannot be served."""
    if settings.token_file is None and not settings.insecure_public and not is_loopback(settings.host):
        raise ConfigError(
            f"host {settings.host!r} is reachable from other machines and there is no token",
            fix="give --token-file FILE, serve on 127.0.0.1, or --insecure-public where everybody may drive the robots",
        )
    same = {f.name: getattr(settings, f.name) for f in fields(Listening)}
    return ServerConfig(token=_token(settings.token_file), **same)


def loader(settings: ServeSettings) -> Callable[[], Policy]:
    """What loads the policy, now and at every reload. Raises: ConfigError when there is none, or two."""
    if (settings.checkpoint is None) == (settings.replay is None):
        raise ConfigError(
            "nothing to serve" if settings.checkpoint is None else "a checkpoint and a replay cannot both be served",
            fix="name a checkpoint, or an episode with --replay DATASET:EPISODE",
        )
    if settings.reading.said() and settings.replay is None:
        raise ConfigError(
            f"{', '.join(settings.reading.said())} would change how a replay is read",
            fix="leave it out, or name an episode with --replay DATASET:EPISODE",
        )
    return lambda: _load(settings)


def _load(settings: ServeSettings) -> Policy:
    if settings.replay is not None:
        return replay_policy(
            settings.replay,
            settings.reading,
            embodiment=settings.embodiment,
            horizon=settings.replay_horizon,
            execute=settings.chunking.execute,
        )
    assert settings.checkpoint is not None
    if Path(settings.checkpoint).is_file():
        raise ConfigError(f"{settings.checkpoint} is a file", fix="name the checkpoint's folder")
    return find("policies", settings.policy_class).from_pretrained(
        settings.checkpoint,
        device=settings.device,
        arrow=settings.policy,
        embodiment=settings.embodiment,
        passes=settings.passes,
        speculate=settings.speculate,
        compile=settings.compile,
    )


def replay_policy(
    address: str,
    reading: Reading = AS_IT_IS,
    *,
    embodiment: str | None = None,
    horizon: int = 16,
    execute: int | None = None,
) -> ReplayPolicy:
    """The recorded actions of `DATASET:EPISODE`, or of a dataset's first episode. reading: of the dataset.

    Raises: ConfigError for an address that is none, DataError for an episode that is not there.
    """
    from mmseq.data.sources import embodiments_of, open_source  # data lies beside serving: reached for on demand

    path, colon, number = address.rpartition(":")
    if not colon or not number.isdigit():
        if colon and not Path(address).exists():
            raise ConfigError(
                f"replay is {address!r}: {number!r} is no episode's number", fix="write DATASET:EPISODE, from 0"
            )
        path, number = address, "0"
    source = open_source(path, reading)
    if int(number) >= len(source):
        raise DataError(f"{path} has {len(source)} episodes, numbered from 0: there is no {number}")
    episode, robots = source[int(number)], {robot.name: robot for robot in embodiments_of(source)}
    name = embodiment or episode.embodiment or next(iter(robots), "")
    if not robots:
        raise DataError(f"{path} has no robot: these are videos without actions", fix="name a robot's episodes")
    if name not in robots:
        raise DataError(f"{path} has no contract of robot {name!r}: {did_you_mean(str(name), robots)}")
    return ReplayPolicy(episode, robots[name], horizon=horizon, execute=execute)


def launch(settings: ServeSettings, *, on_ready: Callable[[Server], None] | None = None) -> bool:
    """Serve until SIGTERM or SIGINT. SIGHUP loads what is served again. Returns whether all threads have ended.

    Raises: ConfigError, ServeError, or what loading raises.
    """
    if (
        settings.replay is not None and settings.chunking.execute is None
    ):  # each session has its own place in the episode
        settings = replace(settings, chunking=replace(settings.chunking, execute=settings.replay_horizon))
    config, load = server_config(settings), loader(settings)  # mistakes are told before anything is loaded
    return serve(_tell(load(), settings), config, load=load, on_ready=on_ready)


def _tell(policy: Policy, settings: ServeSettings) -> Policy:
    """Log what is served. Returns the policy, so that `launch` has no name of what a reload frees."""
    contract = policy.contract()
    rates = ", ".join(f"{name} at {body['rate_hz']:g} Hz" for name, body in contract["embodiments"].items())
    arrow, horizon = contract.get("policy") or contract["tasks"].get("policy"), contract["horizon"]
    passes = "" if settings.replay else f"; passes: {settings.passes or 'as many as it takes'}"
    log.info("%s: %s; horizon %d; %s%s", contract["name"], arrow, horizon, rates, passes)
    free = [name for name, body in contract["embodiments"].items() if not body["action"].get("max_step")]
    if free:
        log.info("no max_step in the contract of %s: how fast it moves is not limited", ", ".join(free))
    tokens = horizon * max(len(body["action"]["names"]) for body in contract["embodiments"].values())
    if settings.passes is not None and settings.passes >= tokens:
        log.warning("passes is %d and a chunk has %d numbers: one pass per number is as fast", settings.passes, tokens)
    if settings.token_file is None and not is_loopback(settings.host):
        log.warning("anybody who reaches %s:%d can drive the robots: set token_file", settings.host, settings.port)
    return policy


def _token(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        token = Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--token-file {path}: {getattr(error, 'strerror', 'not text')}") from error
    if not token:
        raise ConfigError(f"--token-file {path} is empty")
    return token
