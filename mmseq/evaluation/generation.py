"""Measure every task of one model on held-out data, each number beside its baseline.

    results, media = evaluate_generation(model, episodes, videos, {"caption": "video[8] -> text"}, train_episodes=train)

What an arrow predicts decides how it is measured (`by_kind.py`):

=========  =================================================  ==========================================
predicted  measure                                            baselines
=========  =================================================  ==========================================
pictures   `psnr`: mean over pictures, in dB                  repeat_last_frame; `_over_shuffled` the same
                                                              model with the actions of other samples;
                                                              `_of_ceiling` what the tokenizer can draw
           `moving_psnr`: the same where the real picture     repeat_last_frame; `_over_vanished` the picture
           shows what moves: the robot, the thing it moves    without what moves; `_of_ceiling`
           `state_error`, `state_found`: the robot's state    repeat_last_frame; `_of_ceiling`; `_of_reader`
           as a network reads it off the picture: its error,  what it reads in the true picture
           and whether it is near in the last one
vectors    `action_error`: mean absolute error as a share of  mean_action; `_over_median` median_action
           the axis' range
text       `accuracy`: a known phrasing of the episode's own  the training set's most frequent text
progress   `rank_correlation` with time, mean over episodes   constant
success    `accuracy` on as many yes as no                    constant
=========  =================================================  ==========================================

Names end in `_human` where the held-out human video is meant. A task that the data cannot fill is
left out, and `media["skipped"]` says why.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from mmseq.episode import Episode
from mmseq.evaluation.by_kind import Measured, Measures
from mmseq.evaluation.cases import (
    FULL_COUNT_PASSES,
    Case,
    draw,
    draw_balanced,
    draw_curves,
    moments_of,
    passes,
    predict_cases,
    readable,
    shuffle_actions,
    why_not,
)
from mmseq.evaluation.results import Result
from mmseq.evaluation.tokenizer_results import tokenizer_results
from mmseq.model.sequence_model import SequenceModel
from mmseq.streams import OUTCOME, SCALAR, TEXT, VISION, Kind
from mmseq.tasks import Task
from mmseq.tokenization.bundle import EpisodeTokens

FEWEST = 8  # samples of a task that decodes many tokens


def evaluate_generation(
    model: SequenceModel,
    episodes: Sequence[Episode],
    videos: Sequence[Episode],
    arrows: Mapping[str, str],
    *,
    train_episodes: Sequence[Episode],
    samples: int = 48,
    seed: int = 0,
    reader_steps: int = 0,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> tuple[list[Result], dict[str, Any]]:
    """Results, and what the report shows of them.

    episodes: of robots, videos: of people, both held out. arrows: name -> task. train_episodes: robot and human,
    for the baselines and the readers alone. samples: per task; tasks that decode many tokens get fewer, but at least 8.
    reader_steps: of training a network that reads the robot's state off pictures (`reader.py`); 0 leaves that out.
    on_progress: called with (what is done next, parts done, parts in all).

    The second value holds `frames`, `actions`, `texts`, `curves` (each task name -> what was predicted),
    `reconstructions`, `codebook`, `action_tokenizer`, `intervals` (result name -> 95 % interval), `gains` (result
    name -> 95 % interval of the gain over the baseline on the same samples), `skipped` (task name -> reason),
    `excluded` (episode id -> reason), `arrows`, `seconds`.
    """
    run = _Run(model, episodes, videos, arrows, train_episodes, samples, seed, reader_steps)
    results = run.measures.results
    parts = [(name, Task.parse(arrow)) for name, arrow in arrows.items()]
    with torch.no_grad():
        for number, (name, task) in enumerate(parts):
            if on_progress:
                on_progress(name, number, len(parts) + 1)
            began = time.perf_counter()
            run.task(name, task)
            run.media["seconds"][name] = time.perf_counter() - began
        if on_progress:
            on_progress("tokenizers", len(parts), len(parts) + 1)
        began = time.perf_counter()
        results += tokenizer_results(model.tokenizers, run.held, train_episodes, run.media, seed=seed)
        run.media["seconds"]["tokenizers"] = time.perf_counter() - began
    if on_progress:
        on_progress("done", len(parts) + 1, len(parts) + 1)
    return results, run.media


class _Run:
    """One evaluation under way."""

    def __init__(
        self,
        model: SequenceModel,
        episodes: Sequence[Episode],
        videos: Sequence[Episode],
        arrows: Mapping[str, str],
        train: Sequence[Episode],
        samples: int,
        seed: int,
        reader_steps: int,
    ):
        assert model.tokenizers is not None
        self.model, self.samples, self.seed = model, samples, seed
        robots, bad_robots = readable(episodes, model.tokenizers)
        people, bad_people = readable(videos, model.tokenizers)
        self.held: dict[str, list[EpisodeTokens]] = {"robot": robots, "human": people}
        self.media: dict[str, Any] = {
            "arrows": {name: str(arrow) for name, arrow in arrows.items()},
            "skipped": {},
            "excluded": bad_robots | bad_people,
            "seconds": {},
        }
        self.measures = Measures(model, train, [*train, *episodes, *videos], self.media, seed, reader_steps)

    def task(self, name: str, task: Task) -> None:
        """Measure one task on every kind of held-out episode that can fill it."""
        reasons = {kind: why_not(task, episodes) for kind, episodes in self.held.items()}
        if all(reasons.values()):
            kinds = [kind for kind in reasons if self.held[kind]] or list(reasons)
            different = len({reasons[kind] for kind in kinds}) > 1
            said = [f"{kind}: {reasons[kind]}" if different else str(reasons[kind]) for kind in kinds]
            self.media["skipped"][name] = "; ".join(dict.fromkeys(said))
            return
        for kind, reason in reasons.items():
            if reason is None:
                self._task_on(name, task.middle(self.held[kind][0].rate_hz), kind)

    def _task_on(self, name: str, task: Task, kind: str) -> None:
        kinds = {segment.stream: segment.row.kind for segment in task.predicted}
        rng = np.random.default_rng([self.seed, *name.encode()])
        measured = Measured(name=name, kind=kind, task=task, cases=self._cases(task, self.held[kind], kinds, rng))
        if not measured.cases:
            alike = OUTCOME in kinds.values()
            only = "every held-out moment has the same outcome" if alike else "the episodes are too short"
            self.media["skipped"][measured.key] = only
            return
        if not task.given and set(kinds.values()) == {TEXT}:
            self.measures.language(measured)
            return
        measured.predictions = predict_cases(self.model, task, measured.cases)
        if task.names("action", given=True) and VISION in kinds.values():
            sources = shuffle_actions(measured.cases, rng)
            measured.shuffled = predict_cases(self.model, task, measured.cases, sources) if sources else None
        for stream in kinds:
            self.measures.stream(replace(measured, stream=stream))

    def _cases(
        self, task: Task, episodes: Sequence[EpisodeTokens], kinds: Mapping[str, Kind], rng: np.random.Generator
    ) -> list[Case]:
        """kinds: of the predicted streams."""
        if SCALAR in kinds.values():
            return draw_curves(task, episodes, 3 * self.samples, rng)
        if OUTCOME in kinds.values():
            outcome = next(stream for stream, kind in kinds.items() if kind is OUTCOME)
            return draw_balanced(task, episodes, outcome, self.samples, rng)
        able = next((t for t in episodes if len(moments_of(task, t))), None)
        share = FULL_COUNT_PASSES / passes(task, able, able.tokenizers) if able else 1.0
        return draw(task, episodes, max(min(FEWEST, self.samples), int(self.samples * min(1.0, share))), rng)
