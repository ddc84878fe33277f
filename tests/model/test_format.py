"""A checkpoint that the program of before wrote still loads, and answers as that program did.

`format_2/` was written at a time when a model had one slot for each place, and tokenizers a fixed set of ranges;
`expected.json` has what that program predicted.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mmseq import SequenceModel
from mmseq.errors import FingerprintError, TaskError
from mmseq.testing import tiny
from mmseq.tokenization.bundle import Tokenizers
from mmseq.training.config import TrainConfig
from mmseq.training.start import build_model

FOLDER = Path(__file__).parent / "format_2"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


@pytest.fixture(scope="module")
def model():
    return SequenceModel.from_pretrained(FOLDER)


@pytest.mark.parametrize("case", EXPECTED)
def test_it_answers_as_it_did(model, case, monkeypatch):
    monkeypatch.setattr(model.tokenizers.vision, "readout", "likeliest")  # frames were decoded so
    arrow, name = case.split(" | ")
    episode = tiny.episode(1 + (name == "two"), robot=model.tokenizers.embodiment(name))
    wanted = dict(EXPECTED[case])
    assert model.score(arrow, episode, t=3) == pytest.approx(wanted.pop("score"), abs=1e-5)
    found = model.predict(arrow, episode, t=4).streams
    assert found.keys() == wanted.keys()
    for key, value in found.items():
        if isinstance(value, np.ndarray) and value.dtype == np.uint8:
            assert int(value.astype(np.int64).sum()) == wanted[key]
        elif isinstance(value, str):
            assert value == wanted[key]
        else:
            np.testing.assert_allclose(value, wanted[key], atol=1e-5)


def test_it_is_saved_in_the_form_of_now_and_answers_the_same(model, tmp_path):
    model.save_pretrained(tmp_path / "again")
    again = SequenceModel.from_pretrained(tmp_path / "again")
    episode = tiny.episode(1, robot=model.tokenizers.embodiment("arm"))
    arrow = "image, action[4] -> image@+4"
    np.testing.assert_array_equal(
        again.predict(arrow, episode, t=4)["image"], model.predict(arrow, episode, t=4)["image"]
    )


def test_what_its_slots_cannot_tell_apart_is_refused(model):
    episode = tiny.episode(1, 90, robot=model.tokenizers.embodiment("arm"))
    model.predict("image -> action[64]", episode, t=4)
    with pytest.raises(TaskError, match="65 steps of 4 axes, at most 256 codes"):
        model.predict("image -> action[65]", episode, t=4)


def test_it_gains_a_range_when_training_starts_from_it(model):
    """Of a robot with a stream that it never had; what it knew is as it was."""
    felt = tiny.embodiment("felt").with_vectors({"force": tiny.axes("ab")})
    old = model.tokenizers
    bundle = old.with_embodiments([*old.embodiments.values(), felt])
    new = build_model(TrainConfig(init_from=str(FOLDER)), bundle).eval()
    assert "force" in new.vocabulary.ranges
    assert "force" not in model.vocabulary.ranges
    case = "text, image, proprio -> action[4] | arm"
    episode = tiny.episode(1, robot=old.embodiment("arm"))
    found = new.predict("text, image, proprio -> action[4]", episode, t=4)["action"]
    np.testing.assert_allclose(found, EXPECTED[case]["action"], atol=1e-5)
    touched = tiny.episode(3, robot=felt)
    touched.streams["force"] = tiny.episode(3).streams["proprio"]
    touched.streams["force"].values = touched["force"][:, :2]
    assert new.predict("image, force[2] -> force[3]", touched, t=4)["force"].shape == (3, 2)
    assert torch.isfinite(new.transformer.embed.weight).all()


def test_other_slots_are_not_taken_for_its_own(model):
    other = Tokenizers(dict(model.tokenizers), embodiments=list(model.tokenizers.embodiments.values()))
    with pytest.raises(FingerprintError, match="number places in another way"):
        build_model(TrainConfig(init_from=str(FOLDER)), other)


def test_a_part_of_it_that_was_exchanged_is_noticed(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "copy")
    path = tmp_path / "copy/tokenizers/tokenizers.json"
    path.write_text(path.read_text().replace('"action_bins": 32', '"action_bins": 16'))
    with pytest.raises(FingerprintError, match="action"):
        SequenceModel.from_pretrained(tmp_path / "copy")
