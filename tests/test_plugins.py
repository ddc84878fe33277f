"""Parts of other people's: one that is broken stops nothing but itself."""

from importlib.metadata import EntryPoint

import pytest

from mmseq import plugins
from mmseq.data.importing import detect_format
from mmseq.errors import DependencyError


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
