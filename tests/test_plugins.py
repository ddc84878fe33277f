"""Parts of other people's: one that is broken stops nothing but itself."""

from importlib.metadata import EntryPoint

import pytest

from mmseq import doctor, plugins
from mmseq.data.importing import detect_format
from mmseq.errors import ConfigError, DependencyError


@pytest.fixture
def broken(tmp_path, monkeypatch, request):
    (tmp_path / "broken_reader.py").write_text(request.param)
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("broken", "broken_reader:Reader", "mmseq.readers")
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point] if group == "mmseq.readers" else [])
    plugins._targets.cache_clear()
    yield
    monkeypatch.undo()
    plugins._targets.cache_clear()
    plugins._load.cache_clear()


@pytest.mark.parametrize(
    "broken", ["import of_nobody", "raise RuntimeError('bad')", "(", "import sys; sys.exit(3)"], indirect=True
)
def test_a_reader_that_cannot_be_imported_stops_no_other(broken, tmp_path, caplog):
    (tmp_path / "film.mp4").write_bytes(b"")
    assert detect_format(tmp_path / "film.mp4") == "video"
    assert "the plug-in 'broken' of readers (broken_reader:Reader) cannot be imported" in caplog.text
    with pytest.raises(DependencyError, match="cannot be imported"):
        plugins.find("readers", "broken")


@pytest.mark.parametrize("broken", ["raise RuntimeError('bad')"], indirect=True)
def test_a_name_that_nothing_has_comes_with_the_nearest(broken):
    with pytest.raises(ConfigError, match=r"among the readers: did you mean 'lerobot'\? Or install the package"):
        plugins.find("readers", "lerobt")


def test_what_is_installed_is_listed_with_its_fault(tmp_path, monkeypatch):
    (tmp_path / "parts_of_mine.py").write_text("class Reader: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    points = [
        EntryPoint("mine", "parts_of_mine:Reader", "mmseq.readers"),
        EntryPoint("gone", "parts_of_mine:Writer", "mmseq.readers"),
        EntryPoint("hdf5", "parts_of_mine:Reader", "mmseq.readers"),
        EntryPoint("mine", "parts_of_mine:Reader", "mmseq.reader"),
        EntryPoint("other", "parts_of_mine:Reader", "somebody.else"),
    ]
    monkeypatch.setattr(plugins, "entry_points", lambda: points)
    found = {(one.group, one.name): one.problem for one in plugins.installed()}
    assert set(found) == {("readers", "mine"), ("readers", "gone"), ("readers", "hdf5"), ("reader", "mine")}
    assert found["readers", "mine"] is None
    assert "Writer" in found["readers", "gone"]
    assert "is built in. Give the plug-in another name" in found["readers", "hdf5"]
    assert "no group mmseq.reader: did you mean 'readers'?" in found["reader", "mine"]
    lines = {(finding.topic, finding.state): finding.text for finding in doctor._plugins()}
    assert lines["plug-in readers", "ok"] == "mine of no distribution (parts_of_mine:Reader)"
    monkeypatch.setattr(plugins, "entry_points", list)
    assert [finding.text for finding in doctor._plugins()] == ["none installed; docs/extending.md"]
