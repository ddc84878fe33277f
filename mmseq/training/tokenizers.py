"""Tokenizers from a recipe: text on every instruction, vision on frames, bins from the contracts; then measured.

    mmseq tokenizer train tokenizers/demo/recipe.yaml
    mmseq tokenizer eval runs/tokenizers --data shards/robot

`out` holds the tokenizers and `report.json`, measured on the episodes that training did not see.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmseq.data.mixture import holdout_rank
from mmseq.data.reader import EpisodeSource
from mmseq.data.shards import partial_folder, replace_folder
from mmseq.data.sources import bad_episodes, embodiments_of, open_source
from mmseq.embodiment import Embodiment
from mmseq.errors import ConfigError, DataError, FingerprintError, MMSeqError, did_you_mean
from mmseq.plugins import find
from mmseq.tokenization.base import Tokenizer, tokenizer_class
from mmseq.tokenization.bundle import FILE, Tokenizers
from mmseq.tokenization.continuous import BinTokenizer, ScalarTokenizer
from mmseq.tokenization.quality import vector_errors, vision_quality
from mmseq.tokenization.recipe import TextRecipe, TokenizerConfig
from mmseq.tokenization.text import TextTokenizer
from mmseq.tokenization.vision import VisionTokenizer, fit_frames
from mmseq.tokenization.vision_training import train_vision

REPORT = "report.json"
EVALUATION_FRAMES = 2000  # per source

Progress = Callable[[str, int, int], None]


def train_tokenizers(
    config: TokenizerConfig, on_progress: Progress | None = None, say: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Train what the recipe says, save it to `config.out`, complete or not at all, and return the report.

    on_progress(stage, done, total). say: is told which episodes are left out, and why.
    Raises: MMSeqError for a source, text or contract that does not fit.
    """
    config.check()
    out = Path(config.out)
    if out.exists() and any(out.iterdir()) and not (out / FILE).is_file():
        raise DataError(f"{out} exists and holds no tokenizers, so it is not replaced", fix="choose another out=")
    sources = {name: open_source(s.path, s, rate_hz=s.rate_hz) for name, s in config.sources.items()}
    robots = gather_embodiments({name: embodiments_of(source) for name, source in sources.items()})
    seen, unseen, unmeasured = {}, {}, {}
    for name, source in sources.items():
        bad = bad_episodes(source, config.sources[name], f"source {name!r}", say or (lambda _: None)).found
        ranks = {i: holdout_rank(f"{name}/{episode_id(source, i)}") for i in range(len(source)) if i not in bad}
        seen[name] = [i for i, rank in ranks.items() if rank >= config.holdout]
        unseen[name] = [i for i, rank in ranks.items() if rank < config.holdout]
        if not seen[name]:
            raise DataError(f"source {name!r}: all {len(ranks)} episodes are held out", fix="lower holdout or add data")
        if not unseen[name]:
            unmeasured[name] = (
                f"none of its {len(ranks)} episodes is held out: their ids decide, and holdout={config.holdout:g} is "
                f"too little for any; from holdout={math.ceil(100 * min(ranks.values()) + 1e-9) / 100:.2f} on one is"
            )
    vision = _train_vision(config, sources, seen, on_progress)
    tokenizers = Tokenizers(
        {
            "text": _train_text(config.text, sources, seen),
            "vision": vision,
            "action": BinTokenizer(config.action_bins),
            "proprio": BinTokenizer(config.proprio_bins),
            "progress": ScalarTokenizer(config.progress_bins),
            **_train_vectors(config, sources, seen, robots),
        },
        encoder=find("encoders", config.encoder)() if config.encoder else None,
        embodiments=list(robots.values()),
        merge=config.merge,
    )
    report = evaluate_tokenizers(tokenizers, sources, unseen) | ({"unmeasured": unmeasured} if unmeasured else {})
    partial = partial_folder(out)
    tokenizers.save(partial)
    (partial / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    replace_folder(partial, out)
    return report


def gather_embodiments(by_source: Mapping[str, Iterable[Embodiment]]) -> dict[str, Embodiment]:
    """The contracts of all sources by name. Raises: FingerprintError when two sources contradict each other."""
    found: dict[str, tuple[str, Embodiment]] = {}
    for source, robots in by_source.items():
        for robot in robots:
            first, known = found.setdefault(robot.name, (source, robot))
            try:
                known.require_same(robot, mine=f"source {first!r}", theirs=f"source {source!r}")
            except FingerprintError as error:
                raise FingerprintError(
                    str(error), fix="import both with the same contract: mmseq data import ... --embodiment FILE"
                ) from error
    return {name: robot for name, (_, robot) in found.items()}


def episode_id(source: EpisodeSource, index: int) -> str:
    """The id of an episode, from the index where there is one."""
    notes = getattr(source, "metadata", None)
    return notes[index]["id"] if notes is not None else source[index].id


def read_frames(
    source: EpisodeSource,
    episodes: Iterable[int],
    size: int,
    limit: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """At most about `limit` evenly spaced frames of each camera, uint8 (N, size, size, 3)."""
    episodes = list(episodes)
    lengths = [len(source[i]) for i in episodes]
    stride = max(1, math.ceil(sum(lengths) / limit))
    kept: list[np.ndarray] = []
    first = 0  # of the next episode on the line of all steps
    for done, (index, length) in enumerate(zip(episodes, lengths), start=1):
        for camera in source[index].cameras:
            for step, frame in enumerate(source.frames(index, camera)):
                if (first + step) % stride == 0:
                    kept.append(fit_frames(frame[None], size))
        first += length
        if on_progress is not None:
            on_progress(done, len(episodes))
    return np.concatenate(kept) if kept else np.zeros((0, size, size, 3), np.uint8)


def _train_vision(
    config: TokenizerConfig,
    sources: Mapping[str, EpisodeSource],
    episodes: Mapping[str, list[int]],
    on_progress: Progress | None,
) -> VisionTokenizer:
    v = config.vision
    if v.path:
        return VisionTokenizer.load(v.path)
    frames = {}
    for name, source in sources.items():
        say = (lambda done, total, name=name: on_progress(f"frames of {name}", done, total)) if on_progress else None
        found = read_frames(source, episodes[name], v.size, v.frames_per_source, say)
        if len(found):
            frames[name] = found
    if not frames:
        raise DataError("no source has a camera", fix="add one with images, or name a vision.path")
    return train_vision(
        frames,
        config=v.config(),
        steps=v.steps,
        batch_images=v.batch_images,
        max_seconds=v.max_seconds,
        seed=config.seed,
        threads=v.threads,
        weights=[config.sources[name].weight for name in frames],
        foreground=v.foreground,
        augment=[find("augmentations", name) for name in v.augment],
        device=v.device,
        on_progress=(lambda step, total, _: on_progress("vision", step, total)) if on_progress else None,
    )


def _train_text(
    config: TextRecipe, sources: Mapping[str, EpisodeSource], episodes: Mapping[str, list[int]]
) -> TextTokenizer:
    if config.path:
        tokenizer = TextTokenizer.load(config.path)
        if tokenizer.huggingface != (config.kind == "huggingface"):
            raise MMSeqError(f"text.path {config.path} is not of kind {config.kind}")
        return tokenizer
    texts = {text for name, source in sources.items() for i in episodes[name] for text in _texts(source, i)}
    return TextTokenizer.train(sorted(texts), vocab_size=config.vocab_size)


def _train_vectors(
    config: TokenizerConfig,
    sources: Mapping[str, EpisodeSource],
    episodes: Mapping[str, list[int]],
    robots: Mapping[str, Embodiment],
) -> dict[str, Tokenizer]:
    """The tokenizers that the recipe names for vector streams; one that has `train` sees the values of its stream."""
    made: dict[str, Tokenizer] = {}
    declared = {stream for robot in robots.values() for stream in robot.vectors}
    for stream, settings in config.vectors.items():
        if stream not in declared:
            raise ConfigError(f"vectors.{stream}: no robot of the sources has it: {did_you_mean(stream, declared)}")
        settings = dict(settings)
        kind = tokenizer_class(str(settings.pop("kind", "bins")))
        try:
            if hasattr(kind, "train"):
                found = (source[i] for name, source in sources.items() for i in episodes[name])
                some = (e for e in found if stream in e and e.embodiment in robots)
                values = ((e[stream], robots[str(e.embodiment)].vectors[stream]) for e in some)
                made[stream] = kind.train(values, **settings)  # type: ignore[attr-defined]
            else:
                made[stream] = kind(**settings)
        except TypeError as error:
            raise ConfigError(f"vectors.{stream}: {kind.__name__} refuses its settings: {error}") from error
    return made


def _texts(source: EpisodeSource, index: int) -> list[str]:
    episode = source[index]
    return [text for _, _, texts in episode.pieces() for phrasings in texts.values() for text in phrasings]


def evaluate_tokenizers(
    tokenizers: Tokenizers,
    sources: Mapping[str, EpisodeSource],
    episodes: Mapping[str, list[int]] | None = None,
    frames_per_source: int = EVALUATION_FRAMES,
) -> dict[str, Any]:
    """Measure tokenizers on episodes of each source (default: all of them).

    Returns: `vision`: PSNR and use of the codebook (see `vision_quality`; None without frames); `text`: tokens per
    text by source; `action`, `proprio` and further vectors: mean absolute round-trip error by source and axis, in its
    unit; `episodes`: how many were measured, by source.
    """
    chosen = {name: list(episodes[name]) if episodes else list(range(len(s))) for name, s in sources.items()}
    size = tokenizers.vision.config.size
    frames = {n: read_frames(s, chosen[n], size, frames_per_source) for n, s in sources.items() if chosen[n]}
    frames = {name: f for name, f in frames.items() if len(f)}
    report: dict[str, Any] = {
        "episodes": {name: len(ids) for name, ids in chosen.items()},
        "vision": _vision_report(tokenizers.vision, frames) if frames else None,
        "text": {},
        **{stream: {} for stream in tokenizers.vectors},
    }
    for name, source in sources.items():
        texts = [text for i in chosen[name] for text in _texts(source, i)]
        if texts:
            report["text"][name] = float(np.mean([len(tokenizers.text.encode(t)) for t in texts]))
        for stream in tokenizers.vectors:
            errors = vector_errors(tokenizers, (source[i] for i in chosen[name]), stream)
            if errors:
                report[stream][name] = {
                    robot: {n: {"error": float(e), "unit": u} for n, u, e in zip(axes.names, axes.units, of_axes)}
                    for robot, (axes, _, of_axes) in errors.items()
                }
    return report


def _vision_report(vision: VisionTokenizer, frames: Mapping[str, np.ndarray]) -> dict[str, Any]:
    found = vision_quality(vision, frames)
    book = found.pop("codebook")
    shown = {name: value for name, value in found.items() if name not in ("decoded", "psnr_images")}
    return {**shown, "codes_used": book["used"] / book["size"], "codes_perplexity": book["perplexity"]}
