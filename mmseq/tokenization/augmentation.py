"""Changes of pictures while a tokenizer is trained, so that it also knows what a camera might have seen.

An augmentation is a function (frames uint8 (N, H, W, 3), numpy Generator) -> frames of the same shape and type; those
of plug-ins stand in the group `mmseq.augmentations`.
"""

from __future__ import annotations

import numpy as np

LARGEST_SHIFT = 1 / 16  # of a picture's side


def shift(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each picture moved by up to a sixteenth of its side, its edge repeated (Yarats et al. 2021, DrQ)."""
    _, height, width, _ = frames.shape
    reach_y, reach_x = (max(1, round(side * LARGEST_SHIFT)) for side in (height, width))
    padded = np.pad(frames, ((0, 0), (reach_y, reach_y), (reach_x, reach_x), (0, 0)), mode="edge")
    tops, lefts = rng.integers(0, 2 * reach_y + 1, len(frames)), rng.integers(0, 2 * reach_x + 1, len(frames))
    cut = [f[top : top + height, left : left + width] for f, top, left in zip(padded, tops, lefts)]
    return np.stack(cut) if cut else frames
