"""Configuration: defaults, then the file, then the command line; nothing is ignored."""

from dataclasses import dataclass, field, fields

import pytest

from mmseq.config import load_config, to_yaml
from mmseq.errors import ConfigError
from mmseq.tokenization.recipe import TokenizerConfig, VisionRecipe
from mmseq.tokenization.vision import VisionConfig
from mmseq.training.config import TrainConfig


@dataclass(kw_only=True)
class Inner:
    size: int = 3
    rate_hz: float | None = None


@dataclass(kw_only=True)
class Outer:
    name: str = "???"
    inner: Inner = field(default_factory=Inner)
    table: dict[str, Inner] = field(default_factory=dict)
    items: list[Inner] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


def write(path, text):
    path.write_text(text)
    return path


def test_the_command_line_wins_over_the_file_over_the_defaults(tmp_path):
    path = write(tmp_path / "a.yaml", "name: file\ninner: {size: 5}\ntable: {x: {size: 7}}\nitems: [{rate_hz: 2}]")
    found = load_config(Outer, path, ["name=line", "inner.rate_hz=0.5", "table.x.rate_hz=1"])
    assert found == Outer(
        name="line",
        inner=Inner(size=5, rate_hz=0.5),
        table={"x": Inner(size=7, rate_hz=1.0)},
        items=[Inner(rate_hz=2.0)],
    )
    assert load_config(Outer, write(tmp_path / "b.yaml", to_yaml(found))) == found
    assert load_config(Outer, None, ["name=line", "names=[a, b]"]).names == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "overrides", "says"),
    [
        ("nme: a", [], "unknown key 'nme': did you mean 'name'"),
        ("name: a\ninner: {sise: 5}", [], "unknown key 'inner.sise': did you mean 'size'"),
        ("name: a\ntable: {x: {sise: 5}}", [], "unknown key 'table.x.sise'"),
        ("name: a\nitems: [{}, {sise: 5}]", [], r"unknown key 'items\[1\].sise'"),
        ("name: a", ["inner.sise=5"], "the command line: unknown key 'inner.sise': did you mean 'size'"),
        ("name: a", ["--inner.size=5"], "Write key=value"),
        ("name: a", ["size"], "Write key=value"),
        ("name: a\ninner: {size: wide}", [], "size"),
        ("name: a", ["inner.size=wide"], "size"),
        ("inner: {size: 2}", [], "name"),
        ("- 3", [], "must hold keys and values"),
        ("a: [", [], "not valid YAML"),
        ("name: a\ninner: 4", [], "inner must hold keys and values"),
        ("name: a\nitems: 4", [], "items must hold a list"),
        ("name: a", ["names=door-open"], r"names must hold a list, it holds 'door-open'. Write names=\[door-open\]"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, overrides, says):
    with pytest.raises(ConfigError, match=says):
        load_config(Outer, write(tmp_path / "a.yaml", text), overrides)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(Outer, tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("overrides", "world", "says"),
    [
        (["steps=0"], 1, "steps must be at least 1"),
        (["data.rows_per_step=6"], 4, "Use a multiple of 4"),
        (["data.rows_per_step=8", "data.rows_per_pass=3"], 1, "Use a divisor"),
        (["deepspeed.zero_stage=4"], 1, "0, 1, 2 or 3"),
        (["deepspeed.dtype=fp8"], 1, "bf16 or fp32"),
        (["optimizer.learning_rate=-1"], 1, "must be positive"),
    ],
)
def test_training_settings_that_cannot_work_are_refused(overrides, world, says):
    base = ["out=x", "data.mix=m", "data.tokens=t", "data.tokenizers=k"]
    with pytest.raises(ConfigError, match=says.replace("(", r"\(")):
        load_config(TrainConfig, None, base + overrides).check(world)


def test_the_learning_rate_is_a_function_of_the_step():
    config = load_config(TrainConfig, None, ["out=x", "data.mix=m", "data.tokens=t", "data.tokenizers=k"])
    shares = [config.rate_share(step, 1000) for step in range(1000)]
    assert max(shares) == pytest.approx(1)
    assert shares[0] < shares[10] < shares[49]
    assert shares[-1] == pytest.approx(config.optimizer.final_share, rel=1e-2)


def test_a_tokenizer_recipe_has_every_field_of_the_vision_tokenizer():
    assert {f.name for f in fields(VisionConfig)} <= {f.name for f in fields(VisionRecipe)}
    assert VisionRecipe().config() == VisionConfig()
    with pytest.raises(ConfigError, match="no sources"):
        load_config(TokenizerConfig, None, ["out=x"]).check()
    with pytest.raises(ConfigError, match="does not divide"):
        load_config(TokenizerConfig, None, ["out=x", "sources.a.path=b", "merge=3"]).check()
