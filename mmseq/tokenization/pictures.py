"""Pictures beside each other: how alike they are, and a strip of them for a person to look at."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

PSNR_CAP_DB = 60.0  # of identical pictures, whose error is zero
MOVED = 25  # of 255: a pixel further than that from the background, in any channel, shows something that moves
LEAST_MOVING = 8  # pixels of a picture in which anything that moves can be judged
STRIP_SCALE = 2  # small frames are enlarged so that a person can see them
STRIP_GAP = 4  # between rows


def psnr_db(mse: np.ndarray | float) -> Any:
    """10 log10(255^2 / mean squared error) in dB, on the scale of 0 to 255, of one error or of many."""
    return 10 * np.log10(255.0**2 / np.maximum(mse, 255.0**2 / 10 ** (PSNR_CAP_DB / 10)))


def psnr(real: UInt8[np.ndarray, "N H W 3"], other: UInt8[np.ndarray, "N H W 3"]) -> Float[np.ndarray, " N"]:
    """Per picture, in dB: uint8 (N, H, W, 3) twice -> (N,)."""
    error = (real.astype(np.float64) - other.astype(np.float64)) ** 2
    return psnr_db(error.reshape(len(error), -1).mean(1))


def psnr_of_moving(
    real: UInt8[np.ndarray, "N H W 3"], other: UInt8[np.ndarray, "N H W 3"], background: UInt8[np.ndarray, "H W 3"]
) -> Float[np.ndarray, " N"]:
    """Per picture, in dB, where the real one shows what moves: pixels that differ from the background. NaN where there
    are fewer than `LEAST_MOVING`. A picture in which the robot has vanished has there what the background has."""
    shown = (np.abs(real.astype(np.int16) - background) > MOVED).any(-1)
    error = ((real.astype(np.float64) - other) ** 2).mean(-1)
    count = shown.sum((1, 2))
    found = psnr_db((error * shown).sum((1, 2)) / np.maximum(count, 1))
    return np.where(count >= LEAST_MOVING, found, np.nan)


def strip(*rows: Any, scale: int = STRIP_SCALE, gap: int = 0) -> np.ndarray:
    """Rows of frames (N, H, W, 3) as one picture, enlarged, white between rows; gap: and between frames."""
    lines: list[np.ndarray] = []
    for frames in rows:
        apart = np.pad(np.asarray(frames), ((0, 0), (0, 0), (0, gap), (0, 0)), constant_values=255)
        line = np.concatenate(list(apart), axis=1)[:, : -gap or None].repeat(scale, 0).repeat(scale, 1)
        if lines:
            lines.append(np.full((STRIP_GAP, line.shape[1], 3), 255, np.uint8))
        lines.append(line)
    return np.concatenate(lines)
