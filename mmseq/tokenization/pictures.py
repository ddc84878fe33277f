"""Pictures beside each other: how alike they are, and a strip of them for a person to look at."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8

PSNR_CAP_DB = 60.0  # of identical pictures, whose error is zero
STRIP_SCALE = 2  # small frames are enlarged so that a person can see them
STRIP_GAP = 4


def psnr(real: UInt8[np.ndarray, "N H W 3"], other: UInt8[np.ndarray, "N H W 3"]) -> Float[np.ndarray, " N"]:
    """Per picture, 10 log10(255^2 / mean squared error) in dB: uint8 (N, H, W, 3) twice -> (N,)."""
    error = (real.astype(np.float64) - other.astype(np.float64)) ** 2
    mse = error.reshape(len(error), -1).mean(1)
    return 10 * np.log10(255.0**2 / np.maximum(mse, 255.0**2 / 10 ** (PSNR_CAP_DB / 10)))


def strip(*rows: np.ndarray) -> np.ndarray:
    """Rows of frames (N, H, W, 3) as one picture, enlarged, a white gap between rows."""
    lines: list[np.ndarray] = []
    for frames in rows:
        line = np.concatenate(list(frames), axis=1).repeat(STRIP_SCALE, 0).repeat(STRIP_SCALE, 1)
        if lines:
            lines.append(np.full((STRIP_GAP, line.shape[1], 3), 255, np.uint8))
        lines.append(line)
    return np.concatenate(lines)
