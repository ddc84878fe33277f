"""From episodes to token shards: resumable, refused when data and tokenizers do not belong together; and lint."""

import dataclasses

import pytest
import yaml

from mmseq.data.lint import lint_mix
from mmseq.data.mixture import MixConfig, Mixture, SourceConfig, TaskConfig
from mmseq.data.sources import open_source
from mmseq.data.tokenize import tokenize_mix
from mmseq.data.tokens import TokenShards, write_token_shards
from mmseq.episode import TextSpan
from mmseq.errors import ConfigError, DataError, FingerprintError
from mmseq.reading import Reading
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

    def note(task):
        (root / "long.yaml").write_text(yaml.safe_dump({**settings, "tasks": [{"task": task}]}))
        (found,) = [n for n in lint_mix(root / "long.yaml", root / "tokens", bundle).notes if "of the steps" in n]
        return found

    ahead = note("image, action[8] -> image@+7")
    assert "begins at 30% of the steps of robot: the last ones (70%) are too near the end" in ahead  # 3 of 10
    assert "the first ones" not in ahead
    for arrow in ("image, image@-4 -> action[4]", "image, proprio[5] -> action[4]"):
        behind = note(arrow)
        assert "begins at 60% of the steps of robot: the first ones (40%) have too little before them" in behind
        assert "the last ones" not in behind
    both = note("image, proprio[3] -> image@+4")
    assert "begins at 40% of the steps of robot: the first ones (20%)" in both
    assert ", and the last ones (40%)" in both


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


def test_the_texts_of_a_moment_are_those_of_its_step(place, tmp_path):
    """An episode may hold several tasks: samples begin in the piece that their text belongs to, and say it."""
    _, bundle = place
    episode = tiny.episode(0, 20)
    episode.spans = [
        TextSpan("text", 0, 8, ("open the window", "open it")),
        TextSpan("text", 8, 20, ("press the button",)),
        TextSpan("plan", 4, 8, ("reach",)),
    ]
    write_token_shards([episode, tiny.episode(1, 20)], tmp_path / "made/robot", bundle, name="robot")
    shards = TokenShards(tmp_path / "made/robot", bundle)
    assert [(int(a), int(b)) for a, b in zip(shards.plan.starts, shards.plan.stops)][:3] == [(0, 4), (4, 8), (8, 20)]
    assert shards.plan.pieces_of([0, 1]).tolist() == [0, 1, 2, 3]
    stored, made = shards[0], EpisodeTokens(episode, bundle)
    for step, variant, text in ((0, 0, "open the window"), (7, 1, "open it"), (8, 1, "press the button")):
        codes = stored.codes("text", step, step + 1, variant)
        assert bundle.text.decode(codes) == text
        assert (codes == made.codes("text", step, step + 1, variant)).all()
    task = TaskConfig(task="text, image -> action[2]", name="policy")
    mix = MixConfig(sources={"robot": SourceConfig(path="robot")}, tasks=[task], holdout=0.0)
    mixture = Mixture(mix, tmp_path / "made", bundle, row_tokens=256, seed=0)
    (moments,) = mixture.moments
    assert len(moments) == 2 * 20
    said = {}
    for k in range(200):
        sample = moments.sample(k, 0)
        sequence = mixture.build(sample)
        assert len(sequence) == sample.length
        span = sequence.segments[0]
        if sample.episode == 0:
            text = bundle.text.decode(bundle.vocabulary.decode("text", sequence.ids[span.start : span.stop]))
            said.setdefault(text, set()).add(sample.now)
    assert set(said) == {"open the window", "open it", "press the button"}
    assert max(said["open the window"] | said["open it"]) == 7
    assert min(said["press the button"]) == 8


def test_offsets_of_a_range_are_drawn_for_each_sample(place, tmp_path):
    _, bundle = place
    write_token_shards([tiny.episode(i, 12) for i in range(3)], tmp_path / "made/robot", bundle, name="robot")
    task = TaskConfig(task="image, image@+2..6, image@-3..-1 -> action[2]", name="inverse")
    mix = MixConfig(sources={"robot": SourceConfig(path="robot")}, tasks=[task], holdout=0.0)
    mixture = Mixture(mix, tmp_path / "made", bundle, row_tokens=256, seed=0)
    (moments,) = mixture.moments
    drawn = [moments.sample(k, 0) for k in range(400)]
    assert {s.offsets[0] for s in drawn if s.now == 4} == {2, 3, 4, 5, 6}
    assert {s.offsets[0] for s in drawn if s.now == 9} == {2}
    assert {s.offsets[1] for s in drawn if s.now == 1} == {-1}
    assert {s.offsets[1] for s in drawn if s.now >= 3} == {-3, -2, -1}
    assert drawn[:50] == [moments.sample(k, 0) for k in range(50)]  # a function of the seed and the place
    assert drawn[:50] != [moments.sample(k, 1) for k in range(50)]
    for sample in drawn[:20]:
        sequence = mixture.build(sample)
        assert len(sequence) == sample.length
        assert [s.step - sample.now for s in sequence.segments[1:3]] == list(sample.offsets)


def test_an_outcome_that_nobody_knows_has_no_progress(place, tmp_path):
    _, bundle = place
    unknown = tiny.episode(0)
    unknown.success = None
    assert not {"progress", "success"} & set(EpisodeTokens(unknown, bundle).streams)
    failed = tiny.episode(1)
    failed.success = False
    assert {"progress", "success"} & set(EpisodeTokens(failed, bundle).streams) == {"success"}
    assert not EpisodeTokens(failed, bundle).codes("success", 0, 24).any()
    tiny.write_episodes(tmp_path / "shards", [unknown, failed, tiny.episode(2)], (tiny.embodiment(),))
    assert [e.success for e in open_source(tmp_path / "shards")] == [None, False, True]
    assert [e.success for e in open_source(tmp_path / "shards", Reading(assume_success=True))] == [True, False, True]
