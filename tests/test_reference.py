"""The pages that are written from the code: up to date, and nothing in them without a text."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("docs_tool", ROOT / "tools/docs.py")
assert SPEC is not None
assert SPEC.loader is not None
docs = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(docs)


@pytest.mark.parametrize("page", [docs.REFERENCE, docs.ARCHITECTURE], ids=lambda page: page.name)
def test_a_page_is_up_to_date(page):
    written = docs.reference() if page == docs.REFERENCE else docs.architecture()
    assert page.read_text() == written, "run `make docs`"


@pytest.mark.parametrize(("section", "schema"), [(section, schema) for section, _, schema in docs.schemas()])
def test_every_setting_says_what_it_is(section, schema):
    assert [key for key, _, _, text in docs.settings(schema) if not text] == []


def test_settings_of_groups_stand_behind_a_dot():
    from mmseq.data.mixture import MixConfig

    keys = [key for key, *_ in docs.settings(MixConfig)]
    assert {"name", "sources", "sources.NAME.path", "tasks", "tasks[].task"} <= set(keys)


def test_every_file_says_what_it_is_for():
    silent = [p for p in (ROOT / "mmseq").rglob("*.py") if p.stat().st_size and not docs.first_sentence(p)]
    assert silent == []


def test_the_first_sentence_of_a_file(tmp_path):
    texts = {
        "a.py": ('"""It\ndoes (Su et al. 2021) this. And that."""\n', "It does (Su et al. 2021) this"),
        "b.py": ('"""How:\n\n    run it\n"""\n', "How"),
        "c.yaml": ("# What it is. More.\na: 1\n", "What it is"),
        "d.css": ("/* Of the page. */\na{}\n", "Of the page"),
        "e.py": ("x = 1\n", ""),
    }
    for name, (text, sentence) in texts.items():
        (tmp_path / name).write_text(text)
        assert docs.first_sentence(tmp_path / name) == sentence
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "empty").mkdir()
    assert [path.name for path in docs.listed(tmp_path)] == sorted(texts)
