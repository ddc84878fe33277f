"""A checkpoint is one directory that needs nothing else, and says so when it is not whole."""

import json
import shutil

import pytest
import torch

from mmseq import SequenceModel
from mmseq.errors import CheckpointError, FingerprintError
from mmseq.testing import tiny


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_it_comes_back_the_same(model, saved):
    again = SequenceModel.from_pretrained(saved)
    assert again.config == model.config
    assert again.vocabulary.fingerprint == model.vocabulary.fingerprint
    assert again.tokenizers.fingerprints() == model.tokenizers.fingerprints()
    plain = model.transformer.plain_state()
    assert again.transformer.state_dict().keys() == plain.keys()
    assert all(torch.equal(value, plain[name]) for name, value in again.transformer.state_dict().items())
    episode = tiny.episode(3)
    arrow = "text, image, proprio -> action[4]"
    assert (again.predict(arrow, episode, 2)["action"] == model.predict(arrow, episode, 2)["action"]).all()
    assert again.score("image -> image@+2", episode) == pytest.approx(model.score("image -> image@+2", episode))


@pytest.mark.parametrize("tied", [True, False])
def test_what_codes_share_is_saved_in_their_rows(tied, tmp_path):
    model = tiny.model(tie_embeddings=tied)
    model.save_pretrained(tmp_path)
    again = SequenceModel.from_pretrained(tmp_path)
    assert again.transformer.code_projection is None
    assert again.parameters_count == model.parameters_count
    for arrow in ("text, image, proprio -> action[4]", "image, action[2] -> image@+2", "text, image -> progress"):
        assert again.score(arrow, tiny.episode(3), 4) == pytest.approx(model.score(arrow, tiny.episode(3), 4), abs=1e-5)
    again.learn_codes()  # to go on training changes nothing at first
    assert again.score("image -> image@+2", tiny.episode(3)) == pytest.approx(
        model.score("image -> image@+2", tiny.episode(3)), abs=1e-5
    )


def test_a_checkpoint_of_another_format_is_refused(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "format": 1}))
    with pytest.raises(CheckpointError, match="has format 1, this version of mmseq reads format"):
        SequenceModel.from_pretrained(saved)


def test_it_is_independent_of_where_it_lies(model, saved, tmp_path):
    moved = shutil.move(saved, tmp_path / "elsewhere")
    assert SequenceModel.from_pretrained(moved).parameters_count == model.parameters_count


@pytest.mark.parametrize(
    "file",
    [
        "config.json",
        "model.safetensors",
        "tokenizers/tokenizers.json",
        "tokenizers/vision.safetensors",
        "tokenizers/text.model",
    ],
)
@pytest.mark.parametrize("damage", ["absent", "empty", "truncated", "rubbish"])
def test_a_damaged_file_is_an_error_that_a_user_can_read(saved, file, damage):
    path = saved / file
    data = path.read_bytes()
    path.unlink()
    if damage != "absent":
        path.write_bytes({"empty": b"", "truncated": data[: len(data) // 2], "rubbish": b"\x00{rubbish" * 50}[damage])
    with pytest.raises((CheckpointError, FingerprintError)) as caught:
        SequenceModel.from_pretrained(saved)
    assert str(saved) in str(caught.value) or "tokenizer" in str(caught.value)


def test_a_wrong_directory_says_what_to_name(tmp_path):
    for path, message in ((tmp_path, "is not a checkpoint"), (tmp_path / "absent", "does not exist")):
        with pytest.raises(CheckpointError, match=message):
            SequenceModel.from_pretrained(path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="model_type is 'llama'"):
        SequenceModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("exchange", ["all", "vision", "text", "embodiment"])
def test_exchanged_tokenizers_are_refused(saved, tmp_path, exchange):
    robot = tiny.embodiment(size=32) if exchange in ("all", "embodiment") else tiny.embodiment()
    other = tiny.tokenizers((robot,), seed=7)
    if exchange == "all":  # complete, consistent, of the same sizes, and not those of the model
        other.save(saved / "tokenizers")
    elif exchange == "embodiment":
        robot.save(saved / "tokenizers" / "embodiments" / "arm.json")
    else:
        other.save(tmp_path / "other")
        if exchange == "text":
            from mmseq.tokenization.text import TextTokenizer

            TextTokenizer.train(["an entirely different text", "and more of it"], vocab_size=290).save(
                tmp_path / "other"
            )
        for path in (tmp_path / "other").glob(f"{exchange}.*"):
            shutil.copy(path, saved / "tokenizers")
    with pytest.raises(FingerprintError, match="other tokenizers"):
        SequenceModel.from_pretrained(saved)


def test_a_config_that_contradicts_the_weights_is_refused(saved):
    config = json.loads((saved / "config.json").read_text())
    wrong_types = ({"width": "wide"}, {"rope_theta": "x"}, {"qk_norm": 1}, {"rope_scaling": 3}, {"layers": 2.5})
    for changes in ({"layers": 3}, {"width": 64}, {"heads": 3}, {"wheels": 4}, {"qkv_bias": True}, *wrong_types):
        (saved / "config.json").write_text(json.dumps({**config, "model": {**config["model"], **changes}}))
        with pytest.raises(CheckpointError, match=rf"model\.{next(iter(changes))}|do not fit"):
            SequenceModel.from_pretrained(saved)


def test_a_config_of_before_a_field_was_added_still_loads(model, saved):
    config = json.loads((saved / "config.json").read_text())
    for name in ("rope_scaling", "nope_every", "qkv_bias", "context_tokens"):
        del config["model"][name]
    (saved / "config.json").write_text(json.dumps(config))
    assert SequenceModel.from_pretrained(saved).config == model.config


def test_a_checkpoint_may_be_saved_over_itself(saved):
    model = SequenceModel.from_pretrained(saved)
    before = {k: v.clone() for k, v in model.transformer.plain_state().items()}
    model.save_pretrained(saved)
    after = SequenceModel.from_pretrained(saved).transformer.state_dict()
    assert all(torch.equal(v, before[k]) for k, v in after.items())


def test_weights_are_never_unpickled(saved):
    torch.save({"a": torch.zeros(1)}, saved / "model.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        SequenceModel.from_pretrained(saved)


def test_a_loaded_model_does_not_depend_on_its_file_any_more(tmp_path):
    """Who copies another checkpoint over one that serves must not change it, or cut off what it reads."""
    tiny.model(seed=0).save_pretrained(tmp_path)
    model = SequenceModel.from_pretrained(tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        opened.write(b"\xff" * (file.stat().st_size // 2))
    file.open("r+b").truncate(1000)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
