"""A run starts from fresh weights, a language model or a checkpoint, and says what does not belong together."""

import pytest
import torch
import yaml

from mmseq import SequenceModel
from mmseq.config import load_config, to_yaml
from mmseq.data.mixture import MixConfig, SourceConfig, TaskConfig
from mmseq.errors import CheckpointError, ConfigError, FingerprintError
from mmseq.model.config import ModelConfig, RopeScaling
from mmseq.testing import tiny
from mmseq.tokenization.bundle import Tokenizers
from mmseq.tokenization.text import TextTokenizer
from mmseq.training.config import TrainConfig
from mmseq.training.start import build_model, in_todays_terms, model_shape
from mmseq.vocabulary import Vocabulary

ARM, HAND, LEG = (tiny.embodiment(name) for name in ("arm", "hand", "leg"))
ARROW = "text, image, proprio -> action[4]"


@pytest.fixture
def checkpoint(tmp_path):
    tiny.model(tiny.tokenizers((ARM, HAND))).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def build(checkpoint, robots, **model):
    bundle = tiny.tokenizers(robots)
    text = SequenceModel.from_pretrained(checkpoint).tokenizers.text
    bundle = Tokenizers({**bundle, "text": text}, embodiments=robots)
    return build_model(TrainConfig(init_from=str(checkpoint), model=ModelConfig(**model)), bundle)


def test_a_checkpoint_goes_on_as_it_was(checkpoint):
    old = SequenceModel.from_pretrained(checkpoint)
    new = build(checkpoint, (ARM, HAND), z_loss=0.0)
    assert new.config.width == old.config.width
    assert new.config.z_loss == 0.0
    assert new.transformer.code_projection is not None
    episode = tiny.episode(2)
    assert new.score(ARROW, episode, 3) == pytest.approx(old.score(ARROW, episode, 3), abs=1e-6)


def test_robots_keep_their_tokens_whatever_their_order(checkpoint):
    old = SequenceModel.from_pretrained(checkpoint)
    for robots in ((LEG, HAND), (HAND, ARM, LEG)):
        new = build(checkpoint, robots)
        rows = lambda m, name: m.transformer.embed.weight[m.vocabulary.embodiment(name)]
        for name in {r.name for r in robots} & {"arm", "hand"}:
            assert torch.equal(rows(new, name), rows(old, name))
        first = old.vocabulary.ranges["embodiment"].start
        assert torch.equal(rows(new, "leg"), old.transformer.embed.weight[first + 2])  # a spare one
        tokens = slice(first, first + 64)
        both = [m.transformer.embed.weight[tokens].sort(0).values for m in (old, new)]
        assert torch.equal(*both)


def test_training_does_not_write_into_the_checkpoint(checkpoint):
    files = {p: p.read_bytes() for p in checkpoint.rglob("*") if p.is_file()}
    model = build(checkpoint, (HAND, ARM))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2).add_(1)
    del model
    assert all(p.read_bytes() == data for p, data in files.items())


def test_what_does_not_belong_together_is_refused(checkpoint):
    with pytest.raises(ConfigError, match=r"the recipe has model\.copying=False"):
        build(checkpoint, (ARM,), copying=False)
    changed = tiny.embodiment("arm", size=32)
    with pytest.raises(FingerprintError, match=r"embodiment/arm.*give a changed embodiment another name"):
        build(checkpoint, (changed, HAND))
    text = TextTokenizer.train(["other words"], vocab_size=290)
    bundle = Tokenizers({**tiny.tokenizers(), "text": text}, embodiments=(ARM,))
    with pytest.raises(FingerprintError, match="text"):
        build_model(TrainConfig(init_from=str(checkpoint)), bundle)


def test_the_shape_is_known_before_the_weights_are_read(checkpoint, tmp_path):
    pytest.importorskip("transformers")
    tiny.language_model(tmp_path / "lm", "smollm3")
    for directory in (checkpoint, tmp_path / "lm"):
        for weights in directory.glob("*.safetensors"):
            weights.unlink()
        found = model_shape(TrainConfig(init_from=str(directory)))
        assert (found.width, found.nope_every) == (32, 4 if directory.name == "lm" else 0)
    (checkpoint / "config.json").write_text('{"model_type": "mmseq", "model": {"width": "wide"}}')
    with pytest.raises(CheckpointError, match=r"model\.width must be int, got 'wide'"):
        model_shape(TrainConfig(init_from=str(checkpoint)))


def test_a_resolved_recipe_reads_back(tmp_path):
    config = TrainConfig(out="x", model=ModelConfig(rope_scaling=RopeScaling(factor=32.0), qkv_bias=True))
    config.data.mix = config.data.tokens = config.data.tokenizers = "x"
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(TrainConfig, tmp_path / "config.yaml") == config
    with pytest.raises(ConfigError, match="factr"):
        load_config(TrainConfig, tmp_path / "config.yaml", ["model.rope_scaling.factr=3"])


def test_ranks_end_together_when_the_model_cannot_be_built(trainer, tmp_path):
    finished = trainer.run(tmp_path / "run", 2, f"init_from={tmp_path}/nowhere")
    assert finished.codes == [2, 2], finished.output[-2000:]
    assert "init_from" in finished.output
    assert not (tmp_path / "run").exists()


def test_header_tokens_of_streams_keep_their_rows_whatever_comes_beside_them(tmp_path):
    touch, push = ({name: tiny.axes("ab")} for name in ("tactile", "force"))
    feeling, pushing = ARM.with_vectors(touch), LEG.with_vectors(push)
    old = tiny.model(tiny.tokenizers((feeling,)))
    old.save_pretrained(tmp_path / "checkpoint")
    robots = (feeling, pushing)
    bundle = Tokenizers({**tiny.tokenizers(robots), "text": old.tokenizers.text}, embodiments=robots)
    assert bundle.vocabulary.header("tactile") != old.vocabulary.header("tactile")  # force comes before it
    new = build_model(TrainConfig(init_from=str(tmp_path / "checkpoint")), bundle)
    row = lambda model, name: model.transformer.embed.weight[model.vocabulary.header(name)]
    assert torch.equal(row(new, "tactile"), row(old, "tactile"))
    assert not torch.equal(row(new, "force"), row(old, "tactile"))
    swapped = [Vocabulary({"text": 4, **dict.fromkeys(names, 8)}) for names in (("a", "b"), ("b", "a"))]
    assert swapped[0].fingerprint != swapped[1].fingerprint


def test_a_run_goes_on_under_a_program_that_knows_more_settings():
    mix = MixConfig(sources={"arm": SourceConfig(path="data/arm")}, tasks=[TaskConfig(task=ARROW)])
    stored = {"seed": 0, "mix": to_yaml(mix), "model": ModelConfig(width=64).to_dict()}
    before = yaml.safe_load(stored["mix"])
    del before["sources"]["arm"]["swap_colours"]
    model = {k: v for k, v in stored["model"].items() if k not in ("slots", "soft", "z_loss")}
    assert in_todays_terms({**stored, "mix": yaml.safe_dump(before), "model": model}) == in_todays_terms(stored)
    before["tasks"][0]["task"] = "-> text"
    assert in_todays_terms({**stored, "mix": yaml.safe_dump(before)}) != in_todays_terms(stored)
    later = {**stored, "model": {**model, "of_tomorrow": 1}}
    assert in_todays_terms(later) == later
