"""Measure every task of one model on held-out data, each number beside its baseline.

    results, media = evaluate_generation(model, episodes, videos, {"caption": "video[8] -> text"}, train_episodes=train)

What an arrow predicts decides how it is measured:

=========  =================================================  ==========================================
predicted  measure                                            baselines
=========  =================================================  ==========================================
pictures   `psnr`: mean over pictures, in dB                  repeat_last_frame; `_over_shuffled` the same
                                                              model with the actions of other samples;
                                                              `_of_ceiling` what the tokenizer can draw
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

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mmseq.episode import IMAGE_PREFIX, Episode
from mmseq.evaluation.cases import (
    FULL_COUNT_PASSES,
    Case,
    draw,
    draw_balanced,
    draw_curves,
    groups,
    keys_of,
    last_seen,
    moments_of,
    passes,
    predict_cases,
    readable,
    shuffle_actions,
    span,
    why_not,
)
from mmseq.evaluation.measures import Phrasings, action_error, mean_action, median_action
from mmseq.evaluation.results import Result, bootstrap, rank_correlation, wilson
from mmseq.evaluation.tokenizer_results import mean_frame, tokenizer_results
from mmseq.model.sequence_model import SequenceModel
from mmseq.packing import collate
from mmseq.streams import OUTCOME, SCALAR, TEXT, VECTOR, VISION
from mmseq.tasks import Task
from mmseq.tokenization.bundle import EpisodeTokens
from mmseq.tokenization.pictures import psnr

EXAMPLES = 8  # kept per task for the report
FEWEST = 8
SUFFIX = {"robot": "", "human": "_human"}


def evaluate_generation(
    model: SequenceModel,
    episodes: Sequence[Episode],
    videos: Sequence[Episode],
    arrows: Mapping[str, str],
    *,
    train_episodes: Sequence[Episode],
    samples: int = 48,
    seed: int = 0,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> tuple[list[Result], dict[str, Any]]:
    """Results, and what the report shows of them.

    episodes: of robots, videos: of people, both held out. arrows: name -> task. train_episodes: robot and human,
    for the baselines alone. samples: per task; tasks that decode many tokens get fewer, but at least 8.
    on_progress: called with (what is done next, parts done, parts in all).

    The second value holds `frames`, `actions`, `texts`, `curves` (each task name -> what was predicted),
    `reconstructions`, `codebook`, `action_tokenizer`, `intervals` (result name -> 95 % interval), `gains` (result
    name -> 95 % interval of the gain over the baseline on the same samples), `skipped` (task name -> reason),
    `excluded` (episode id -> reason), `arrows`, `seconds`.
    """
    run = _Run(model, episodes, videos, arrows, train_episodes, samples, seed)
    parts = [(name, Task.parse(arrow)) for name, arrow in arrows.items()]
    with torch.inference_mode():
        for number, (name, task) in enumerate(parts):
            if on_progress:
                on_progress(name, number, len(parts) + 1)
            began = time.perf_counter()
            run.task(name, task)
            run.media["seconds"][name] = time.perf_counter() - began
        if on_progress:
            on_progress("tokenizers", len(parts), len(parts) + 1)
        began = time.perf_counter()
        run.results += tokenizer_results(model.tokenizers, run.held, train_episodes, run.media, seed=seed)
        run.media["seconds"]["tokenizers"] = time.perf_counter() - began
    if on_progress:
        on_progress("done", len(parts) + 1, len(parts) + 1)
    return run.results, run.media


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
    ):
        assert model.tokenizers is not None
        self.model, self.tokenizers = model, model.tokenizers
        self.train, self.samples, self.seed = list(train), samples, seed
        robots, bad_robots = readable(episodes, model.tokenizers)
        people, bad_people = readable(videos, model.tokenizers)
        self.held: dict[str, list[EpisodeTokens]] = {"robot": robots, "human": people}
        self.everything = [*self.train, *episodes, *videos]
        self.results: list[Result] = []
        self.media: dict[str, Any] = {
            "arrows": {name: str(arrow) for name, arrow in arrows.items()},
            "frames": {},
            "actions": {},
            "texts": {},
            "curves": {},
            "intervals": {},
            "gains": {},
            "skipped": {},
            "excluded": bad_robots | bad_people,
            "seconds": {},
        }
        self._phrasings: dict[str, Phrasings] = {}
        self._constants: dict[tuple, tuple[np.ndarray, np.ndarray]] = {}

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
        episodes, rng = self.held[kind], np.random.default_rng([self.seed, *name.encode()])
        rows = {segment.stream: segment.row for segment in task.predicted}
        kinds = {row.kind for row in rows.values()}
        if not task.given and kinds == {TEXT}:
            return self._language(name, task, kind, draw(task, episodes, self.samples, rng))
        if SCALAR in kinds:
            cases = draw_curves(task, episodes, 3 * self.samples, rng)
        elif OUTCOME in kinds:
            outcome = next(name for name, row in rows.items() if row.kind is OUTCOME)
            cases = draw_balanced(task, episodes, outcome, self.samples, rng)
        else:
            able = next((t for t in episodes if len(moments_of(task, t))), None)
            share = FULL_COUNT_PASSES / passes(task, able, self.tokenizers) if able else 1.0
            cases = draw(task, episodes, max(min(FEWEST, self.samples), int(self.samples * min(1.0, share))), rng)
        if not cases:
            only = "every held-out moment has the same outcome" if OUTCOME in kinds else "the episodes are too short"
            self.media["skipped"][name + SUFFIX[kind]] = only
            return None
        predictions = predict_cases(self.model, task, cases)
        shuffled = None
        if task.names("action", given=True) and VISION in kinds:
            sources = shuffle_actions(cases, rng)
            shuffled = predict_cases(self.model, task, cases, sources) if sources else None
        several = len(rows) > 1
        for stream, row in rows.items():
            if row.kind is VISION:
                self._pictures(name, kind, task, stream, cases, predictions, shuffled)
            elif row.kind is VECTOR:
                self._vectors(name, kind, task, stream, cases, predictions)
            elif row.kind is TEXT:
                self._texts(name, kind, stream, cases, predictions, f"{stream}_accuracy" if several else "accuracy")
            elif row.kind is SCALAR:
                self._progress(name, kind, stream, cases, predictions)
            elif row.kind is OUTCOME:
                self._success(name, kind, task, stream, cases, predictions)
        return None

    def _add(
        self,
        name: str,
        measure: str,
        kind: str,
        values: Sequence[float] | np.ndarray,
        baselines: Mapping[str, tuple[str, np.ndarray | float]],
        *,
        unit: str,
        better: str,
        cases: Sequence[Case],
    ) -> None:
        """A row per baseline; baselines: suffix -> (baseline's name, its value on each sample or on all)."""
        values = np.asarray(values, dtype=np.float64)
        ids = [case.episode.id for case in cases]
        interval = wilson(int(values.sum()), len(values)) if unit == "share" else bootstrap(values, ids, seed=self.seed)
        for suffix, (baseline, numbers) in baselines.items():
            full = f"{name}.{measure}{SUFFIX[kind]}{suffix}"
            self.results.append(
                Result(
                    name=full,
                    value=float(values.mean()),
                    unit=unit,
                    better=better,
                    baseline_name=baseline,
                    baseline_value=float(np.mean(numbers)),
                    n=len(values),
                    seed=self.seed,
                )
            )
            if interval:
                self.media["intervals"][full] = interval
            gains = (values - numbers) * (1 if better == "higher" else -1)
            gain = bootstrap(gains, ids, seed=self.seed)
            if gain:
                self.media["gains"][full] = gain

    # ------------------------------------------------------------------ pictures

    def _pictures(
        self,
        name: str,
        kind: str,
        task: Task,
        stream: str,
        cases: Sequence[Case],
        predictions: Sequence[dict[str, Any]],
        shuffled: Sequence[dict[str, Any]] | None,
    ) -> None:
        sees = any(segment.row.kind is VISION for segment in task.given)
        rows = []
        for i, case in enumerate(cases):
            for key, segments in keys_of(task, case, self.tokenizers).items():
                if segments[0][0].stream != stream:
                    continue
                camera = str(segments[0][1])
                frames = case.episode[f"{IMAGE_PREFIX}{camera}"]
                real, last = [], []
                for placed, _ in segments:
                    start, stop = span(placed, case)
                    real.append(self._fit(frames[start:stop]))
                    if sees:
                        seen = self._fit(frames[last_seen(placed, case)][None])
                    else:
                        seen = mean_frame(self.train, camera, self.tokenizers.vision.config.size)[None]
                    last.append(np.repeat(seen, stop - start, axis=0))
                row = {
                    "case": case,
                    "camera": camera,
                    "real": np.concatenate(real),
                    "last": np.concatenate(last),
                    "predicted": self._as_video(predictions[i][key]),
                    "shuffled": self._as_video(shuffled[i][key]) if shuffled else None,
                }
                row["ceiling"] = self.tokenizers.vision.reconstruct(row["real"])
                for other in ("predicted", "last", "ceiling", "shuffled"):
                    if row[other] is not None:
                        row[f"psnr_{other}"] = float(psnr(row["real"], row[other]).mean())
                rows.append(row)
        of = lambda other: np.array([row[f"psnr_{other}"] for row in rows])
        baselines = {"": ("repeat_last_frame" if sees else "mean_frame", of("last"))}
        if shuffled:
            baselines["_over_shuffled"] = ("shuffled_actions", of("shuffled"))
        baselines["_of_ceiling"] = ("tokenizer_ceiling", of("ceiling"))
        values = [row["psnr_predicted"] for row in rows]
        measured = [row["case"] for row in rows]
        self._add(name, "psnr", kind, values, baselines, unit="dB", better="higher", cases=measured)
        # by how much moves, whatever the model made of it
        rows.sort(key=lambda row: row["psnr_last"])
        self.media["frames"][name + SUFFIX[kind]] = [self._frame_example(row) for row in _spread_episodes(rows)]

    def _frame_example(self, row: dict[str, Any]) -> dict[str, Any]:
        case = row["case"]
        kept = {k: v for k, v in row.items() if k != "case" and v is not None}
        return {
            **kept,
            "given": row["last"][0],
            "episode": case.episode.id,
            "text": (case.episode.texts_of("text", case.now) or [""])[0],
            "step": case.now,
            "rate_hz": case.tokens.rate_hz,
        }

    def _fit(self, frames: np.ndarray) -> np.ndarray:
        return self.tokenizers.vision.fit(frames)

    @staticmethod
    def _as_video(picture: np.ndarray) -> np.ndarray:
        return picture[None] if picture.ndim == 3 else picture

    # ------------------------------------------------------------------ vectors

    def _vectors(
        self,
        name: str,
        kind: str,
        task: Task,
        stream: str,
        cases: Sequence[Case],
        predictions: Sequence[dict[str, Any]],
    ) -> None:
        errors, per_mean, per_median, measured, shown = [], [], [], [], []
        for members in groups(cases):
            some = [cases[i] for i in members]
            robot = self.tokenizers.embodiment(some[0].tokens.embodiment)
            axes = robot.vectors[stream]
            true = np.stack([self._truth(task, stream, case) for case in some])
            predicted = np.stack([np.asarray(predictions[i][stream]) for i in members])
            mean, median = self._constant(robot.name, stream, true)
            errors.append(action_error(true, predicted, axes))
            per_mean.append(action_error(true, np.broadcast_to(mean, true.shape), axes))
            per_median.append(action_error(true, np.broadcast_to(median, true.shape), axes))
            measured += some
            shown.append(
                {
                    "embodiment": robot.name,
                    "axes": list(axes.names),
                    "units": list(axes.units),
                    "true": true.reshape(-1, true.shape[-1]),
                    "predicted": predicted.reshape(-1, true.shape[-1]),
                    "error": _axis_error(true, predicted),
                    "baseline_error": _axis_error(true, mean),
                    "correlation": _correlations(true, predicted),
                }
            )
        baselines = {
            "": (f"mean_{stream}", np.concatenate(per_mean)),
            "_over_median": (f"median_{stream}", np.concatenate(per_median)),
        }
        values = np.concatenate(errors)
        self._add(
            name, f"{stream}_error", kind, values, baselines, unit="of the axis range", better="lower", cases=measured
        )
        self.media["actions"][f"{name}{SUFFIX[kind]}" + ("" if stream == "action" else f".{stream}")] = shown

    @staticmethod
    def _truth(task: Task, stream: str, case: Case) -> np.ndarray:
        placed = [p for p in task.place(case.tokens.rate_hz) if p.predicted and p.stream == stream]
        return np.concatenate([case.episode[stream][slice(*span(p, case))] for p in placed])

    def _constant(self, robot: str, stream: str, true: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and median of the training episodes; without any of this robot, of the measured samples."""
        key = (robot, stream)
        if key not in self._constants:
            mean, median = mean_action(self.train, robot, stream), median_action(self.train, robot, stream)
            if mean is None or median is None:
                flat = true.reshape(-1, true.shape[-1])
                return flat.mean(0), np.median(flat, axis=0)
            self._constants[key] = (mean, median)
        return self._constants[key]

    # ------------------------------------------------------------------ text

    def _texts(
        self,
        name: str,
        kind: str,
        stream: str,
        cases: Sequence[Case],
        predictions: Sequence[dict[str, Any]],
        measure: str,
    ) -> None:
        phrasings = self._phrasings.setdefault(stream, Phrasings(self.everything, stream))
        said = [" ".join(p[stream]) if isinstance(p[stream], list) else p[stream] for p in predictions]
        right = [phrasings.accepts(case.episode, text, case.now) for case, text in zip(cases, said)]
        same_kind = [e for e in self.train if (e.embodiment is None) == (kind == "human")]
        usual = phrasings.majority(same_kind) or phrasings.majority(self.train) or ""
        by_usual = np.array([phrasings.accepts(case.episode, usual, case.now) for case in cases], dtype=float)
        baselines = {"": (f"majority_{stream}", by_usual)}
        self._add(name, measure, kind, right, baselines, unit="share", better="higher", cases=cases)
        key = name + SUFFIX[kind] + (f".{stream}" if measure != "accuracy" else "")
        self.media["texts"][key] = [
            {
                "episode": case.episode.id,
                "step": case.now,
                "image": self._fit(case.episode[f"{IMAGE_PREFIX}{case.episode.cameras[0]}"][case.now][None])[0]
                if case.episode.cameras
                else None,
                "asked": (case.episode.texts_of("question" if stream == "answer" else "text", case.now) or [""])[0],
                "truth": (case.episode.texts_of(stream, case.now) or [""])[0],
                "predicted": text,
                "right": ok,
            }
            for case, text, ok in list(zip(cases, said, right))[: 2 * EXAMPLES]
        ]

    def _language(self, name: str, task: Task, kind: str, cases: Sequence[Case]) -> None:
        """Bits per token of the held-out texts, beside a unigram of the training texts."""
        text, stream = self.tokenizers.text, task.predicted[0].stream
        counts = np.ones(text.size)  # add one: no token is impossible
        for episode in self.train:
            for line in dict.fromkeys(t for _, _, texts in episode.pieces() for t in texts.get(stream, ())):
                counts += np.bincount(text.encode(line), minlength=text.size)
        unigram = -np.log2(counts / counts.sum())
        builder, bits, by_unigram, tokens = self.tokenizers.builder(), [], [], []
        for case in cases:
            sequence = builder.build(task, case.tokens, case.now, case.variant)
            (nats, _, _) = self.model.losses(collate([sequence], self.model.vocabulary).to(self.model.device))["text"]
            codes = case.tokens.codes(stream, case.now, case.now + 1, case.variant)
            bits.append(float(nats.sum()) / math.log(2))
            by_unigram.append(float(unigram[codes].sum()))
            tokens.append(len(codes))
        per_token = np.mean(tokens)
        baselines = {"": ("unigram", np.asarray(by_unigram) / per_token)}
        values = np.asarray(bits) / per_token  # the mean over texts is then bits over all tokens
        self._add(name, "bits_per_token", kind, values, baselines, unit="bits/token", better="lower", cases=cases)

    # ------------------------------------------------------------------ scalars

    def _progress(
        self, name: str, kind: str, stream: str, cases: Sequence[Case], predictions: Sequence[dict[str, Any]]
    ) -> None:
        by_episode: dict[str, list[int]] = {}
        for i, case in enumerate(cases):
            by_episode.setdefault(case.episode.id, []).append(i)
        curves, correlations = [], []
        for members in by_episode.values():
            first = cases[members[0]]
            steps = np.array([cases[i].now for i in members])
            true = steps / max(1, len(first.episode) - 1)
            predicted = np.array([float(np.mean(predictions[i][stream])) for i in members])
            correlations.append(rank_correlation(predicted, true))
            curves.append(
                {
                    "episode": first.episode.id,
                    "text": (first.episode.texts_of("text", first.now) or [""])[0],
                    "seconds": steps / first.tokens.rate_hz,
                    "true": true,
                    "predicted": predicted,
                    "correlation": correlations[-1],
                    "frames": self._fit(
                        first.episode[f"{IMAGE_PREFIX}{first.episode.cameras[0]}"][steps[[0, len(steps) // 2, -1]]]
                    )
                    if first.episode.cameras
                    else None,
                }
            )
        firsts = [cases[members[0]] for members in by_episode.values()]
        self._add(
            name,
            "rank_correlation",
            kind,
            correlations,
            {"": ("constant", 0.0)},
            unit="correlation",
            better="higher",
            cases=firsts,
        )
        self.media["curves"][name + SUFFIX[kind]] = curves[: 2 * EXAMPLES]

    def _success(
        self,
        name: str,
        kind: str,
        task: Task,
        stream: str,
        cases: Sequence[Case],
        predictions: Sequence[dict[str, Any]],
    ) -> None:
        placed = lambda case: next(p for p in task.place(case.tokens.rate_hz) if p.stream == stream and p.predicted)
        ends = [span(placed(case), case)[1] for case in cases]
        true = np.array([case.tokens.codes(stream, end - 1, end)[0] for case, end in zip(cases, ends)])
        yes = np.array([float(np.mean(p[stream])) > 0.5 for p in predictions])
        share = float(true.mean())
        baselines = {"": ("constant", max(share, 1 - share))}
        self._add(name, "accuracy", kind, yes == true, baselines, unit="share", better="higher", cases=cases)


def _axis_error(true: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.abs(true - other).reshape(-1, true.shape[-1]).mean(0)


def _correlations(true: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Pearson correlation per axis; 0 where either side is constant."""
    flat, other = (a.reshape(-1, true.shape[-1]).astype(np.float64) for a in (true, predicted))
    flat, other = flat - flat.mean(0), other - other.mean(0)
    scale = np.sqrt((flat**2).sum(0) * (other**2).sum(0))
    return np.where(scale > 1e-12, (flat * other).sum(0) / np.maximum(scale, 1e-12), 0.0)


def _spread_episodes(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first examples, no episode twice while others are left."""
    seen: set[str] = set()
    fresh = [r for r in rows if not (r["case"].episode.id in seen or seen.add(r["case"].episode.id))]
    chosen = {id(r) for r in fresh}
    return [*fresh, *(r for r in rows if id(r) not in chosen)][:EXAMPLES]
