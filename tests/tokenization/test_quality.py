"""What tokenizing costs, on cases worked out by hand, and the pictures that show it."""

import numpy as np
import pytest

from mmseq.testing import tiny
from mmseq.tokenization.pictures import PSNR_CAP_DB, psnr, psnr_db, psnr_of_moving, strip
from mmseq.tokenization.quality import codebook_use, vector_errors


def test_one_cap_for_every_psnr():
    same = np.zeros((2, 4, 4, 3), np.uint8)
    assert psnr(same, same).tolist() == [PSNR_CAP_DB] * 2 == [psnr_db(0.0)] * 2
    assert psnr_db(255.0**2 / 100) == pytest.approx(20)


def test_a_robot_that_vanished_wins_the_likeness_of_the_whole_and_loses_that_of_what_moves():
    background = np.full((16, 16, 3), 90, np.uint8)
    real = background[None].copy()
    real[0, 4:8, 4:8] = 200  # the robot
    late, vanished = background[None].copy(), background[None].copy()
    late[0, 4:8, 6:10] = 200  # it lags by two pixels: half of it is where it is
    assert psnr(real, vanished)[0] == pytest.approx(psnr(real, late)[0])  # each is wrong in 16 pixels
    judge = lambda other: psnr_of_moving(real, other, background)[0]
    assert judge(real) == PSNR_CAP_DB
    assert judge(late) == pytest.approx(psnr_db(110.0**2 / 2))
    assert judge(vanished) == pytest.approx(psnr_db(110.0**2))
    assert judge(vanished) < judge(late)
    assert np.isnan(psnr_of_moving(background[None], real, background)[0])  # nothing moves


def test_use_of_a_codebook():
    assert codebook_use(np.array([3, 0, 3, 0, 0])) == {
        "size": 5,
        "used": 2,
        "perplexity": pytest.approx(2),
        "tokens": 6,
    }


def test_vectors_are_measured_by_robot():
    tokenizers = tiny.tokenizers()
    episodes = [tiny.episode(0), tiny.video(1), tiny.episode(2)]
    ((robot, (axes, values, errors)),) = vector_errors(tokenizers, episodes, "action").items()
    assert robot == "arm"
    assert len(values) == len(episodes[0]) + len(episodes[2])
    assert errors == pytest.approx(tokenizers["action"].error(values, axes))
    assert vector_errors(tokenizers, [tiny.video(1)], "action") == {}


def test_a_strip_is_white_between_rows_and_frames():
    row = np.arange(2, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 3), np.uint8)
    assert strip(row).shape == (4, 12, 3)
    assert strip(row, row).shape == (4 + 4 + 4, 12, 3)
    apart = strip(row, row, scale=1, gap=2)
    assert apart.shape == (2 + 4 + 2, 3 + 2 + 3, 3)
    assert apart[0, :, 0].tolist() == [0, 0, 0, 255, 255, 1, 1, 1]
    assert (apart[2:6] == 255).all()
