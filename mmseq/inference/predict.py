"""Predict: any arrow on any episode, in physical units.

model.predict("image, action[8] -> image@+8", episode, t=12)["image"]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mmseq.episode import Episode
from mmseq.errors import ConfigError, TaskError
from mmseq.inference.decoding import Decoded, Decoder, Request
from mmseq.model.sequence_model import SequenceModel
from mmseq.packing import collate
from mmseq.sequence import TokenSequence, TokenSource
from mmseq.streams import VECTOR, lacking
from mmseq.tasks import Task
from mmseq.tokenization.bundle import EpisodeTokens, Tokenizers
from mmseq.tokenization.values import by_name, join, values_of


@dataclass
class Prediction:
    """What an arrow predicted. `prediction["action"]` is float32 (steps, axes) in the units of the
    embodiment, `["image"]` uint8 (H, W, 3), `["video"]` uint8 (frames, H, W, 3), text streams are
    strings, `["progress"]` and `["success"]` numbers in 0..1. Several cameras: `["image.wrist"]`."""

    task: Task
    t: int
    streams: dict[str, Any]

    def __getitem__(self, stream: str) -> Any:
        if stream not in self.streams:
            raise TaskError(f"{self.task} predicts {', '.join(self.streams)}, not {stream!r}")
        return self.streams[stream]


def predict(
    model: SequenceModel,
    arrow: str | Task,
    episode: Episode,
    t: int = 0,
    *,
    text: str | None = None,
    question: str | None = None,
    action_prefix: np.ndarray | None = None,
    variant: int = 0,
    temperature: float = 0.0,
    passes: int | None = None,
    seed: int = 0,
    samples: int | None = None,
) -> Prediction | list[Prediction]:
    """Fill the right side of `arrow` at step `t`; a name stands for what the model was trained on under it.

    text, question: used in place of the episode's own. action_prefix: float (n, axes), commands
    that the predicted chunk must begin with. samples: how many candidates to draw (a list comes
    back); use a temperature above 0 with it. passes: forward passes for the chunk of actions that the arrow ends
    with, when the model has learned that; None: what one pass per token gives.
    Raises: TaskError when the episode lacks a given stream or t leaves it no room.
    """
    tokenizers = model.tokenizers
    assert tokenizers is not None
    task = _task(model, arrow)
    texts = {stream: said for stream, said in {"text": text, "question": question}.items() if said is not None}
    tokens = EpisodeTokens(episode, tokenizers, texts=texts)
    check_fillable(task, tokens, t, where=f"episode {episode.id!r}")
    prefix = None
    if action_prefix is not None:
        prefix = tokenizers.encode_vector("action", episode.embodiment, action_prefix, what="action_prefix")
    if passes is not None:
        require_parallel(model, task)
    decoder = Decoder(model, temperature=temperature, passes=passes, speculate=passes is None and not temperature)
    requests = [Request(tokens, t, variant, prefix, seed + i) for i in range(samples or 1)]
    out = [Prediction(task, t, to_streams(d, tokenizers, tokens)) for d in decoder.decode(task, requests)]
    return out if samples is not None else out[0]


@torch.inference_mode()
def score(model: SequenceModel, arrow: str | Task, episode: Episode, t: int = 0) -> float:
    """Log-likelihood in nats per token of the predicted side as the episode has it.

    With `-> video[n]` this is a video-likelihood reward (Escontrela et al. 2023).
    Raises: TaskError when the episode lacks a stream or t leaves it no room.
    """
    batch = collate([_sequence(model, arrow, episode, t)], model.vocabulary).to(model.device)
    return -float(torch.cat([nll for nll, _, _ in model.losses(batch).values()]).mean())


@torch.inference_mode()
def embed_span(model: SequenceModel, arrow: str | Task, episode: Episode, t: int = 0) -> np.ndarray:
    """Mean last hidden state, float32 (width,), over the given side: a representation for transfer."""
    sequence = _sequence(model, arrow, episode, t)
    hidden = model.hidden(collate([sequence], model.vocabulary).to(model.device))
    spans = [hidden[s.start : s.stop] for s in sequence.segments if not s.predicted]
    return torch.cat(spans or [hidden[:2]]).mean(0).float().cpu().numpy()


def _sequence(model: SequenceModel, arrow: str | Task, episode: Episode, t: int) -> TokenSequence:
    assert model.tokenizers is not None
    return model.tokenizers.builder().build(_task(model, arrow), EpisodeTokens(episode, model.tokenizers), t)


def _task(model: SequenceModel, arrow: str | Task) -> Task:
    return arrow if isinstance(arrow, Task) else Task.parse(model.tasks.get(arrow, arrow))


def require_parallel(model: SequenceModel, task: Task) -> None:
    """Raises: ConfigError when the model has not learned to decode the final chunk of `task` in few passes."""
    if not model.decodes_in_parallel(task):
        learned = [model.tasks[name] for name in model.parallel]
        raise ConfigError(
            f"this model has not learned to decode {task} in few passes; of what it was trained on it has "
            f"{', '.join(learned) or 'nothing'}",
            fix="leave passes out, or train with `parallel: 0.5` beside the task in the mix",
        )


def check_fillable(task: Task, tokens: EpisodeTokens, t: int, *, where: str) -> None:
    """Raises: TaskError when a given stream is missing or a given segment leaves the episode."""
    task.require_fixed()
    missing = task.missing(tokens.streams, given_only=True)
    if missing:
        raise TaskError(f"{where} cannot fill {task}: it has no {lacking(missing, tokens.streams)}")
    if not 0 <= t < len(tokens):
        raise TaskError(f"{where} has steps 0 to {len(tokens) - 1}, t is {t}")
    needs_robot = [s.stream for s in task.segments if s.row.kind is VECTOR]
    if needs_robot and tokens.embodiment is None:
        raise TaskError(f"{where} is of no embodiment that the model knows, so it has no {needs_robot[0]!r}")
    given = [
        (p.segment, p.start, p.stop)
        for p in task.place(tokens.rate_hz)
        if not p.predicted and p.start is not None and p.stop is not None
    ]
    for segment, start, stop in given:
        if t + start < 0 or t + stop > len(tokens):
            # where all that is given lies inside, and now too: else the next try is refused for another segment
            low = max(0, *(-first for _, first, _ in given))
            high = len(tokens) - max(1, *(end for _, _, end in given))
            raise TaskError(
                f"{where} has {len(tokens)} steps: {segment} at t={t} needs steps {t + start} to {t + stop - 1}",
                fix=f"choose t from {low} to {high}" if high >= low else "use a longer episode or a shorter segment",
            )


def to_streams(decoded: Sequence[Decoded], tokenizers: Tokenizers, tokens: TokenSource) -> dict[str, Any]:
    """Codes back to arrays, pictures and text. Repeated segments are joined in time."""

    def value(d: Decoded) -> Any:
        row = d.segment.row
        mean = d.expectation if d.expectation is not None else float(d.codes.flat[0]) if d.codes.size else 0.0
        return values_of(row.name).decode(tokenizers, row, d.codes, tokens.embodiment, mean)

    found = by_name((d.segment, d.camera, value(d)) for d in decoded)
    return {key: join(key, values) for key, values in found.items()}
