"""The text of a field is the comment beside it, and an option of the command is made of it."""

from dataclasses import MISSING, dataclass, field

import pytest

from mmseq.cli.parser import Parser, Usage, filled
from mmseq.fields import default_of, field_texts


@dataclass(kw_only=True)
class Part:
    """Its docstring says # nothing of fields."""

    size: int = 64  # pixels # of a side
    name: str = "a # b"
    # a longer text,
    # in two lines
    rate_hz: float | None = None

    # not of a field: a line is between

    given: str = "???"  # has to be given
    tags: list[str] = field(default_factory=lambda: ["x"])  # how it is marked


@dataclass(kw_only=True)
class Whole(Part):
    """Inherits."""

    size: int = 32  # of another meaning
    share: float = 0.5  # 100% at most
    fast: bool = False  # sooner
    more: int = 0


def test_comments_belong_to_their_fields():
    texts = field_texts(Whole)
    assert texts == {
        "size": "of another meaning",
        "name": "",
        "rate_hz": "a longer text, in two lines",
        "given": "has to be given",
        "tags": "how it is marked",
        "share": "100% at most",
        "fast": "sooner",
        "more": "",
    }
    assert field_texts(Part)["size"] == "pixels # of a side"


def test_defaults():
    assert default_of(Whole, "size") == 32
    assert default_of(Whole, "tags") == ["x"]
    assert default_of(Whole, "given") is MISSING


def command():
    parser = Parser(prog="mmseq it")
    parser.fields(Whole, given="FILE", size=None, rate_hz=None, tags="A,B", share=None, fast=None, more="N")
    return parser


def test_options_have_the_type_default_and_text_of_their_field(capsys):
    with pytest.raises(SystemExit):
        command().parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--size SIZE of another meaning (default: 32)" in text
    assert "--share SHARE 100% at most (default: 0.5)" in text
    assert "--rate-hz RATE_HZ a longer text, in two lines" in text
    assert "--more N (default: 0)" in text
    assert "--fast sooner --" in text
    line = ["--given", "x", "--size", "3", "--rate-hz", "2", "--tags", "a, b,", "--fast"]
    assert filled(Whole, command().parse_args(line), more=7) == Whole(
        given="x", size=3, rate_hz=2.0, tags=["a", "b"], fast=True, more=7
    )
    assert filled(Whole, command().parse_args(["--given", "x"])) == Whole(given="x")
    with pytest.raises(Usage, match="required: --given"):
        command().parse_args([])
    with pytest.raises(Usage, match="invalid int value"):
        command().parse_args(["--given", "x", "--size", "big"])
