"""What is true, under the names and in the shapes in which it is predicted."""

import numpy as np
import pytest

from mmseq.episode import TextSpan
from mmseq.errors import TaskError
from mmseq.inference import decoding
from mmseq.inference.output import to_json, truth, write_prediction
from mmseq.tasks import Task
from mmseq.testing import tiny
from mmseq.tokenization.pictures import strip


@pytest.mark.parametrize("cameras", [("front",), ("front", "wrist")])
@pytest.mark.parametrize(
    "arrow",
    [
        "text, image, proprio -> action[4]",
        "image -> image@+3",
        "image -> image@end",
        "image.front -> image.front@+2",
        "text, image -> video[3], plan",
        "text, (image, proprio -> action[2]) * 3",
        "(image -> image@+1, action[1]) * 2",
        "image -> progress, success, text",
    ],
)
def test_truth_has_the_form_of_the_prediction(monkeypatch, arrow, cameras):
    monkeypatch.setattr(decoding, "MAX_TEXT_TOKENS", 4)
    robot = tiny.embodiment("r", cameras)
    model = tiny.model(tiny.tokenizers((robot,)))
    episode = tiny.episode(1, robot=robot)
    predicted = model.predict(arrow, episode, 5).streams
    real = truth(Task.parse(arrow), episode, 5, model.tokenizers)
    assert real.keys() == predicted.keys()
    for key, value in predicted.items():
        assert np.shape(real[key]) == np.shape(value), key


def test_truth_is_what_happened():
    bundle, episode = tiny.tokenizers(), tiny.episode(1)
    real = truth(Task.parse("image -> image@+3, action[2], progress, text"), episode, 4, bundle)
    assert (real["image"] == episode["image.front"][7]).all()
    assert (real["action"] == episode["action"][4:6]).all()
    assert real["progress"] == pytest.approx(4 / 23)
    assert real["text"] == episode.texts[0]
    assert truth(Task.parse("image -> image@+3, action[2]"), episode, 21, bundle).keys() == {"action"}
    assert truth(Task.parse("image -> action[2]"), tiny.video(1), 4, bundle) == {}


def test_a_text_of_other_steps_is_no_truth(monkeypatch, tmp_path):
    monkeypatch.setattr(decoding, "MAX_TEXT_TOKENS", 4)
    model, episode = tiny.model(), tiny.episode(1)
    episode.plans, episode.spans = [], [TextSpan("plan", 0, 8, ("reach",))]
    records = [
        write_prediction(model.predict("text, image -> plan", episode, t), episode, model.tokenizers, tmp_path)
        for t in (7, 15)
    ]
    assert records[0]["streams"]["plan"]["real"] == "reach"
    assert records[1]["streams"]["plan"].keys() == {"value"}


@pytest.mark.parametrize(
    ("arrow", "t", "fix"),
    [
        ("image@-4 -> action[2]", 2, "t from 4 to 9"),  # not to 13, which the episode does not have
        ("image@-4, image@+2 -> action[2]", 2, "t from 4 to 7"),
        ("image@-4, image@+2 -> action[2]", 8, "t from 4 to 7"),
        ("image@+3 -> action[2]", 8, "t from 0 to 6"),
        ("image@-6, image@+5 -> action[2]", 2, "[Uu]se a longer episode"),
    ],
)
def test_a_moment_that_is_advised_can_be_predicted_at(arrow, t, fix):
    model, episode = tiny.model(), tiny.episode(1, length=10)
    with pytest.raises(TaskError, match=fix):
        model.predict(arrow, episode, t)
    bounds = [int(word) for word in fix.split() if word.isdigit()]
    for advised in bounds:
        assert model.predict(arrow, episode, advised)["action"].shape == (2, 4)


def test_pictures_and_numbers():
    frames = np.zeros((3, 4, 4, 3), np.uint8)
    assert strip(frames, frames).shape == (4 * 2 * 2 + 4, 3 * 4 * 2, 3)
    assert to_json({"a": [[1, 2], [3, 4]], "b": ["x"]}).count("\n") == 8
