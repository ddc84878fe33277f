"""Ranks that share a line of tokens compute what one rank with the whole line computes."""

import pytest
import torch

from mmseq.data.mixture import Mixture, load_mix
from mmseq.errors import ConfigError
from mmseq.model.sequence_parallel import share
from mmseq.packing import collate
from mmseq.testing import tiny, tiny_run
from mmseq.training.config import TrainConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_run.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def batch(data):
    bundle = tiny.tokenizers()
    mixture = Mixture(load_mix(data / "mix.yaml"), data / "tokens", bundle, row_tokens=256, seed=0)
    sequences = [mixture.build(stream.moment(0)) for stream in mixture.streams]
    made = collate(sequences, bundle.vocabulary, tasks=list(range(len(sequences))))
    assert len(made.patch_at) and len(made.copy_at) and len(made.targets) > 2  # noqa: PT018
    return made


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_slices_hold_the_line(batch, parts):
    """Side by side the slices are the line: no token, merged frame, copy or target is lost, moved or doubled."""
    slices = [share(batch, i, parts, pad=5) for i in range(parts)]
    size = len(slices[0].ids)
    assert all(len(s.ids) == size and s.parts == parts for s in slices)
    spare = size * parts - len(batch.ids)
    assert 0 <= spare < parts
    for name, filler in (("ids", [5] * spare), ("slots", [0] * spare), ("positions", list(range(spare)))):
        whole = torch.cat([getattr(s, name) for s in slices]).tolist()
        assert whole == getattr(batch, name).tolist() + filler
    for at, values in (("patch_at", "patch_ids"), ("copy_at", "copy_ids")):
        places = torch.cat([getattr(s, at) + i * size for i, s in enumerate(slices)])
        assert places.equal(getattr(batch, at))
        assert torch.cat([getattr(s, values) for s in slices]).equal(getattr(batch, values))
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


# row_tokens 255 is odd, so the last slice of two ranks ends in padding
SAME = ["model.activation_checkpointing=true", "model.kv_heads=1", "data.row_tokens=255", "data.rows_per_step=2"]


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run"
    tiny_run.train(data, out, 1, *SAME, "validate_every=2", f"data.mix={data}/holdout.yaml")
    assert len(tiny_run.losses(out)) == 4
    return out


@pytest.mark.parametrize(
    ("ranks", "stage"), [(2, 1), pytest.param(2, 3, marks=pytest.mark.slow), pytest.param(4, 2, marks=pytest.mark.slow)]
)
def test_ranks_that_share_lines_learn_the_same(data, alone, tmp_path, ranks, stage):
    """Four ranks are two groups of two, each with rows of its own. One key/value head is copied to both ranks."""
    settings = tmp_path / "settings.json"
    settings.write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}' if stage == 3 else "{}")
    more = ["deepspeed.sequence_parallel=2", f"deepspeed.zero_stage={stage}", f"deepspeed.settings={settings}"]
    more += ["validate_every=2", f"data.mix={data}/holdout.yaml"]
    tiny_run.train(data, tmp_path / "run", ranks, *SAME, *more)
    for kind in ("train", "validation"):
        expected, found = tiny_run.metrics(alone, kind), tiny_run.metrics(tmp_path / "run", kind)
        assert len(found) == len(expected)
        for a, b in zip(expected, found):
            assert b["bits_per_token"] == pytest.approx(a["bits_per_token"], rel=1e-5)
    assert tiny_run.losses(tmp_path / "run") == pytest.approx(tiny_run.losses(alone), rel=1e-5)


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
