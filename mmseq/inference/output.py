"""Output: a prediction as files. JSON for numbers and text, PNG for images, MP4 for video.

Where the episode knows what really happened, a strip shows it above the prediction, and the JSON
says how far off the prediction is.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmseq.embodiment import Axes
from mmseq.episode import IMAGE_PREFIX, Episode
from mmseq.inference.predict import Prediction
from mmseq.mp4 import write_video
from mmseq.streams import VECTOR, VISION, stream_row
from mmseq.tasks import PlacedSegment, Task
from mmseq.tokenization.bundle import EpisodeTokens, Tokenizers
from mmseq.tokenization.pictures import psnr, strip
from mmseq.tokenization.values import by_name, join, values_of


def truth(task: Task, episode: Episode, t: int, tokenizers: Tokenizers) -> dict[str, Any]:
    """What the episode has for the predicted side, under the names that `predict` uses.

    Frames come in the size of the vision tokenizer. What the episode lacks is left out.
    """
    tokens = EpisodeTokens(episode, tokenizers)
    views = tokenizers.builder().views(tokens.embodiment, tokens.streams)

    def value(p: PlacedSegment, camera: str | None) -> Any:
        stream = f"{IMAGE_PREFIX}{camera}" if camera else p.stream
        start, stop = p.span(t, len(episode))
        inside = stream in tokens.streams and start >= 0 and stop <= len(episode)
        return values_of(stream).truth(tokens, stream, start, stop) if inside else None

    cameras = lambda p: (p.segment.camera and [p.segment.camera]) or views if p.row.kind.cameras else [None]
    predicted = [(p, camera) for p in task.place(episode.rate_hz) if p.predicted for camera in cameras(p)]
    found = by_name((p, camera, value(p, camera)) for p, camera in predicted)
    return {key: join(key, values) for key, values in found.items() if not any(v is None for v in values)}


def write_prediction(
    prediction: Prediction,
    episode: Episode,
    tokenizers: Tokenizers,
    out: str | Path | None = None,
    name: str = "prediction",
) -> dict[str, Any]:
    """What was predicted and, where it is known, what is true, as a dictionary that fits into JSON.

    out: a folder; the dictionary is written there as `<name>.json`, pictures as `<name>_<stream>.png`
    (with `_real_above_predicted.png` beside it where the truth exists) and video as MP4.
    """
    real = truth(prediction.task, episode, prediction.t, tokenizers)
    folder = Path(out) if out is not None else None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "task": str(prediction.task),
        "episode": episode.id,
        "t": prediction.t,
        "rate_hz": episode.rate_hz,
        "embodiment": episode.embodiment,
        "streams": {},
    }
    for key, value in prediction.streams.items():
        row = stream_row(key.partition(".")[0])
        if row.kind is VISION:
            record["streams"][key] = _write_vision(value, real.get(key), folder, f"{name}_{key}", episode.rate_hz)
        elif row.kind is VECTOR:
            axes = tokenizers.axes(episode.embodiment, row.name)
            record["streams"][key] = _vectors(value, real.get(key), axes)
        else:
            entry: dict[str, Any] = {"value": value}
            if key in real:
                entry["real"] = real[key]
            record["streams"][key] = entry
    if folder is not None:
        (folder / f"{name}.json").write_text(to_json(record) + "\n")
    return record


def to_json(record: dict[str, Any]) -> str:
    """Indented JSON with one line for each list of plain values, such as the action of one step."""
    text = json.dumps(record, indent=2, ensure_ascii=False)
    join = lambda match: "[" + ", ".join(part.strip() for part in match[1].split(",\n")) + "]"
    return re.sub(r"\[\n([^\[\]{}\"]*)\]", join, text)


def _vectors(value: np.ndarray, real: np.ndarray | None, axes: Axes) -> dict[str, Any]:
    rounded = lambda a: [[float(f"{x:.6g}") for x in row] for row in np.asarray(a, dtype=np.float64)]
    entry: dict[str, Any] = {"axes": list(axes.names), "units": list(axes.units), "value": rounded(value)}
    if real is not None:
        entry["real"] = rounded(real)
        errors = np.abs(value - real).mean(0)
        entry["mean_absolute_error"] = {n: float(f"{e:.6g}") for n, e in zip(axes.names, errors)}
    return entry


def _write_vision(
    value: np.ndarray, real: np.ndarray | None, folder: Path | None, name: str, rate_hz: float
) -> dict[str, Any]:
    frames = value[None] if value.ndim == 3 else value
    entry: dict[str, Any] = {"shape": list(value.shape)}
    truth_frames = None if real is None else (real[None] if real.ndim == 3 else real)
    if truth_frames is not None:
        entry["psnr_db"] = float(psnr(frames, truth_frames).mean())
    if folder is None:
        return entry
    files = [f"{name}.png"]
    Image.fromarray(strip(frames)).save(folder / files[0])
    if value.ndim == 4:
        files.append(f"{name}.mp4")
        write_video(folder / files[-1], frames, rate_hz)
    if truth_frames is not None:
        files.append(f"{name}_real_above_predicted.png")
        Image.fromarray(strip(truth_frames, frames)).save(folder / files[-1])
    return entry | {"files": files}
