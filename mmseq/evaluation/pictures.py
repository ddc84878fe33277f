"""Pictures as files in memory: PNG and animated WebP for the report, and the one picture of the README."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmseq.errors import DataError


def data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def png(image: np.ndarray) -> bytes:
    """uint8 (H, W, 3) as PNG."""
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(out, "PNG", optimize=True)
    return out.getvalue()


def webp(frames: np.ndarray, rate_hz: float, *, quality: int = 80) -> bytes:
    """uint8 (N, H, W, 3) as an animated WebP that repeats for ever."""
    images = [Image.fromarray(np.ascontiguousarray(frame)) for frame in frames]
    out = io.BytesIO()
    images[0].save(
        out,
        "WEBP",
        save_all=True,
        append_images=images[1:],
        duration=max(20, round(1000 / rate_hz)),
        loop=0,
        quality=quality,
        method=4,
    )
    return out.getvalue()


def moving_picture(video: bytes | np.ndarray, rate_hz: float) -> tuple[str, str]:
    """(data URI, kind) of a rollout: `video/mp4`, `image/webp` or `image/gif` bytes, or frames (N, H, W, 3).

    Raises: DataError for bytes of another format.
    """
    if isinstance(video, np.ndarray):
        return data_uri(webp(video, rate_hz), "image/webp"), "image/webp"
    video = bytes(video)
    marks = {"video/mp4": video[4:8] == b"ftyp", "image/webp": video[8:12] == b"WEBP", "image/gif": video[:3] == b"GIF"}
    kind = next((kind for kind, fits in marks.items() if fits), None)
    if kind is None:
        raise DataError("a rollout video is neither MP4, WebP nor GIF", fix="give frames (N, H, W, 3) or MP4 bytes")
    return data_uri(video, kind), kind


def difference(real: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Where two pictures differ: uint8, dark where they agree, amplified twice."""
    error = np.abs(real.astype(np.float32) - predicted.astype(np.float32)).mean(-1) / 255 * 2
    x = np.clip(error, 0, 1)[..., None]
    low, middle, high = (np.array(c, np.float32) for c in ((18, 18, 30), (214, 73, 51), (255, 236, 160)))
    colour = np.where(x < 0.5, low + (middle - low) * x * 2, middle + (high - middle) * (x * 2 - 1))
    return colour.round().astype(np.uint8)


INK, MUTED, LINE, ACCENT, RIGHT, WRONG = "#1c2330", "#667085", "#d5dae1", "#2f6fdb", "#1f8a55", "#c2412d"
WIDTH, LEFT = 1200, 210
PICTURE_BYTES = 300_000


def write_picture(path: str | Path, media: Mapping[str, Any], rollouts: Sequence[Mapping[str, Any]] = ()) -> None:
    """One PNG, 1200 pixels wide, for a README: what the same weights predicted, row by row.

    media: as `evaluate_generation` returns it. rollouts: as for `write_report`; one with `frames` makes the row of
    the policy. Rows without material are left out.

    Raises: DataError when there is nothing to show.
    """
    rows = [row for row in (_world(media), _policy(rollouts), _video(media), _caption(media), _value(media)) if row]
    if not rows:
        raise DataError("there is nothing to show: no frames, rollouts, captions or value curves")
    height = sum(row.height for row in rows) + 18 * (len(rows) - 1) + 40
    sheet = Image.new("RGB", (WIDTH, height), "white")
    top = 20
    for number, row in enumerate(rows):
        sheet.paste(row, (0, top))
        top += row.height + 18
        if number < len(rows) - 1:
            ImageDraw.Draw(sheet).line([(24, top - 9), (WIDTH - 24, top - 9)], fill=LINE)
    for colours in (None, 256, 128, 64, 32):  # as true as the size allows
        out = io.BytesIO()
        (sheet if colours is None else sheet.quantize(colours)).save(out, "PNG", optimize=True)
        if out.tell() <= PICTURE_BYTES:
            break
    Path(path).write_bytes(out.getvalue())


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _row(height: int, title: str, arrow: str, note: str = "") -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (WIDTH, height), "white")
    pen = ImageDraw.Draw(image)
    pen.text((24, 6), title, fill=INK, font=_font(22))
    pen.multiline_text((24, 38), _wrap(arrow, 25), fill=ACCENT, font=_font(14), spacing=4)
    lines = _wrap(arrow, 25).count("\n") + 1
    pen.multiline_text((24, 46 + 20 * lines), _wrap(note, 27), fill=MUTED, font=_font(13), spacing=4)
    return image, pen


def _wrap(text: str, width: int, lines: int = 4) -> str:
    """Text in lines of at most `width` characters; what does not fit into `lines` lines is cut."""
    printable = "".join(c if c.isprintable() and ord(c) < 0x2100 else "·" for c in text)
    wrapped = textwrap.wrap(printable, width, max_lines=lines, placeholder=" …")
    return "\n".join(wrapped)


def _big(frame: np.ndarray, side: int) -> Image.Image:
    resample = Image.Resampling.NEAREST if side % frame.shape[0] == 0 else Image.Resampling.LANCZOS
    return Image.fromarray(np.ascontiguousarray(frame)).resize((side, side), resample)


def _first(media: Mapping[str, Any], part: str, name: str) -> tuple[str, list[dict[str, Any]]]:
    """The examples of a task in a part of the media: robot first, then human."""
    for key in (name, f"{name}_human"):
        if media.get(part, {}).get(key):
            return media.get("arrows", {}).get(name, ""), media[part][key]
    return "", []


def _world(media: Mapping[str, Any]) -> Image.Image | None:
    arrow, examples = _first(media, "frames", "forward_dynamics")
    if not examples:
        return None
    side = 128
    image, pen = _row(side + 24, "world model", arrow, "the picture after the robot has acted")
    x = LEFT + 24
    for example in examples[:2]:
        for label, frame in (
            ("now", example["given"]),
            ("real", example["real"][-1]),
            ("model", example["predicted"][-1]),
        ):
            image.paste(_big(frame, side), (x, 22))
            pen.text((x, 2), label, fill=ACCENT if label == "model" else MUTED, font=_font(14))
            x += side + 6
        x += 30
    return image


def _policy(rollouts: Sequence[Mapping[str, Any]]) -> Image.Image | None:
    rollouts = [r for r in rollouts if r.get("policy") == rollouts[0].get("policy")]
    shown = [r for r in rollouts if isinstance(r.get("frames"), np.ndarray) or isinstance(r.get("video"), np.ndarray)]
    if not shown:
        return None
    best = next((r for r in shown if r.get("success")), shown[0])
    frames = best["frames"] if isinstance(best.get("frames"), np.ndarray) else best["video"]
    wins = sum(bool(r.get("success")) for r in rollouts)
    note = f"{best['task']}: success" if best.get("success") else str(best["task"])
    image, _ = _row(
        136, "policy", "text, image, proprio -> action", f"{note}; {wins} of {len(rollouts)} rollouts succeed"
    )
    at = np.linspace(0, len(frames) - 1, 8).round().astype(int)
    for i, step in enumerate(at):
        image.paste(_big(frames[step], 112), (LEFT + 24 + i * 119, 12))
    return image


def _video(media: Mapping[str, Any]) -> Image.Image | None:
    arrow, examples = _first(media, "frames", "video_prediction")
    if not examples:
        return None
    example, side = examples[0], 96
    image, pen = _row(2 * side + 12, "video prediction", arrow, f"“{example['text']}”" if example["text"] else "")
    frames = np.linspace(0, len(example["real"]) - 1, min(8, len(example["real"]))).round().astype(int)
    for line, (label, name) in enumerate((("real", "real"), ("model", "predicted"))):
        pen.text((LEFT + 24, line * (side + 6) + side // 2 - 8), label, fill=ACCENT if line else MUTED, font=_font(14))
        for i, f in enumerate(frames):
            image.paste(_big(example[name][f], side), (LEFT + 80 + i * (side + 5), line * (side + 6)))
    return image


def _caption(media: Mapping[str, Any]) -> Image.Image | None:
    examples = [e for key in ("caption", "caption_human") for e in media.get("texts", {}).get(key, [])[:2]]
    examples = [e for e in examples if e["image"] is not None][:3]
    if not examples:
        return None
    image, pen = _row(112, "caption", media.get("arrows", {}).get("caption", ""))
    for i, example in enumerate(examples):
        x = LEFT + 24 + i * 320
        image.paste(_big(example["image"], 96), (x, 8))
        colour = RIGHT if example["right"] else WRONG
        pen.multiline_text((x + 106, 8), _wrap(example["predicted"], 22, 2), fill=colour, font=_font(16), spacing=4)
        truth = "right" if example["right"] else "real: " + example["truth"]
        pen.multiline_text((x + 106, 58), _wrap(truth, 28, 2), fill=MUTED, font=_font(13), spacing=3)
    return image


def _value(media: Mapping[str, Any]) -> Image.Image | None:
    arrow, curves = _first(media, "curves", "value")
    if not curves:
        return None
    image, pen = _row(128, "value", arrow, "progress towards the goal, over an episode")
    for i, curve in enumerate(curves[:3]):
        x, y, width, height = LEFT + 24 + i * 320, 10, 290, 90
        pen.rectangle([x, y, x + width, y + height], outline=LINE)
        across = x + np.asarray(curve["seconds"]) / max(float(curve["seconds"][-1]), 1e-6) * width
        for name, colour, thick in (("true", "#b3bac5", 2), ("predicted", ACCENT, 3)):
            down = y + height - np.clip(curve[name], 0, 1) * height
            pen.line(list(zip(across.tolist(), down.tolist())), fill=colour, width=thick)
        pen.text((x, y + height + 3), _wrap(curve["text"], 40, 1), fill=MUTED, font=_font(13))
    return image
