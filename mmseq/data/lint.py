"""Lint: every problem of a mix at once, before it costs GPU hours, and the shares it will give."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmseq.config import load_config
from mmseq.data.mixture import MixConfig, Mixture, members_of
from mmseq.data.moments import Moments
from mmseq.data.tokens import TokenShards
from mmseq.errors import DataError, MMSeqError
from mmseq.tasks import Task
from mmseq.tokenization.bundle import Tokenizers

MOST_STEPS = 0.8  # a task that begins at fewer steps of its episodes is pointed out


@dataclass
class Lint:
    """problems: what must be corrected. notes: what is worth knowing. shares: as `Mixture.shares`."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    shares: list[dict[str, Any]] = field(default_factory=list)
    weighting: str = "as_given"


def lint_mix(
    mix_path: str | Path,
    tokens: str | Path,
    tokenizers: Tokenizers | str | Path,
    *,
    row_tokens: int = 2048,
    root: str | Path | None = None,
) -> Lint:
    """Look for everything that can go wrong with a mix. Raises: MMSeqError only when the mix or the
    tokenizers cannot be read at all."""
    mix = load_config(MixConfig, mix_path)
    if not isinstance(tokenizers, Tokenizers):
        tokenizers = Tokenizers.load(tokenizers)
    lint = Lint(problems=list(map(str, mix.problems())), weighting=mix.weighting)
    root = Path(root) if root is not None else Path(mix_path).parent
    shards = _open_shards(mix, Path(tokens), tokenizers, root, lint)
    members = {name: members_of(s, name, mix, "train") for name, s in shards.items()}
    for name, s in shards.items():
        if not members[name]:
            lint.problems.append(f"source {name}: all {len(s)} episodes are held out; lower holdout or add data")
        elif mix.holdout_of(name) > 0 and len(members[name]) == len(s):
            lint.notes.append(f"source {name}: none of its {len(s)} episodes is held out, so nothing measures it")
    if mix.holdout > 0 and shards and all(len(members[name]) == len(s) for name, s in shards.items()):
        lint.problems.append(
            f"the held-out split is empty: no source has an episode in it; raise holdout={mix.holdout:g}"
        )
    for index, config in enumerate(mix.tasks):
        _check_task(index, config, mix, shards, members, tokenizers, row_tokens, lint)
    if not lint.problems:
        lint.shares = Mixture(mix, tokens, tokenizers, row_tokens=row_tokens, seed=0).shares()
    return lint


def _open_shards(
    mix: MixConfig, tokens: Path, tokenizers: Tokenizers, root: Path, lint: Lint
) -> dict[str, TokenShards]:
    shards = {}
    for name, source in mix.sources.items():
        if not (root / source.path).exists():
            lint.problems.append(f"source {name}: {root / source.path} does not exist; correct its path or --root")
        try:
            if not (tokens / name).is_dir():
                raise DataError(f"no token shards at {tokens / name}", fix="run `mmseq data tokenize` on the mix")
            shards[name] = TokenShards(tokens / name, tokenizers)
        except MMSeqError as error:
            lint.problems.append(f"source {name}: {error}")
    return shards


def _why_not_all(moments: Moments) -> str:
    """Which steps of its episodes a task never begins at: those before its first moment, those after its last."""
    early, late = moments.left_out
    reasons = []
    if early:
        reasons.append(
            f"the first ones ({early:.0%}) have too little before them for what it is given; look back less far"
        )
    if late:
        reasons.append(
            f"the last ones ({late:.0%}) are too near the end for what it predicts; record on for a while "
            "after the success"
        )
    return ", and ".join(reasons)


def _check_task(
    index: int,
    config: Any,
    mix: MixConfig,
    shards: dict[str, TokenShards],
    members: dict[str, list[int]],
    tokenizers: Tokenizers,
    row_tokens: int,
    lint: Lint,
) -> None:
    try:
        task = Task.parse(config.task)
    except MMSeqError:
        return  # said already
    wanted = [name for name in config.sources or mix.sources if name in mix.sources]
    opened = [name for name in wanted if name in shards]
    found = 0
    for name in opened:
        moments = Moments(index, index, task, name, shards[name].plan, members[name], tokenizers.builder())
        found += len(moments)
        longest = moments.longest().length if len(moments) else 0
        if longest > row_tokens:
            lint.problems.append(
                f"task {config.task!r} in {name} makes sequences of {longest} tokens, a row holds {row_tokens}; "
                "shorten the task or raise data.row_tokens"
            )
        if len(moments) and moments.share_of_steps < MOST_STEPS:
            lint.notes.append(
                f"task {config.task!r} begins at {moments.share_of_steps:.0%} of the steps of {name}: "
                f"{_why_not_all(moments)}"
            )
        if not len(moments) and config.sources:
            lint.notes.append(f"task {config.task!r} finds nothing in {name}: {moments.why_empty()}")
    if config.weight > 0 and len(opened) == len(wanted) and not found:
        reasons = "; ".join(
            f"{n}: {Moments(index, index, task, n, shards[n].plan, members[n], tokenizers.builder()).why_empty()}"
            for n in opened
        )
        lint.problems.append(f"no episode can fill the task {config.task!r} ({reasons})")
