"""Ranks that share lines of tokens learn what one rank with the whole lines learns."""

import pytest

# row_tokens 255 is odd, so the last slice of two ranks ends in padding; one key/value head goes to both
SAME = ["deepspeed.dtype=fp32", "model.activation_checkpointing=true", "model.kv_heads=1", "data.row_tokens=255"]
SAME += ["data.rows_per_step=2", "steps=4", "validate_every=2", "model.heads=2"]


@pytest.fixture(scope="module")
def alone(trainer, tmp_path_factory):
    held = f"data.mix={trainer.root}/holdout.yaml"
    return trainer.done(tmp_path_factory.mktemp("alone") / "run", 1, *SAME, held)


@pytest.mark.parametrize(("ranks", "stage"), [(2, 1), (2, 3), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_ranks_that_share_lines_learn_the_same(trainer, losses, metrics, alone, tmp_path, ranks, stage):
    """Four ranks are two groups of two, each with rows of its own."""
    settings = tmp_path / "settings.json"
    settings.write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}' if stage == 3 else "{}")
    more = ["deepspeed.sequence_parallel=2", f"deepspeed.zero_stage={stage}", f"deepspeed.settings={settings}"]
    run = trainer.done(tmp_path / "run", ranks, *SAME, *more, f"data.mix={trainer.root}/holdout.yaml")
    assert list(losses(run).values()) == pytest.approx(list(losses(alone).values()), rel=1e-5)
    assert len(losses(run)) == 4
    for kind, rows in (("train", 4), ("validation", 3)):
        expected, found = metrics(alone, kind), metrics(run, kind)
        assert len(found) == len(expected) == rows
        for a, b in zip(expected, found):
            assert b["bits_per_token"] == pytest.approx(a["bits_per_token"], rel=1e-5)
    for a, b in zip(metrics(alone, "validation"), metrics(run, "validation")):
        assert a["teacher_forced"].keys() == b["teacher_forced"].keys()
        for task, measures in a["teacher_forced"].items():
            assert b["teacher_forced"][task] == pytest.approx(measures, rel=0.02)  # a code may tip over


def test_bf16(trainer, losses, alone, tmp_path):
    more = ["deepspeed.dtype=bf16", "deepspeed.sequence_parallel=2", "deepspeed.zero_stage=2", "model.copying=false"]
    more += ["model.heads=4", "model.kv_heads=2"]  # a head for each rank, nothing is copied
    whole = trainer.done(tmp_path / "whole", 1, *[s for s in SAME if "dtype" not in s], *more[:1], *more[2:])
    run = trainer.done(tmp_path / "run", 2, *[s for s in SAME if "dtype" not in s], *more)
    assert list(losses(run).values()) == pytest.approx(list(losses(whole).values()), rel=0.005)
