"""Frames of a camera as the contract wants them: the crop and the filter of `mmseq data import --size`."""

from __future__ import annotations

import numpy as np


def fit(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (H, W, 3) RGB of any size as (height, width, 3): the largest centred part of that shape, scaled.

    Raises: ValueError for anything else than uint8 RGB.
    """
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise ValueError(f"a frame is uint8 (H, W, 3) RGB, got {frame.dtype} {frame.shape}")
    if frame.shape[:2] == (height, width):
        return frame
    from PIL import Image

    scale = min(frame.shape[0] / height, frame.shape[1] / width)
    crop_h, crop_w = round(scale * height), round(scale * width)
    top, left = (frame.shape[0] - crop_h) // 2, (frame.shape[1] - crop_w) // 2
    how = Image.Resampling.BOX if scale >= 1 else Image.Resampling.BICUBIC
    box = (left, top, left + crop_w, top + crop_h)
    return np.asarray(Image.fromarray(frame).resize((width, height), how, box=box))
