"""From episodes to token shards: resumable, refused when data and tokenizers do not belong together; and lint."""

import dataclasses

import pytest
import yaml

from mmseq.data.lint import lint_mix
from mmseq.data.sources import open_source
from mmseq.data.tokenize import tokenize_mix
from mmseq.data.tokens import TokenShards
from mmseq.errors import ConfigError, DataError, FingerprintError
from mmseq.testing import tiny
from mmseq.tokenization.bundle import EpisodeTokens

MIX = """
sources: {robot: {path: robot}, film: {path: film}}
tasks: [{task: "text, image, proprio -> action[4]"}, {task: "video[2] -> text", weight: 2}]
holdout: 0.3
"""


@pytest.fixture
def place(tmp_path):
    """Two sources of episode shards, a mix of them, tokenizers."""
    tiny.write_episodes(tmp_path / "robot", [tiny.episode(i, length=10) for i in range(6)], (tiny.embodiment(),))
    tiny.write_episodes(tmp_path / "film", [tiny.video(i, length=10) for i in range(5)])
    (tmp_path / "mix.yaml").write_text(MIX)
    bundle = tiny.tokenizers()
    bundle.save(tmp_path / "tokenizers")
    return tmp_path, bundle


def test_tokens_are_those_of_the_episodes(place):
    root, bundle = place
    calls = []
    done = tokenize_mix(root / "mix.yaml", root / "tokens", root / "tokenizers", on_progress=lambda *a: calls.append(a))
    assert done == {"robot": "written", "film": "written"}
    assert calls[0] == ("robot", 1, 6)
    assert calls[-1] == ("film", 5, 5)
    shards = TokenShards(root / "tokens" / "robot", bundle)
    episode = EpisodeTokens(open_source(root / "robot")[3], bundle)
    stored = shards[3]
    assert list(stored.streams) == episode.streams
    assert (stored.codes("image.front", 2, 5) == episode.codes("image.front", 2, 5)).all()
    assert (stored.codes("action", 0, 10) == episode.codes("action", 0, 10)).all()
    assert (stored.codes("text", 3, 4, 1) == episode.codes("text", 3, 4, 1)).all()
    assert stored.codes("progress", 9, 10) == episode.codes("progress", 9, 10)


def test_what_is_complete_is_kept_and_the_rest_is_written(place):
    root, bundle = place
    run = lambda **options: tokenize_mix(root / "mix.yaml", root / "tokens", bundle, **options)
    run()
    before = (root / "tokens" / "robot" / "manifest.json").stat().st_mtime_ns
    (root / "tokens" / "film" / "manifest.json").unlink()  # as if it had been interrupted
    with pytest.raises(DataError, match="not complete"):
        run()
    (root / "tokens" / "film").rename(root / "elsewhere")
    assert run() == {"robot": "kept", "film": "written"}
    assert (root / "tokens" / "robot" / "manifest.json").stat().st_mtime_ns == before


def test_other_tokenizers_or_other_data_need_overwrite(place):
    root, bundle = place
    run = lambda bundle, **options: tokenize_mix(root / "mix.yaml", root / "tokens", bundle, **options)
    run(bundle)
    other = tiny.tokenizers(seed=3)
    with pytest.raises(DataError, match="other tokenizers"):
        run(other)
    assert run(other, overwrite=True) == {"robot": "written", "film": "written"}
    (root / "film").rename(root / "old")
    tiny.write_episodes(root / "film", [tiny.video(9)])
    with pytest.raises(DataError, match="other data"):
        run(other)
    assert run(other, overwrite=True) == {"robot": "kept", "film": "written"}


def test_a_robot_with_another_contract_is_refused(place):
    root, _ = place
    other = tiny.tokenizers((dataclasses.replace(tiny.embodiment(), action=tiny.axes("xyzg", 2.0)),))
    with pytest.raises(FingerprintError, match=r"action\.high"):
        tokenize_mix(root / "mix.yaml", root / "tokens", other)


def test_all_missing_sources_are_named(place):
    root, bundle = place
    (root / "mix.yaml").write_text(MIX.replace("path: robot", "path: robt").replace("path: film", "path: flim"))
    with pytest.raises(DataError, match=r"robt.*flim"):
        tokenize_mix(root / "mix.yaml", root / "tokens", bundle)


def test_shards_cannot_change_their_rate(place):
    with pytest.raises(DataError, match="at 20 Hz, asked for 5"):
        open_source(place[0] / "robot", rate_hz=5)


def test_lint_finds_nothing_wrong_with_a_good_mix(place):
    root, bundle = place
    tokenize_mix(root / "mix.yaml", root / "tokens", bundle)
    lint = lint_mix(root / "mix.yaml", root / "tokens", root / "tokenizers", row_tokens=256)
    assert lint.problems == []
    assert sum(row["samples"] for row in lint.shares) == pytest.approx(1)


def test_lint_says_which_steps_a_task_never_sees(place):
    root, bundle = place
    tokenize_mix(root / "mix.yaml", root / "tokens", bundle)
    settings = yaml.safe_load((root / "mix.yaml").read_text())
    (root / "long.yaml").write_text(yaml.safe_dump({**settings, "tasks": [{"task": "image, action[8] -> image@+7"}]}))
    (note,) = [n for n in lint_mix(root / "long.yaml", root / "tokens", bundle).notes if "of the steps" in n]
    assert "begins at 30% of the steps of robot" in note  # 3 of 10


def test_lint_says_everything_at_once(place):
    root, bundle = place
    tokenize_mix(root / "mix.yaml", root / "tokens", bundle)
    tokenize_mix(root / "mix.yaml", root / "other", tiny.tokenizers(seed=3))
    (root / "tokens" / "film").rename(root / "old")
    (root / "other" / "film").rename(root / "tokens" / "film")
    (root / "bad.yaml").write_text(
        """
sources: {robot: {path: robt}, film: {path: film}, lost: {path: lost}}
tasks:
- {task: "image -> acton[2]"}
- {task: "image -> action[200]", sources: [robot]}
- {task: "text, image, proprio -> action[4]", sources: [robot, film2], weight: -1}
- {task: "video[8] -> text", sources: [robot]}
holdout: 0.3
"""
    )
    problems = "\n".join(lint_mix(root / "bad.yaml", root / "tokens", bundle, row_tokens=30).problems)
    for said in (
        "robt does not exist",
        "lost does not exist",
        "no token shards",
        "other tokenizers",
        "unknown stream 'acton'",
        "unknown source 'film2': did you mean 'film'",
        "negative",
        "no episode can fill the task 'image -> action[200]'",
        "a row holds 30",
    ):
        assert said in problems, (said, problems)


def test_lint_finds_empty_splits(place):
    root, bundle = place
    for holdout, says in (("0.0001", "held-out split is empty"), ("0.9999", "all 6 episodes are held out")):
        (root / "mix.yaml").write_text(MIX.replace("0.3", holdout))
        tokenize_mix(root / "mix.yaml", root / "tokens", bundle)
        assert any(says in p for p in lint_mix(root / "mix.yaml", root / "tokens", bundle).problems)


def test_lint_reads_only_what_is_a_mix(place):
    root, bundle = place
    (root / "mix.yaml").write_text("tasks: 3")
    with pytest.raises(ConfigError):
        lint_mix(root / "mix.yaml", root / "tokens", bundle)
