"""A run may go on with other ranks, another ZeRO stage, micro-batch or number of workers: the same samples, the
same losses."""

import itertools
import shutil

import pytest

from mmseq.training.checkpoint import StoredTensors, complete_checkpoints

FP32 = "deepspeed.dtype=fp32"
# (ranks, ZeRO stage, rows per pass, worker processes, steps built ahead)
FIRST = (2, 1, 1, 0, 2)
THEN = [
    (1, 1, 1, 0, 2),
    (1, 0, 4, 0, 1),
    (2, 3, 2, 0, 2),
]
FURTHER = [
    (ranks, stage, rows, workers, ahead)
    for (ranks, stage), (rows, workers, ahead) in itertools.product(
        [(1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3)],
        [(1, 0, 1), (2, 1, 2), (2, 0, 4)],
    )
]


def settings(ranks: int, stage: int, rows: int, workers: int, ahead: int) -> list[str]:
    data = [f"data.rows_per_pass={rows}", f"data.workers={workers}", f"data.prefetch={ahead}"]
    return [FP32, f"deepspeed.zero_stage={stage}", "optimizer.average_decay=0.9", *data]


@pytest.fixture(scope="module")
def whole(trainer, tmp_path_factory):
    """Ten uninterrupted steps."""
    return trainer.done(tmp_path_factory.mktemp("whole") / "run", FIRST[0], *settings(*FIRST))


@pytest.fixture(scope="module")
def halves(trainer, tmp_path_factory):
    """Five steps, by each of three topologies."""
    made = {}
    for start in (FIRST, (1, 0, 1, 0, 2), (2, 3, 1, 0, 2)):
        out = tmp_path_factory.mktemp("half") / "run"
        made[start] = trainer.done(out, start[0], *settings(*start), "stop_after=5")
    return made


@pytest.mark.parametrize("then", [*THEN, *(pytest.param(t, marks=pytest.mark.slow) for t in FURTHER)])
def test_another_topology_goes_on_with_the_same_samples_and_losses(
    trainer, metrics, whole, halves, tmp_path, then, request
):
    starts = list(halves)
    start = starts[FURTHER.index(then) % len(starts)] if then in FURTHER else FIRST
    out = tmp_path / "run"
    shutil.copytree(halves[start], out)
    trainer.done(out, then[0], *settings(*then))
    expected, found = metrics(whole), metrics(out)
    assert [r["samples_crc"] for r in found] == [r["samples_crc"] for r in expected]
    assert [r["loss"] for r in found] == pytest.approx([r["loss"] for r in expected], rel=1e-6, abs=1e-6)
    for average in (False, True):
        mine, theirs = (
            dict(StoredTensors(complete_checkpoints(o / "checkpoints")[-1]).weights(averaged=average))
            for o in (out, whole)
        )
        assert mine.keys() == theirs.keys()
        for name, weight in mine.items():
            assert weight.numpy() == pytest.approx(theirs[name].numpy(), abs=2e-5), name
