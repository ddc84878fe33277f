"""What is exported computes in transformers what it computes here, and comes back as it went."""

import json

import pytest
import torch

from mmseq import SequenceModel
from mmseq.errors import CheckpointError, ConfigError
from mmseq.model.config import RopeScaling
from mmseq.model.export import export_hf
from mmseq.model.language_model import from_language_model
from mmseq.model.weights import StoredWeights
from mmseq.packing import collate
from mmseq.tasks import Task
from mmseq.testing import tiny
from mmseq.tokenization.bundle import EpisodeTokens

transformers = pytest.importorskip("transformers")
FAMILIES = {
    "llama": {"qk_norm": False},
    "qwen2": {"qk_norm": False, "qkv_bias": True},
    "qwen3": {"head_size": 16},
    "smollm3": {"qk_norm": False, "nope_every": 2},
}


def checkpoint(directory, text=None, **changes):
    """A checkpoint whose norms, biases and slots have been trained, so to speak."""
    model = tiny.model(tiny.tokenizers(text=text), layers=4, **changes)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1 or "slots" in name:
                p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    model.save_pretrained(directory)
    return SequenceModel.from_pretrained(directory)


def load(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_transformers_computes_the_same_for_text(tmp_path, family, tied):
    scaling = RopeScaling(original_max_position_embeddings=16) if tied else None
    ours = checkpoint(tmp_path / "ours", tie_embeddings=tied, rope_scaling=scaling, **FAMILIES[family])
    theirs = load(export_hf(tmp_path / "ours", tmp_path / "hf"))
    assert theirs.config.model_type == family
    tokens = EpisodeTokens(tiny.episode(1), ours.tokenizers)
    sequence = ours.tokenizers.builder().build(Task.parse("text, plan -> progress"), tokens, 2)
    batch = collate([sequence], ours.vocabulary)
    wanted = ours.hidden(batch) @ ours.transformer.output_rows(0, len(ours.vocabulary), None).t()
    found = theirs(batch.input.ids[None]).logits[0]
    assert len(found) > 20
    assert (found - wanted).abs().max() <= 1e-5


@torch.inference_mode()
def test_a_model_without_our_modules_is_exported_whole(tmp_path):
    bundle = tiny.tokenizers(merge=1)
    plain = {"slot_embeddings": False, "copying": False}
    tiny.model(bundle, **plain).save_pretrained(tmp_path / "ours")
    ours, theirs = SequenceModel.from_pretrained(tmp_path / "ours"), load(export_hf(tmp_path / "ours", tmp_path / "hf"))
    assert theirs.config.tie_word_embeddings
    sequence = bundle.builder().build(
        Task.parse("image, proprio -> action[2], image@+2"), EpisodeTokens(tiny.episode(1), bundle), 2
    )
    batch = collate([sequence], bundle.vocabulary)
    wanted = ours.hidden(batch) @ ours.transformer.output_rows(0, len(bundle.vocabulary), None).t()
    assert (theirs(batch.input.ids[None]).logits[0] - wanted).abs().max() <= 1e-5
    assert "- nothing" in (tmp_path / "hf/README.md").read_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_nothing_changes(tmp_path, family):
    """transformers -> ours -> checkpoint -> transformers."""
    theirs = tiny.language_model(tmp_path / "lm", family, padding=0)
    bundle = tiny.tokenizers(text=tmp_path / "lm")
    recipe = tiny.ModelConfig()
    from_language_model(tmp_path / "lm", recipe, bundle).save_pretrained(tmp_path / "ours")
    export_hf(tmp_path / "ours", tmp_path / "hf", text_only=True)
    again = load(tmp_path / "hf")
    assert type(again) is type(theirs)
    wanted, found = theirs.state_dict(), again.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(v, wanted[k]) for k, v in found.items())
    for field in ("rope_parameters", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings", "vocab_size"):
        assert getattr(again.config, field) == getattr(theirs.config, field), field
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "open the red drawer"
    assert tokenizer(text)["input_ids"] == bundle.text.encode(text)[:-1].tolist()
    assert tokenizer.eos_token_id == bundle.text.end
    generated = again.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert generated.shape[1] > len(tokenizer(text)["input_ids"])


def test_large_weights_are_sharded_and_half_precision_halves_them(tmp_path):
    ours = checkpoint(tmp_path / "ours")
    export_hf(tmp_path / "ours", tmp_path / "hf", shard_bytes=40_000)
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 3
    assert {p.name for p in files} == set(index["weight_map"].values())
    one = load(export_hf(tmp_path / "ours", tmp_path / "one")).state_dict()
    many = load(tmp_path / "hf").state_dict()
    assert all(torch.equal(v, many[k]) for k, v in one.items())
    export_hf(tmp_path / "ours", tmp_path / "half", dtype="bf16")
    half = StoredWeights(tmp_path / "half")
    assert all(half[name].dtype == torch.bfloat16 for name in half)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    assert ours.config.slot_embeddings


def test_our_own_checkpoints_are_sharded_when_large(tmp_path):
    model = tiny.model()
    model.save_pretrained(tmp_path, shard_bytes=40_000)
    assert not (tmp_path / "model.safetensors").exists()
    again = SequenceModel.from_pretrained(tmp_path).transformer.state_dict()
    assert all(torch.equal(v, again[k]) for k, v in model.transformer.plain_state().items())
    model.save_pretrained(tmp_path)  # over it, in one file
    assert [p.name for p in tmp_path.glob("model*")] == ["model.safetensors"]


def test_what_has_no_architecture_is_refused_and_nothing_is_written(tmp_path):
    checkpoint(tmp_path / "ours", qk_norm=True, nope_every=2)
    with pytest.raises(ConfigError, match=r"model\.qk_norm and model\.nope_every"):
        export_hf(tmp_path / "ours", tmp_path / "hf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours"]


def test_a_folder_that_holds_something_is_not_replaced(tmp_path):
    checkpoint(tmp_path / "ours")
    with pytest.raises(CheckpointError, match="exists, and nothing is replaced"):
        export_hf(tmp_path / "ours", tmp_path / "ours")
    assert (tmp_path / "ours/model.safetensors").is_file()


def test_the_readme_says_what_is_not_carried(tmp_path):
    ours = checkpoint(tmp_path / "ours")
    text = (export_hf(tmp_path / "ours", tmp_path / "hf") / "README.md").read_text()
    assert "merged vision: 2 x 2" in text
    assert "copying" in text
    assert f"| vision | {ours.vocabulary.ranges['vision'].start} |" in text
