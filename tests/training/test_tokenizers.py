"""Tokenizers from a recipe: what was left out and what could not be measured is said."""

import json
from pathlib import Path

import pytest

from mmseq import plugins
from mmseq.errors import DataError
from mmseq.testing import tiny
from mmseq.tokenization.recipe import TextRecipe, TokenizerConfig, TokenizerSource, VisionRecipe
from mmseq.training.tokenizers import train_tokenizers

VISION = VisionRecipe(size=16, patch=4, levels=(4, 4), width=16, hidden=16, steps=2)


def recipe(path, **changes):
    settings = {"out": str(path / "out"), "vision": VISION, "text": TextRecipe(vocab_size=280), **changes}
    return TokenizerConfig(**settings)


def test_the_report_says_why_nothing_of_a_source_was_measured(tmp_path):
    tiny.write_episodes(tmp_path / "robot", [tiny.episode(i, length=6) for i in range(4)], (tiny.embodiment(),))
    sources = {"robot": TokenizerSource(path=str(tmp_path / "robot"))}
    report = train_tokenizers(recipe(tmp_path, sources=sources, holdout=0.02))
    assert report["episodes"] == {"robot": 0}
    said = report["unmeasured"]["robot"]
    assert said.startswith("none of its 4 episodes is held out: their ids decide, and holdout=0.02 is too little")
    assert json.loads((tmp_path / "out/report.json").read_text()) == report
    least = float(said.split("from holdout=")[1].split()[0])
    report = train_tokenizers(recipe(tmp_path, sources=sources, holdout=least))  # as it says
    assert report["episodes"]["robot"] >= 1
    assert "unmeasured" not in report


def test_bad_episodes_of_raw_data_are_left_out_within_a_budget(tmp_path, monkeypatch):
    class Dots:
        def __init__(self, path, rate_hz=None, embodiment=None, map=None):
            self.limits = json.loads(Path(path).read_text())

        detects = staticmethod(lambda path: path.suffix == ".dots")
        embodiment = staticmethod(tiny.embodiment)

        def __len__(self):
            return len(self.limits)

        def frames(self, index, camera):
            return iter(tiny.episode(index)[f"image.{camera}"])

        def __getitem__(self, index):
            episode = tiny.episode(index)
            episode.streams["action"].values = episode["action"] * self.limits[index]
            return episode

    monkeypatch.setitem(plugins._registered["readers"], "dots", Dots)
    (tmp_path / "a.dots").write_text("[0.5, 9e9, 0.5, 0.5]")
    source = {"path": str(tmp_path / "a.dots")}
    with pytest.raises(
        DataError, match=r"1 of 4 episodes of source 'dots' are bad: .*tiny-1.*skip_bad: 1 in the source"
    ):
        train_tokenizers(recipe(tmp_path, sources={"dots": TokenizerSource(**source)}))
    said = []
    report = train_tokenizers(
        recipe(tmp_path, sources={"dots": TokenizerSource(**source, skip_bad=1)}), say=said.append
    )
    assert "tiny-1" in said[0]
    assert sum(report["episodes"].values()) <= 3
