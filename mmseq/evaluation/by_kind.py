"""What is measured of each kind of stream that a task predicts, each number beside its baseline, and what is shown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmseq.episode import IMAGE_PREFIX, Episode
from mmseq.evaluation.cases import Case, groups, keys_of, last_seen, readable
from mmseq.evaluation.measures import Phrasings, action_error, mean_action, median_action
from mmseq.evaluation.reader import STATE, Readers, found
from mmseq.evaluation.results import Result, bootstrap, rank_correlation, wilson
from mmseq.evaluation.tokenizer_results import mean_frame
from mmseq.model.sequence_model import SequenceModel
from mmseq.packing import collate
from mmseq.streams import OUTCOME, SCALAR, TEXT, VECTOR, VISION, stream_row
from mmseq.tasks import Task
from mmseq.tokenization.pictures import psnr, psnr_of_moving

BACKGROUND_FRAMES = 32  # of an episode, of which the median shows what stands still
EXAMPLES = 8  # kept per task for the report
SUFFIX = {"robot": "", "human": "_human"}


@dataclass(kw_only=True)
class Measured:
    """What a model said of one task on one kind of held-out episode.

    name: of the task. kind: `robot` or `human`. stream: the predicted one that is looked at. predictions: one for each
    case. shuffled: the same with the actions of other cases, where that is asked for.
    """

    name: str
    kind: str
    task: Task
    cases: Sequence[Case]
    stream: str = ""
    predictions: Sequence[dict[str, Any]] = ()
    shuffled: Sequence[dict[str, Any]] | None = None

    @property
    def key(self) -> str:
        """Its name in what the report shows."""
        return self.name + SUFFIX[self.kind]

    @property
    def several(self) -> bool:
        """Whether the task predicts other streams, too."""
        return len({segment.stream for segment in self.task.predicted}) > 1

    def spans(self, case: Case) -> list[tuple[int, int]]:
        """First step and one past the last of each segment of the stream in the episode of a case."""
        placed = self.task.place(case.tokens.rate_hz)
        return [p.span(case.now, len(case.episode)) for p in placed if p.predicted and p.stream == self.stream]


class Measures:
    """Results, and what the report shows of them (`media`, see `evaluate_generation`).

    train: episodes for the baselines and the readers. everything: all episodes, for the phrasings that mean the same.
    reader_steps: of training the readers of predicted pictures; 0 reads nothing.
    """

    def __init__(
        self,
        model: SequenceModel,
        train: Sequence[Episode],
        everything: Sequence[Episode],
        media: dict[str, Any],
        seed: int,
        reader_steps: int,
    ):
        assert model.tokenizers is not None
        self.model, self.tokenizers = model, model.tokenizers
        self.train, self.everything, self.seed = list(train), everything, seed
        self.results: list[Result] = []
        self.media = media
        media |= {part: {} for part in ("frames", "actions", "texts", "curves", "intervals", "gains")}
        self._phrasings: dict[str, Phrasings] = {}
        self._constants: dict[tuple, tuple[np.ndarray, np.ndarray]] = {}
        self._backgrounds: dict[tuple[str, str], np.ndarray] = {}
        self._readers = None
        if reader_steps:
            taught = [tokens.episode for tokens in readable(self.train, self.tokenizers)[0]]
            robots = self.tokenizers.embodiments
            self._readers = Readers(taught, robots, self._fit, steps=reader_steps, seed=seed)

    def stream(self, of: Measured) -> None:
        """Measure a predicted stream by its kind."""
        by_kind = {
            VISION: self._pictures,
            VECTOR: self._vectors,
            TEXT: self._texts,
            SCALAR: self._progress,
            OUTCOME: self._success,
        }
        measure = by_kind.get(stream_row(of.stream).kind)
        if measure is not None:
            measure(of)

    def _add(
        self,
        of: Measured,
        measure: str,
        values: Sequence[float] | np.ndarray,
        baselines: Mapping[str, tuple[str, np.ndarray | float]],
        *,
        unit: str,
        better: str,
        cases: Sequence[Case] | None = None,
    ) -> None:
        """A row per baseline; baselines: suffix -> (baseline's name, its value on each sample or on all). cases: of the
        values, where they are others."""
        values = np.asarray(values, dtype=np.float64)
        ids = [case.episode.id for case in (of.cases if cases is None else cases)]
        interval = wilson(int(values.sum()), len(values)) if unit == "share" else bootstrap(values, ids, seed=self.seed)
        for suffix, (baseline, numbers) in baselines.items():
            full = f"{of.name}.{measure}{SUFFIX[of.kind]}{suffix}"
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

    def _pictures(self, of: Measured) -> None:
        sees = any(segment.row.kind is VISION for segment in of.task.given)
        rows = []
        for i, case in enumerate(of.cases):
            for key, segments in keys_of(of.task, case, self.tokenizers).items():
                if segments[0][0].stream != of.stream:
                    continue
                camera = str(segments[0][1])
                frames = case.episode[f"{IMAGE_PREFIX}{camera}"]
                real, last, steps = [], [], []
                for placed, _ in segments:
                    start, stop = placed.span(case.now, len(case.episode))
                    steps += range(start, stop)
                    real.append(self._fit(frames[start:stop]))
                    if sees:
                        seen = self._fit(frames[last_seen(placed, case)][None])
                    else:
                        seen = mean_frame(self.train, camera, self.tokenizers.vision.config.size)[None]
                    last.append(np.repeat(seen, stop - start, axis=0))
                row = {
                    "case": case,
                    "camera": camera,
                    "steps": steps,
                    "real": np.concatenate(real),
                    "last": np.concatenate(last),
                    "predicted": _as_video(of.predictions[i][key]),
                    "shuffled": _as_video(of.shuffled[i][key]) if of.shuffled else None,
                }
                row["ceiling"] = self.tokenizers.vision.reconstruct(row["real"])
                background = self._background(case.episode, camera)
                row["vanished"] = np.broadcast_to(background, row["real"].shape)
                for other in ("predicted", "last", "ceiling", "shuffled", "vanished"):
                    if row[other] is not None:
                        row[f"psnr_{other}"] = float(psnr(row["real"], row[other]).mean())
                        moving = psnr_of_moving(row["real"], row[other], background)
                        moving = moving[np.isfinite(moving)]
                        row[f"moving_{other}"] = float(moving.mean()) if len(moving) else None
                rows.append(row)
        each = lambda other: np.array([row[f"psnr_{other}"] for row in rows])
        baselines = {"": ("repeat_last_frame" if sees else "mean_frame", each("last"))}
        if of.shuffled:
            baselines["_over_shuffled"] = ("shuffled_actions", each("shuffled"))
        baselines["_of_ceiling"] = ("tokenizer_ceiling", each("ceiling"))
        measured = [row["case"] for row in rows]
        self._add(of, "psnr", each("predicted"), baselines, unit="dB", better="higher", cases=measured)
        moving = [row for row in rows if row["moving_predicted"] is not None]
        if moving:
            there = lambda other: np.array([row[f"moving_{other}"] for row in moving])
            baselines = {"": (baselines[""][0], there("last")), "_over_vanished": ("background", there("vanished"))}
            baselines["_of_ceiling"] = ("tokenizer_ceiling", there("ceiling"))
            measured = [row["case"] for row in moving]
            self._add(of, "moving_psnr", there("predicted"), baselines, unit="dB", better="higher", cases=measured)
        self._read_back(of, rows, baselines[""][0])
        # by how much moves, whatever the model made of it
        rows.sort(key=lambda row: row["psnr_last"])
        self.media["frames"][of.key] = [_frame_example(row) for row in _spread_episodes(rows)]

    def _read_back(self, of: Measured, rows: Sequence[dict[str, Any]], last: str) -> None:
        """What a reader of the robot's state sees in predicted pictures. last: the name of the first baseline."""
        sides = ("predicted", "last", "ceiling", "real")
        errors: dict[str, list[float]] = {side: [] for side in sides}
        hits: dict[str, list[bool]] = {side: [] for side in sides}
        measured = []
        for row in rows:
            episode, robot = row["case"].episode, row["case"].tokens.embodiment
            reader = self._readers and robot and STATE in episode and self._readers.of(robot, row["camera"])
            if not reader:
                continue
            read = {side: reader.label(row[side]).state for side in sides}
            axes, true = self.tokenizers.embodiment(robot).vectors[STATE], episode[STATE][row["steps"]]
            measured.append(row["case"])
            for side in sides:
                errors[side].append(float(action_error(true[None], read[side][None], axes)[0]))
                hits[side].append(found(true[-1], read[side][-1], axes))
        if not measured:
            return
        baselines = {"": (last, "last"), "_of_ceiling": ("tokenizer_ceiling", "ceiling")}
        baselines["_of_reader"] = ("true_frame", "real")
        of_range: dict[str, Any] = {"unit": "of the axis range", "better": "lower"}
        for measure, by_side, said in (
            ("state_error", errors, of_range),
            ("state_found", hits, {"unit": "share", "better": "higher"}),
        ):
            beside = {suffix: (name, np.array(by_side[side], float)) for suffix, (name, side) in baselines.items()}
            self._add(of, measure, by_side["predicted"], beside, **said, cases=measured)

    def _background(self, episode: Episode, camera: str) -> np.ndarray:
        """The median picture of an episode, uint8 (H, W, 3): what stands still, as a camera sees it that does, too."""
        if (episode.id, camera) not in self._backgrounds:
            at = np.unique(np.linspace(0, len(episode) - 1, BACKGROUND_FRAMES).astype(int))
            frames = self._fit(episode[f"{IMAGE_PREFIX}{camera}"][at])
            self._backgrounds[episode.id, camera] = np.median(frames, axis=0).astype(np.uint8)
        return self._backgrounds[episode.id, camera]

    def _fit(self, frames: np.ndarray) -> np.ndarray:
        return self.tokenizers.vision.fit(frames)

    def _seen(self, case: Case, steps: Sequence[int] | np.ndarray) -> np.ndarray | None:
        """What the first camera of an episode shows at some steps; None without a camera."""
        cameras = case.episode.cameras
        return self._fit(case.episode[f"{IMAGE_PREFIX}{cameras[0]}"][steps]) if cameras else None

    # ------------------------------------------------------------------ vectors

    def _vectors(self, of: Measured) -> None:
        errors, per_mean, per_median, measured, shown = [], [], [], [], []
        for members in groups(of.cases):
            some = [of.cases[i] for i in members]
            robot = self.tokenizers.embodiment(some[0].tokens.embodiment)
            axes = robot.vectors[of.stream]
            true = np.stack([np.concatenate([c.episode[of.stream][slice(*s)] for s in of.spans(c)]) for c in some])
            predicted = np.stack([np.asarray(of.predictions[i][of.stream]) for i in members])
            mean, median = self._constant(robot.name, of.stream, true)
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
            "": (f"mean_{of.stream}", np.concatenate(per_mean)),
            "_over_median": (f"median_{of.stream}", np.concatenate(per_median)),
        }
        values = np.concatenate(errors)
        measure = f"{of.stream}_error"
        self._add(of, measure, values, baselines, unit="of the axis range", better="lower", cases=measured)
        self.media["actions"][of.key + ("" if of.stream == "action" else f".{of.stream}")] = shown

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

    def _texts(self, of: Measured) -> None:
        stream, cases = of.stream, of.cases
        phrasings = self._phrasings.setdefault(stream, Phrasings(self.everything, stream))
        said = [" ".join(p[stream]) if isinstance(p[stream], list) else p[stream] for p in of.predictions]
        right = [phrasings.accepts(case.episode, text, case.now) for case, text in zip(cases, said)]
        same_kind = [e for e in self.train if (e.embodiment is None) == (of.kind == "human")]
        usual = phrasings.majority(same_kind) or phrasings.majority(self.train) or ""
        by_usual = np.array([phrasings.accepts(case.episode, usual, case.now) for case in cases], dtype=float)
        baselines = {"": (f"majority_{stream}", by_usual)}
        measure = f"{stream}_accuracy" if of.several else "accuracy"
        self._add(of, measure, right, baselines, unit="share", better="higher")
        self.media["texts"][of.key + (f".{stream}" if of.several else "")] = [
            {
                "episode": case.episode.id,
                "step": case.now,
                "image": None if (seen := self._seen(case, [case.now])) is None else seen[0],
                "asked": _text(case, "question" if stream == "answer" else "text"),
                "truth": _text(case, stream),
                "predicted": text,
                "right": ok,
            }
            for case, text, ok in list(zip(cases, said, right))[: 2 * EXAMPLES]
        ]

    def language(self, of: Measured) -> None:
        """Bits per token of the held-out texts, beside a unigram of the training texts."""
        text, stream = self.tokenizers.text, of.task.predicted[0].stream
        counts = np.ones(text.size)  # add one: no token is impossible
        for episode in self.train:
            for line in dict.fromkeys(t for _, _, texts in episode.pieces() for t in texts.get(stream, ())):
                counts += np.bincount(text.encode(line), minlength=text.size)
        unigram = -np.log2(counts / counts.sum())
        builder, bits, by_unigram, tokens = self.tokenizers.builder(), [], [], []
        for case in of.cases:
            sequence = builder.build(of.task, case.tokens, case.now, case.variant)
            (nats, _, _) = self.model.losses(collate([sequence], self.model.vocabulary).to(self.model.device))["text"]
            codes = case.tokens.codes(stream, case.now, case.now + 1, case.variant)
            bits.append(float(nats.sum()) / math.log(2))
            by_unigram.append(float(unigram[codes].sum()))
            tokens.append(len(codes))
        per_token = np.mean(tokens)
        baselines = {"": ("unigram", np.asarray(by_unigram) / per_token)}
        values = np.asarray(bits) / per_token  # the mean over texts is then bits over all tokens
        self._add(of, "bits_per_token", values, baselines, unit="bits/token", better="lower")

    # ------------------------------------------------------------------ scalars

    def _progress(self, of: Measured) -> None:
        by_episode: dict[str, list[int]] = {}
        for i, case in enumerate(of.cases):
            by_episode.setdefault(case.episode.id, []).append(i)
        curves, correlations = [], []
        for members in by_episode.values():
            first = of.cases[members[0]]
            steps = np.array([of.cases[i].now for i in members])
            true = steps / max(1, len(first.episode) - 1)
            predicted = np.array([float(np.mean(of.predictions[i][of.stream])) for i in members])
            correlations.append(rank_correlation(predicted, true))
            curves.append(
                {
                    "episode": first.episode.id,
                    "text": _text(first),
                    "seconds": steps / first.tokens.rate_hz,
                    "true": true,
                    "predicted": predicted,
                    "correlation": correlations[-1],
                    "frames": self._seen(first, steps[[0, len(steps) // 2, -1]]),
                }
            )
        firsts = [of.cases[members[0]] for members in by_episode.values()]
        baselines = {"": ("constant", 0.0)}
        self._add(of, "rank_correlation", correlations, baselines, unit="correlation", better="higher", cases=firsts)
        self.media["curves"][of.key] = curves[: 2 * EXAMPLES]

    def _success(self, of: Measured) -> None:
        ends = [of.spans(case)[0][1] for case in of.cases]
        true = np.array([case.tokens.codes(of.stream, end - 1, end)[0] for case, end in zip(of.cases, ends)])
        yes = np.array([float(np.mean(p[of.stream])) > 0.5 for p in of.predictions])
        share = float(true.mean())
        baselines = {"": ("constant", max(share, 1 - share))}
        self._add(of, "accuracy", yes == true, baselines, unit="share", better="higher")


def _text(case: Case, stream: str = "text") -> str:
    return next(iter(case.episode.texts_of(stream, case.now)), "")


def _as_video(picture: np.ndarray) -> np.ndarray:
    return picture[None] if picture.ndim == 3 else picture


def _frame_example(row: dict[str, Any]) -> dict[str, Any]:
    case = row["case"]
    kept = {k: v for k, v in row.items() if k != "case" and v is not None}
    said = {"episode": case.episode.id, "text": _text(case), "step": case.now, "rate_hz": case.tokens.rate_hz}
    return {**kept, "given": row["last"][0], **said}


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
