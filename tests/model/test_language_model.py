"""A language model in our transformer computes what transformers computes; what does not fit is refused."""

import json

import numpy as np
import pytest
import torch

from mmseq.errors import CheckpointError, ConfigError, FingerprintError, MMSeqError
from mmseq.inputs import ModelInput
from mmseq.model import families
from mmseq.model.attention import documents_of
from mmseq.model.config import ModelConfig
from mmseq.model.language_model import from_language_model
from mmseq.model.transformer import Cache
from mmseq.testing import tiny
from mmseq.training.config import TrainConfig
from mmseq.training.start import build_model

pytest.importorskip("transformers")
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64, "rope_theta": 500_000.0}
MODELS = {
    "llama": ("llama", {}),
    "llama tied, smollm2": ("llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "llama 3.1": ("llama", {"rope_parameters": LLAMA3}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "smollm3": ("smollm3", {}),
    "smollm3 of 3": ("smollm3", {"no_rope_layer_interval": 3, "num_hidden_layers": 6}),
}
SLIDING = {"layer_types": None, "use_sliding_window": True, "sliding_window": 8}
LENGTHS = [70, 3, 200]


def start(directory, **recipe):
    bundle = tiny.tokenizers(text=directory)
    return from_language_model(directory, ModelConfig(**recipe), bundle).eval()


def of_text(ids):
    return ModelInput.of_ids(ids, np.zeros((len(ids), 2), np.int64), merge=2)


def text_only(model, ids_BT, lengths):
    """Packed documents of text through our transformer, and their logits over the pieces of text."""
    line = ModelInput.join([of_text(row[:n].numpy()) for row, n in zip(ids_BT, lengths)]).tensors()
    t = model.transformer
    codes = t.code_vectors()
    documents = documents_of(lengths, "cpu")
    hidden = t(line, codes, documents)
    return hidden @ t.output_rows(0, model.vocabulary.ranges["text"].size, codes).t()


def ids_for(model, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, model.vocabulary.ranges["text"].size, (len(lengths), max(lengths)), generator=generator)


@pytest.fixture(params=MODELS)
def pair(request, tmp_path):
    family, changes = MODELS[request.param]
    theirs = tiny.language_model(tmp_path / "lm", family, **changes)
    return theirs, start(tmp_path / "lm")


@torch.inference_mode()
def test_text_has_the_logits_of_the_language_model(pair):
    theirs, ours = pair
    ids = ids_for(ours)
    found = text_only(ours, ids, LENGTHS)
    wanted = torch.cat([theirs(ids[i : i + 1, :n]).logits[0] for i, n in enumerate(LENGTHS)])
    wanted = wanted[:, : found.shape[1]]
    assert wanted.std() > 0.1
    assert (found - wanted).abs().max() <= 1e-5


@torch.inference_mode()
def test_decoding_with_a_cache_gives_the_same_states(pair):
    theirs, ours = pair
    ids = ids_for(ours)[:2]
    t, n = ours.transformer, ids.shape[1]
    cache = Cache.empty(ours.config, 2, n, dtype=torch.float32, device="cpu")
    parts, first = [], 0
    for count in (50, 1, 1, 40, 1, n - 93):
        chunk = ids[:, first : first + count]
        x = t.inputs(of_text(chunk.flatten().numpy()).tensors(), t.code_vectors())
        positions = torch.arange(first, first + count).expand(2, -1)
        parts.append(t.extend(x.view(2, count, -1), positions, cache, first + count))
        first += count
    found = torch.cat(parts, 1) @ t.output_rows(0, ours.vocabulary.ranges["text"].size, t.code_vectors()).t()
    assert (found - theirs(ids).logits[..., : found.shape[-1]]).abs().max() <= 1e-5


def test_configs_of_transformers_4_read_the_same(tmp_path):
    tiny.language_model(tmp_path, rope_parameters=LLAMA3)
    new = start(tmp_path).config
    data = json.loads((tmp_path / "config.json").read_text())
    data.pop("rope_parameters")
    scaling = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    (tmp_path / "config.json").write_text(json.dumps({**data, "rope_theta": 500_000.0, "rope_scaling": scaling}))
    assert start(tmp_path).config == new
    assert new.rope_scaling is not None


def test_shards_are_read_and_a_missing_one_is_named(tmp_path):
    theirs = tiny.language_model(tmp_path, "qwen3")
    whole = start(tmp_path).transformer.state_dict()
    (tmp_path / "model.safetensors").unlink()
    theirs.save_pretrained(tmp_path, max_shard_size="30KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    again = start(tmp_path).transformer.state_dict()
    assert all(torch.equal(v, again[k]) for k, v in whole.items())
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=shards[1].name):
        start(tmp_path)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"attention_bias": True}, "attention_bias=True cannot be represented"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling.rope_type='yarn'"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters.rope_type='linear'"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"model_type": "mistral"}, "model_type is 'mistral'"),
        ("llama", {"hidden_size": "wide"}, "is damaged"),
        ("llama", {"hidden_size": None}, "lacks 'hidden_size'"),
        ("llama", {"num_key_value_heads": 3}, "kv_heads"),
        ("llama", {"vocab_size": 5}, "vocab_size=5, its tokenizer has"),
        ("llama", {"num_hidden_layers": 3}, "no place for"),
        ("llama", {"num_hidden_layers": 5}, "has no tensor 'model.layers.4"),
        ("llama", {"intermediate_size": 64}, "gate_proj.weight has the shape"),
        ("qwen2", {**SLIDING, "max_window_layers": 2}, "use_sliding_window"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"] * 2}, "layer_types"),
        ("smollm3", {"no_rope_layers": [1, 0, 0, 1]}, "no_rope_layers"),
    ],
)  # fmt: skip
def test_what_cannot_be_represented_is_refused_by_name(tmp_path, family, changes, message):
    tiny.language_model(tmp_path, family)
    data = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**data, **changes}))
    with pytest.raises(CheckpointError, match=message):
        start(tmp_path)


WRONG = (None, "x", [], ["x"], [None], {}, {"rope_type": []}, -1, 0, 1.5, True, float("nan"), float("inf"))


@pytest.mark.parametrize("family", families.ARCHITECTURES)
def test_a_damaged_config_is_read_or_refused_whatever_it_holds(tmp_path, family):
    tiny.language_model(tmp_path, family, rope_parameters=LLAMA3)
    data = json.loads((tmp_path / "config.json").read_text())
    legacy = {"rope_scaling": LLAMA3, "use_sliding_window": True, "sliding_window": 4, "no_rope_layer_interval": 2}
    messages, read = [], 0
    for values in (data, {**data, **legacy}):
        for name in (*values, *(f"rope_parameters.{k}" for k in LLAMA3)):
            for wrong in WRONG:
                changed = json.loads(json.dumps(values))
                outer, _, inner = name.partition(".")
                if inner:
                    changed[outer][inner] = wrong
                else:
                    changed[outer] = wrong
                try:
                    families.read_config(changed, "config.json")
                    read += 1
                except CheckpointError as error:
                    messages.append(str(error))
    assert read > 100
    assert len(messages) > 100
    assert all("config.json" in text for text in messages)


def test_a_recipe_may_be_silent_about_the_shape_but_not_contradict_it(tmp_path):
    tiny.language_model(tmp_path)
    assert start(tmp_path, width=32, z_loss=0.0).config.z_loss == 0.0
    with pytest.raises(ConfigError, match=r"the recipe has model\.width=64, .* has 32"):
        start(tmp_path, width=64)


def test_another_text_tokenizer_is_refused(tmp_path):
    tiny.language_model(tmp_path)
    own = tiny.tokenizers()
    with pytest.raises(FingerprintError, match=r"text\.kind=huggingface text\.path="):
        from_language_model(tmp_path, ModelConfig(), own)
    bundle = tiny.tokenizers(text=tmp_path)
    (tmp_path / "tokenizer.json").write_text((tmp_path / "tokenizer.json").read_text() + "\n")
    with pytest.raises(FingerprintError, match="the text tokenizer is"):
        from_language_model(tmp_path, ModelConfig(), bundle)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        from_language_model(tmp_path, ModelConfig(), bundle)


def test_pickled_weights_are_not_read(tmp_path):
    theirs = tiny.language_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle"):
        start(tmp_path)


def test_ids_with_gaps_have_a_place(tmp_path):
    tiny.language_model(tmp_path, padding=20)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["model"]["vocab"]["window"] = last = max(data["model"]["vocab"].values()) + 9
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert tiny.tokenizers(text=tmp_path).text.size == last + 1
    assert start(tmp_path).vocabulary.ranges["text"].size == last + 1


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_like_those_of_text(tmp_path, tied):
    tiny.language_model(tmp_path, tie_word_embeddings=tied)
    model = start(tmp_path)
    t, ranges = model.transformer, model.vocabulary.ranges
    codes = t.code_vectors()
    text, new = (
        t.output_rows(0, ranges["text"].size, codes),
        t.output_rows(ranges["vision"].start, len(model.vocabulary), codes),
    )
    assert (new.mean(0) - text.mean(0)).abs().max() < 0.5 * text.std(0).mean()
    ratio = new.std(0).mean() / text.std(0).mean()
    assert 0.7 < ratio < 1.4
    again = start(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


def test_neighbouring_bins_learn_together(tmp_path):
    tiny.language_model(tmp_path)
    model = start(tmp_path)
    projection = model.transformer.code_projection
    assert projection is not None
    bins = model.vocabulary.ranges["action"]
    rows = model.transformer.output_rows(bins.start, bins.stop, model.transformer.code_vectors())
    rows = rows - rows.mean(0)
    alike = torch.nn.functional.cosine_similarity(rows[:-1], rows[1:]).mean()
    far = torch.nn.functional.cosine_similarity(rows[: len(rows) // 2], rows[len(rows) // 2 :]).mean()
    assert alike > far + 0.2
    rows.sum().backward()
    assert projection.weight.grad is not None


def test_it_acts_and_is_saved_like_any_other_model(tmp_path):
    from mmseq import SequenceModel

    tiny.language_model(tmp_path / "lm", "smollm3", rope_parameters={**LLAMA3})
    model = start(tmp_path / "lm")
    episode = tiny.episode(1)
    model.save_pretrained(tmp_path / "ours")
    again = SequenceModel.from_pretrained(tmp_path / "ours")
    assert again.config == model.config
    arrow = "text, image, proprio -> action[4]"
    assert (again.predict(arrow, episode, 2)["action"] == model.predict(arrow, episode, 2)["action"]).all()


def test_a_directory_that_is_absent_or_no_model_is_named(tmp_path):
    bundle = tiny.tokenizers()
    make = lambda path: build_model(TrainConfig(init_from=str(path)), bundle)
    with pytest.raises(MMSeqError, match="nothing is downloaded"):
        make("HuggingFaceTB/SmolLM2-135M")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        make(tmp_path)
