"""Small, nearly lossless MP4 files."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np

# yuv444p, since at 64 pixels a quarter of the colour is what 4:2:0 loses first (34 dB against 49)
CRF, PIXEL_FORMAT, PRESET, KEYFRAME_EVERY = 4, "yuv444p", "ultrafast", 2


def write_mp4(path: str | Path, images: np.ndarray, rate_hz: float) -> None:
    """Write `images`, uint8 (steps, H, W, 3) RGB, as H.264 at about 49 dB."""
    import av

    rate = Fraction(rate_hz).limit_denominator(1001)
    options = {"crf": str(CRF), "preset": PRESET, "g": str(KEYFRAME_EVERY), "threads": "1"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width = images.shape[1:3]
        stream.pix_fmt = PIXEL_FORMAT
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
