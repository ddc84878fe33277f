"""What is lost by turning pictures and vectors into tokens and back."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mmseq.embodiment import Axes
from mmseq.episode import Episode
from mmseq.streams import stream_row
from mmseq.tokenization.bundle import Tokenizers
from mmseq.tokenization.pictures import psnr, psnr_db
from mmseq.tokenization.vision import VisionTokenizer
from mmseq.tokenization.vision_training import Frames, fitted_sources, survey

FOREGROUND_SEEN = 20  # of 255: a pixel this far from its source's median image is foreground


def codebook_use(counts: np.ndarray) -> dict[str, Any]:
    """How often each code occurred -> `size`, `used`, `perplexity` and `tokens`."""
    share = counts[counts > 0] / counts.sum()
    perplexity = float(np.exp(-(share * np.log(share)).sum()))
    return {"size": len(counts), "used": len(share), "perplexity": perplexity, "tokens": int(counts.sum())}


def vision_quality(tokenizer: VisionTokenizer, sources: Mapping[str, Frames]) -> dict[str, Any]:
    """What comes back of the frames of each source.

    Returns, each by source: `decoded` frames, `psnr_images` (dB per image), `psnr` (of all pixels), `psnr_image` (mean
    of the images) and `psnr_foreground` (of pixels that differ from the source's median image; None without any);
    and `codebook` (see `codebook_use`), `tokens_per_frame`, `images_per_s` (encoding, with the threads torch has now).
    Raises: DataError without frames.
    """
    fitted = fitted_sources(sources, tokenizer.config.size)
    tokenizer.encode(next(iter(fitted.values()))[:1])  # the first call is no measure of speed
    names = ("decoded", "psnr_images", "psnr", "psnr_image", "psnr_foreground")
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    counts = np.zeros(tokenizer.size, np.int64)
    seconds = 0.0
    for name, frames in fitted.items():
        started = time.perf_counter()
        codes = tokenizer.encode(frames)
        seconds += time.perf_counter() - started
        counts += np.bincount(codes.ravel(), minlength=len(counts))
        decoded = tokenizer.decode(codes)
        images = psnr(frames, decoded)
        error = np.square(decoded.astype(np.float32) - frames)
        moves = np.abs(frames.astype(np.int16) - np.median(survey(frames), axis=0)).max(-1) >= FOREGROUND_SEEN
        foreground = float(psnr_db(error[moves].mean())) if moves.any() else None
        row = (decoded, images, float(psnr_db(error.mean(dtype=np.float64))), float(images.mean()), foreground)
        for measure, value in zip(names, row, strict=True):
            found[measure][name] = value
    return {
        **found,
        "codebook": codebook_use(counts),
        "tokens_per_frame": tokenizer.tokens_per_frame,
        "images_per_s": sum(map(len, fitted.values())) / seconds,
    }


def vector_errors(
    tokenizers: Tokenizers, episodes: Iterable[Episode], stream: str
) -> dict[str, tuple[Axes, np.ndarray, np.ndarray]]:
    """By robot: its axes, all vectors (steps, axes) and the mean absolute error (axes,) of the round trip."""
    found: dict[str, list[np.ndarray]] = {}
    for episode in episodes:
        if stream in episode and episode.embodiment is not None:
            found.setdefault(episode.embodiment, []).append(episode[stream])
    out = {}
    for robot, values in found.items():
        axes = tokenizers.embodiment(robot).vectors.get(stream)
        if axes is not None:
            joined, tokenizer = np.concatenate(values), tokenizers[stream_row(stream).range]
            error = np.abs(tokenizer.decode(tokenizer.encode(joined, axes), axes) - joined).mean(0)
            out[robot] = (axes, joined, error)
    return out
