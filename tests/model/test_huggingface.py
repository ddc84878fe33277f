"""transformers' Auto classes load and save checkpoints of ours."""

import pytest
import torch

from mmseq import SequenceModel
from mmseq.errors import CheckpointError, ConfigError
from mmseq.packing import collate
from mmseq.tasks import Task
from mmseq.testing import tiny
from mmseq.tokenization.bundle import EpisodeTokens

transformers = pytest.importorskip("transformers")
ARROW = "text, image, proprio -> action[4]"


@pytest.fixture
def checkpoint(tmp_path):
    import mmseq.model.huggingface  # noqa: F401

    model = tiny.model()
    model.tasks = {"policy": ARROW}
    model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_a_checkpoint_loads_and_is_written_again(checkpoint, tmp_path):
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    assert config.model_type == "mmseq"
    assert config.tasks == {"policy": ARROW}
    model = transformers.AutoModel.from_pretrained(checkpoint)
    assert not model.training
    episode = tiny.episode(3)
    wanted = SequenceModel.from_pretrained(checkpoint).predict("policy", episode, 2)["action"]
    assert (model.sequence.predict("policy", episode, 2)["action"] == wanted).all()
    model.save_pretrained(tmp_path / "copy")
    files = sorted(p.relative_to(checkpoint) for p in checkpoint.rglob("*") if p.is_file())
    assert len(files) > 5
    assert all((tmp_path / "copy" / p).read_bytes() == (checkpoint / p).read_bytes() for p in files)


@torch.inference_mode()
def test_hidden_states_are_those_of_the_model(checkpoint):
    model = transformers.AutoModel.from_pretrained(checkpoint)
    bundle = model.sequence.tokenizers
    build = lambda arrow: bundle.builder().build(Task.parse(arrow), EpisodeTokens(tiny.episode(1), bundle), 2)
    sequences = [build("text, proprio -> action[2]"), build("text -> plan")]
    longest = max(map(len, sequences))
    padded = lambda values: torch.tensor([[*v, *[0] * (longest - len(v))] for v in values])
    ids = padded([s.ids for s in sequences])
    slots = torch.stack([torch.from_numpy(s.input.padded(longest, 0).slots) for s in sequences])
    mask = padded([[1] * len(s) for s in sequences])
    found = model(input_ids=ids, attention_mask=mask, slots=slots).last_hidden_state
    wanted = model.sequence.hidden(collate(sequences, bundle.vocabulary))
    torch.testing.assert_close(found[mask.bool()], wanted, rtol=0, atol=1e-6)
    with pytest.raises(ConfigError, match="Pad on the right"):
        model(input_ids=ids, attention_mask=mask.flip(1))


def test_types_devices_and_what_means_nothing_here(checkpoint, tmp_path):
    load = transformers.AutoModel.from_pretrained
    assert load(checkpoint, dtype=torch.bfloat16, device_map="cpu").dtype == torch.bfloat16
    assert load(checkpoint, dtype="auto").dtype == torch.float32
    with pytest.raises(ConfigError, match="no option max_memory"):
        load(checkpoint, max_memory={0: "1GB"})
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        load(checkpoint)
