"""What is written is read back nearly without loss, and complete or not at all."""

import numpy as np
import pytest

from mmseq.data.video import read_frames
from mmseq.mp4 import encode_video, write_video


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b) ** 2))


def test_noise_and_odd_sizes_read_back_too():
    noise = np.random.default_rng(0).integers(0, 256, (5, 33, 47, 3), dtype=np.uint8)
    data, count = encode_video(noise, 12.5)
    assert count == 5
    assert psnr(read_frames(data), noise) > 40


def test_a_failed_write_leaves_nothing(tmp_path):
    def frames():
        yield np.zeros((8, 8, 3), np.uint8)
        raise RuntimeError("camera unplugged")

    with pytest.raises(RuntimeError):
        write_video(tmp_path / "a.mp4", frames(), 10)
    assert list(tmp_path.iterdir()) == []
