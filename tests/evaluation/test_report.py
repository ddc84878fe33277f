"""The report: one file that needs no other, with every result and no empty section."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from mmseq.errors import DataError
from mmseq.evaluation.pictures import difference, moving_picture, webp, write_picture
from mmseq.evaluation.report import read_metrics, write_report
from mmseq.testing import tiny

VOID = {"meta", "img", "br", "rect", "path"}


class Outline(HTMLParser):
    """Checks that tags close in order; gathers headings and addresses."""

    def __init__(self):
        super().__init__()
        self.open, self.headings, self.addresses = [], [], []

    def handle_starttag(self, tag, attrs):
        self.addresses += [v for k, v in attrs if k in ("src", "href", "data", "action", "poster", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def outline(path) -> Outline:
    parser = Outline()
    parser.feed(path.read_text())
    assert parser.open == []
    return parser


@pytest.fixture
def metrics(tmp_path):
    rows = [
        {"kind": "train", "step": s, "bits_per_token": {"policy": 5 / s, "caption": 7 / s}, "tokens_per_s": 100.0}
        for s in (10, 20, 20, 30)
    ]
    rows.append({"kind": "validation", "step": 30, "bits_per_token": {"policy": 0.5}})
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def test_a_full_report_is_one_file_with_every_result(evaluated, metrics, tmp_path):
    results, media, *_ = evaluated
    frames = tiny.episode(0, 6)["image.front"]
    rollouts = [
        {"task": t, "success": s, "video": v}
        for t in ("door <1>", "drawer")
        for s, v in ((True, frames), (False, None))
    ]
    rollouts += [{"task": "drawer", "success": False, "policy": "image blanked"}]
    share = {"task": "policy", "source": "robot", "samples": 0.5, "tokens": 0.6, "tokens_per_sample": 61.5}
    path = tmp_path / "report.html"
    write_report(
        path,
        title="A <tiny> model",
        results=list(results.values()),
        media=media,
        training=metrics,
        accounting=[share | {"moments": 100, "episodes": 7}],
        rollouts=rollouts,
        timings={"train": 61.0, "evaluate": 3.0},
        config="width: 32",
        command="mmseq demo",
        facts={"parameters": "0.1 M"},
    )
    page = outline(path)
    assert page.headings == [
        "One model, many tasks",
        "Results at a glance",
        "The robot in closed loop",
        "Imagined pictures and video",
        "Commands",
        "What it says",
        "Progress over an episode",
        "Pictures and commands as tokens",
        "Learning curves",
        "Data",
        "Where the time went",
        "How to repeat this",
    ]
    text = path.read_text()
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert not re.search(r"https?://|@import|url\((?!data:)|<script|<link", text)
    assert [name for name in results if name not in text] == []
    assert "A &lt;tiny&gt; model" in text
    assert "<tiny>" not in text
    assert "door &lt;1&gt;" in text
    assert "1 min 01 s" in text
    assert "2 of 4" in text
    assert len(text) < 15_000_000


def test_absent_parts_leave_no_section(evaluated, tmp_path):
    results, media, *_ = evaluated
    path = tmp_path / "report.html"
    write_report(path, title="Nothing yet")
    assert outline(path).headings == []
    write_report(path, title="Numbers only", results=list(results.values())[:3])
    assert outline(path).headings == ["Results at a glance", "How to repeat this"]
    write_report(path, title="No rollouts", media={"texts": media["texts"], "frames": {}})
    assert outline(path).headings == ["What it says"]


def test_rollouts_have_wilson_intervals_and_a_limit(tmp_path):
    frames = tiny.episode(0, 4)["image.front"]
    rollouts = [{"task": "door", "success": i < 8, "frames": frames} for i in range(10)]
    path = tmp_path / "report.html"
    write_report(path, title="Rollouts", rollouts=rollouts)
    text = path.read_text()
    assert "8 of 10" in text
    assert "49 to 94 %" in text
    assert text.count("data:image/webp") == 3
    assert "7 more were recorded" in text


def test_videos_of_other_formats_are_refused():
    assert moving_picture(b"\0\0\0\x18ftypisom", 20)[1] == "video/mp4"
    assert moving_picture(webp(np.zeros((2, 8, 8, 3), np.uint8), 20), 20)[1] == "image/webp"
    with pytest.raises(DataError, match="neither MP4"):
        moving_picture(b"RIFFxxxxAVI ", 20)


def test_metrics_are_read_by_kind_and_task(metrics, tmp_path):
    curves = read_metrics(metrics)
    assert curves["train"]["policy"] == [(10, 0.5), (20, 0.25), (30, 5 / 30)]
    assert curves["validation"] == {"policy": [(30, 0.5)]}
    (tmp_path / "broken.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"broken\.jsonl"):
        read_metrics(tmp_path / "broken.jsonl")


def test_the_difference_is_dark_where_pictures_agree():
    black, white = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    assert difference(black, black).max() < 40
    assert difference(black, white).min() > 150


def test_the_picture_for_a_readme(evaluated, tmp_path):
    _, media, *_ = evaluated
    path = tmp_path / "picture.png"
    frames = tiny.episode(0, 30)["image.front"]
    write_picture(path, media, [{"task": "door", "success": True, "frames": frames}])
    image = Image.open(path)
    assert image.width == 1200
    assert path.stat().st_size <= 300_000
    with_less = tmp_path / "less.png"
    write_picture(with_less, {"curves": media["curves"]})
    assert Image.open(with_less).height < image.height
    with pytest.raises(DataError, match="nothing to show"):
        write_picture(path, {})
