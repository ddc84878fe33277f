"""Slices of a line of tokens; tests/training/test_sequence_parallel.py trains on them."""

import pytest
import torch

from mmseq.data.mixture import Mixture, load_mix
from mmseq.data.tokens import write_token_shards
from mmseq.errors import ConfigError
from mmseq.model.sequence_parallel import share
from mmseq.packing import collate
from mmseq.testing import tiny
from mmseq.training.config import TrainConfig

MIX = """
sources: {robot: {path: robot}}
tasks: [{task: "text, image, proprio -> action[4]"}, {task: "image, action[4] -> image@+4"}, {task: "video[4] -> text"}]
"""


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    root, bundle = tmp_path_factory.mktemp("data"), tiny.tokenizers()
    write_token_shards([tiny.episode(i) for i in range(4)], root / "tokens/robot", bundle, name="robot")
    (root / "mix.yaml").write_text(MIX)
    mixture = Mixture(load_mix(root / "mix.yaml"), root / "tokens", bundle, row_tokens=256, seed=0)
    sequences = [mixture.build(moments.moment(0)) for moments in mixture.moments]
    made = collate(sequences, bundle.vocabulary, tasks=list(range(len(sequences))))
    assert len(made.input.patch_at) and len(made.input.copy_at) and len(made.targets) > 2  # noqa: PT018
    return made


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_slices_hold_the_line(batch, parts):
    """Side by side the slices are the line: no token, merged frame, copy or target is lost, moved or doubled."""
    slices = [share(batch, i, parts, pad=5) for i in range(parts)]
    size = slices[0].tokens
    assert all(s.tokens == size and s.parts == parts for s in slices)
    spare = size * parts - batch.tokens
    assert 0 <= spare < parts
    for name, filler in (("ids", [5] * spare), ("slots", [[0, 0]] * spare), ("positions", list(range(spare)))):
        whole = torch.cat([getattr(s.input, name) for s in slices]).tolist()
        assert whole == getattr(batch.input, name).tolist() + filler
    for at, values in (("patch_at", "patch_ids"), ("copy_at", "copy_ids")):
        places = torch.cat([getattr(s.input, at) + i * size for i, s in enumerate(slices)])
        assert places.equal(getattr(batch.input, at))
        assert torch.cat([getattr(s.input, values) for s in slices]).equal(getattr(batch.input, values))
    for name, group in batch.targets.items():
        places = torch.cat([s.targets[name][0] + i * size for i, s in enumerate(slices)])
        assert places.equal(group[0])
        for column in (1, 2):
            assert torch.cat([s.targets[name][column] for s in slices]).equal(group[column])
    assert all(s.lengths == batch.lengths + ([spare] if spare else []) for s in slices)


def test_every_slice_has_the_ranges_of_the_line(batch):
    slices = [share(batch, i, 12, pad=0) for i in range(12)]
    assert all(s.targets.keys() == batch.targets.keys() for s in slices)
    assert any(len(group[0]) == 0 for s in slices for group in s.targets.values())


@pytest.mark.parametrize(
    ("change", "world", "message"),
    [
        ({"sequence_parallel": 3}, 6, "sequence_parallel 3 does not divide model.heads 4"),
        ({"sequence_parallel": 4}, 6, "sequence_parallel 4 does not divide 6 ranks"),
        ({"sequence_parallel": 0}, 1, "sequence_parallel must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_shared_is_refused_by_name(change, world, message):
    config = TrainConfig()
    config.data.rows_per_step = 6
    for name, value in change.items():
        setattr(config.deepspeed, name, value)
    with pytest.raises(ConfigError, match=message):
        config.check(world)
