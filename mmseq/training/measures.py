"""How far off one predicted segment is, in what a person would measure: units of the robot, dB, exact words.

========  ===================================  ==========================================================
segment   measure                              what it is
========  ===================================  ==========================================================
text      `<stream>_bits_per_token`
          `<stream>_exact_match`               share of texts that greedy decoding would write as they are
image     `psnr_db`                            mean over pictures
action    `<stream>_error.<robot>.<group>`     mean absolute error; a group is the axes that share a unit, by
proprio                                        which it is named, and the gripper by itself (`gripper_<unit>`)
progress  `progress_error`                     mean absolute error, of 0 to 1
success   `success_accuracy`                   share of right answers
========  ===================================  ==========================================================

Both sides are what the tokenizers give back, so what tokenizing itself costs is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mmseq.embodiment import Axes, Embodiment
from mmseq.tasks import TEXT_STREAMS, VECTOR_STREAMS, VISION_STREAMS
from mmseq.tokenization.bundle import Tokenizers
from mmseq.tokenization.pictures import psnr, strip

Sums = dict[str, tuple[float, int]]  # measure -> its sum and how many it was taken over


@dataclass(kw_only=True)
class Span:
    """A predicted segment: the true codes (n,), the predicted ones (n,) and the nats (n,) of the true ones.

    embodiment: the name of the robot's; None for none.
    """

    stream: str
    embodiment: str | None
    true: np.ndarray
    predicted: np.ndarray
    nats: np.ndarray


def measure(span: Span, tokenizers: Tokenizers) -> Sums:
    """The measures of one segment; none for latent actions, which have no unit."""
    if span.stream in TEXT_STREAMS:
        same = (span.true == span.predicted).all()
        return {
            f"{span.stream}_bits_per_token": (float(span.nats.sum()) / math.log(2), len(span.nats)),
            f"{span.stream}_exact_match": (float(same), 1),
        }
    if span.stream in VISION_STREAMS:
        values = psnr(*_frames(span, tokenizers))
        return {"psnr_db": (float(values.sum()), len(values))}
    if span.stream in VECTOR_STREAMS:
        return _vector_errors(span, tokenizers)
    if span.stream == "progress":
        true, predicted = (tokenizers.progress.decode(float(codes[0])) for codes in (span.true, span.predicted))
        return {"progress_error": (abs(predicted - true), 1)}
    if span.stream == "success":
        return {"success_accuracy": (float((span.predicted[0] > 0.5) == bool(span.true[0])), 1)}
    return {}


def picture(span: Span, tokenizers: Tokenizers) -> np.ndarray | None:
    """uint8 (H, W, 3): the true frames above the predicted ones; None for what is no vision."""
    return strip(*_frames(span, tokenizers)) if span.stream in VISION_STREAMS else None


def axis_groups(axes: Axes, robot: Embodiment) -> dict[str, list[int]]:
    """Which axes are averaged: those of one unit, named by it; grippers by themselves."""
    groups: dict[str, list[int]] = {}
    grippers = {gripper.axis for gripper in robot.grippers}
    for i, (name, unit) in enumerate(zip(axes.names, axes.units)):
        groups.setdefault(f"gripper_{unit}" if name in grippers else unit, []).append(i)
    return groups


def _frames(span: Span, tokenizers: Tokenizers) -> tuple[np.ndarray, np.ndarray]:
    codes = np.stack([span.true, span.predicted]).astype(np.int64)
    true, predicted = np.split(tokenizers.vision.decode(codes.reshape(-1, tokenizers.layout.frame_tokens)), 2)
    return true, predicted


def _vector_errors(span: Span, tokenizers: Tokenizers) -> Sums:
    robot = tokenizers.embodiment(span.embodiment)
    axes = getattr(robot, span.stream)
    true, predicted = (
        getattr(tokenizers, span.stream).decode(codes.astype(np.int64).reshape(-1, len(axes)), axes).astype(np.float64)
        for codes in (span.true, span.predicted)
    )
    error = np.abs(predicted - true)
    return {
        f"{span.stream}_error.{robot.name}.{group}": (float(error[:, at].sum()), error[:, at].size)
        for group, at in axis_groups(axes, robot).items()
    }
