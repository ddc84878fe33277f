"""Rows that hold the longest sequence: known from an index, before pictures are imported or tokenized."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from mmseq.data.mixture import MixConfig, task_name
from mmseq.data.moments import Moments
from mmseq.data.tokens import EpisodePlan
from mmseq.errors import ConfigError
from mmseq.tasks import Task
from mmseq.tokenization.bundle import Tokenizers
from mmseq.training.config import TrainConfig

ROUND_TO = 256  # tokens


def fit_rows(
    recipe: TrainConfig,
    mix: MixConfig,
    plans: Mapping[str, EpisodePlan],
    tokenizers: Tokenizers,
    *,
    settings: Sequence[str],
    say: Callable[[str], None],
) -> TrainConfig:
    """The recipe with rows of at least the longest sequence of the mix, which is said where that changes them.

    plans: of every source. settings: what the user chose; that is not changed.
    Raises: ConfigError when rows that the user chose are too short.
    """
    builder, longest, of = tokenizers.builder(), 0, ""
    for index, config in enumerate(mix.tasks):
        for source in config.sources or mix.sources:
            plan = plans[source]
            moments = Moments(0, index, Task.parse(config.task), source, plan, range(len(plan.ids)), builder)
            length = moments.longest().length if len(moments) else 0
            if length > longest:
                longest, of = length, f"{task_name(config)} of {source}"
    if longest <= recipe.data.row_tokens:
        return recipe
    if any(setting.startswith("data.row_tokens=") for setting in settings):
        raise ConfigError(
            f"{of} has {longest} tokens, more than data.row_tokens={recipe.data.row_tokens}",
            fix=f"raise that to at least {longest}, leave it out, or name other arrows with --task",
        )
    rows = -(-longest // ROUND_TO) * ROUND_TO
    say(f"note: data.row_tokens={rows} in place of {recipe.data.row_tokens}: {of} has {longest} tokens")
    return replace(recipe, data=replace(recipe.data, row_tokens=rows))
