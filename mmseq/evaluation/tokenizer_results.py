"""What is lost by turning pictures and actions into tokens, on held-out data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmseq.episode import IMAGE_PREFIX, Episode
from mmseq.evaluation.measures import mean_action
from mmseq.evaluation.results import Result, bootstrap
from mmseq.tokenization.bundle import EpisodeTokens, Tokenizers
from mmseq.tokenization.pictures import psnr
from mmseq.tokenization.quality import vector_errors, vision_quality
from mmseq.tokenization.vision import fit_frames

FRAMES = 96  # pictures per kind
SHOWN = 8


def sample_frames(episodes: Sequence[Episode], size: int, count: int, seed: int) -> list[tuple[str, str, np.ndarray]]:
    """About `count` pictures over all episodes and cameras: (episode id, camera, uint8 (size, size, 3))."""
    rng = np.random.default_rng(seed)
    views = [(e, camera) for e in episodes for camera in e.cameras]
    if not views:
        return []
    per_view = -(-count // len(views))
    out = []
    for place in rng.permutation(len(views))[:count]:
        episode, camera = views[place]
        frames = episode[f"{IMAGE_PREFIX}{camera}"]
        steps = rng.permutation(len(frames))[:per_view]
        out += [(episode.id, camera, frame) for frame in fit_frames(frames[np.sort(steps)], size)]
    return out[:count]


def mean_frame(episodes: Sequence[Episode], camera: str, size: int) -> np.ndarray:
    """The mean picture of a camera in some episodes, uint8 (size, size, 3); grey when none has that camera."""
    frames = [
        fit_frames(e[f"{IMAGE_PREFIX}{camera}"][:: max(1, len(e) // 4)], size)
        for e in episodes[:: max(1, len(episodes) // 64)]
        if camera in e.cameras
    ]
    if not frames:
        return np.full((size, size, 3), 128, np.uint8)
    return np.concatenate(frames).astype(np.float64).mean(0).round().astype(np.uint8)


def tokenizer_results(
    tokenizers: Tokenizers | None,
    held: Mapping[str, Sequence[EpisodeTokens]],
    train: Sequence[Episode],
    media: dict[str, Any],
    *,
    seed: int,
) -> list[Result]:
    """Rows `vision_tokenizer.*` and `action_tokenizer.*`; adds pictures and details to `media`."""
    assert tokenizers is not None
    results: list[Result] = []
    media["reconstructions"], media["codebook"], media["action_tokenizer"] = {}, {}, {}
    vision, size = tokenizers.vision, tokenizers.vision.config.size
    kinds = {kind: sample_frames([t.episode for t in tokens], size, FRAMES, seed) for kind, tokens in held.items()}
    kinds = {kind: chosen for kind, chosen in kinds.items() if chosen}
    pictures = {kind: np.stack([frame for _, _, frame in chosen]) for kind, chosen in kinds.items()}
    found = vision_quality(vision, pictures) if pictures else {}
    for kind, chosen in kinds.items():
        real, values = pictures[kind], found["psnr_images"][kind]
        own = [e for e in train if (e.embodiment is None) == (kind == "human")]
        means = {camera: mean_frame(own, camera, size) for camera in {camera for _, camera, _ in chosen}}
        name = f"vision_tokenizer.psnr_{kind}"
        results.append(
            Result(
                name=name,
                value=values.mean(),
                unit="dB",
                better="higher",
                baseline_name="mean_frame",
                baseline_value=psnr(real, np.stack([means[camera] for _, camera, _ in chosen])).mean(),
                n=len(real),
                seed=seed,
            )
        )
        interval = bootstrap(values, [episode for episode, _, _ in chosen], seed=seed)
        if interval:
            media["intervals"][name] = interval
        shown = np.linspace(0, len(real) - 1, min(SHOWN, len(real))).round().astype(int)
        decoded = found["decoded"][kind][shown]
        media["reconstructions"][kind] = {"real": real[shown], "decoded": decoded, "psnr": values[shown]}
    if pictures:
        book = media["codebook"] = found["codebook"] | {"tokens_per_frame": vision.tokens_per_frame}
        results.append(
            Result(
                name="vision_tokenizer.codebook_use",
                value=book["used"] / book["size"],
                unit="share",
                better="higher",
                baseline_name="one_code",
                baseline_value=1 / book["size"],
                n=sum(map(len, pictures.values())),
                seed=seed,
            )
        )
    return results + _actions(tokenizers, held, train, media, seed)


def _actions(
    tokenizers: Tokenizers,
    held: Mapping[str, Sequence[EpisodeTokens]],
    train: Sequence[Episode],
    media: dict[str, Any],
    seed: int,
) -> list[Result]:
    results = []
    known = [t.episode for tokens in held.values() for t in tokens if t.embodiment and "action" in t.streams]
    robots = vector_errors(tokenizers, known, "action")
    for robot, (axes, values, errors) in robots.items():
        mean = mean_action(train, robot)
        baseline = np.abs(values - (values.mean(0) if mean is None else mean)).mean(0)
        media["action_tokenizer"][robot] = {
            "axes": list(axes.names),
            "units": list(axes.units),
            "error": errors,
            "baseline_error": baseline,
            "bins": tokenizers["action"].size,
        }
        prefix = f"{robot}_" if len(robots) > 1 else ""
        for i, axis in enumerate(axes.names):
            results.append(
                Result(
                    name=f"action_tokenizer.error_{prefix}{axis}",
                    value=errors[i],
                    unit=axes.units[i],
                    better="lower",
                    baseline_name="mean_action",
                    baseline_value=baseline[i],
                    n=len(values),
                    seed=seed,
                )
            )
    return results
