"""Configuration: dataclass defaults <- YAML <- `key=value`, strict. An unknown key is an error."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mmseq.errors import ConfigError, did_you_mean, raise_all


def load_config[T](schema: type[T], path: str | Path | None, overrides: Sequence[str] = ()) -> T:
    """Read `path`, apply `overrides` such as `model.width=256`, and return the dataclass.

    Raises: ConfigError naming every unknown key, its file and the closest known key.
    """
    base = OmegaConf.structured(schema)
    where = str(path) if path is not None else "the command line"
    parts: list[Any] = [base]
    problems: list[ConfigError] = []
    if path is not None:
        try:
            loaded = OmegaConf.load(path)
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror or error}", fix="check the path") from error
        except Exception as error:
            raise ConfigError(f"{path} is not valid YAML: {error}") from error
        if not isinstance(loaded, DictConfig):
            raise ConfigError(f"{path} must hold keys and values, it holds a {type(loaded).__name__}")
        problems += _key_problems(schema, OmegaConf.to_container(loaded), where)
        parts.append(loaded)
    if overrides:
        for item in overrides:
            if not re.fullmatch(r"[A-Za-z_][\w.]*=.*", item, re.DOTALL):
                raise ConfigError(f"{item!r} is not an override", fix="write key=value, such as model.width=256")
        try:
            given = OmegaConf.from_dotlist(list(overrides))
        except Exception as error:
            raise ConfigError(f"cannot read the overrides {list(overrides)}: {error}") from error
        problems += _key_problems(schema, OmegaConf.to_container(given), "the command line")
        parts.append(given)
    raise_all(problems)
    try:
        merged = OmegaConf.merge(*parts)
        result = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        message = (str(getattr(error, "msg", None) or error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{where}: {key + ': ' if key else ''}{message}") from error
    return result  # type: ignore[return-value]


def _key_problems(schema: Any, data: Any, where: str, prefix: str = "") -> Iterator[ConfigError]:
    """Every key that the schema lacks, and every group that holds no keys."""
    if not is_dataclass(schema) or not isinstance(data, dict):
        return
    hints = get_type_hints(schema)
    known = [f.name for f in fields(schema)]
    for key, value in data.items():
        if key not in known:
            yield ConfigError(f"{where}: unknown key {prefix + str(key)!r}: {did_you_mean(str(key), known)}")
            continue
        inner = hints[key]
        arguments = [a for a in get_args(inner) if is_dataclass(a)]
        group = is_dataclass(inner) or bool(arguments and get_origin(inner) in (dict, list))
        if group and value is not None and not isinstance(value, list if get_origin(inner) is list else dict):
            wanted = "a list" if get_origin(inner) is list else "keys and values"
            yield ConfigError(f"{where}: {prefix}{key} must hold {wanted}, it holds {value!r}")
        elif get_origin(inner) is list and isinstance(value, int | float | str) and "${" not in str(value):
            yield ConfigError(
                f"{where}: {prefix}{key} must hold a list, it holds {value!r}", fix=f"write {key}=[{value}]"
            )
        elif is_dataclass(inner):
            yield from _key_problems(inner, value, where, f"{prefix}{key}.")
        elif arguments and isinstance(value, dict):
            for name, item in value.items():
                yield from _key_problems(arguments[-1], item, where, f"{prefix}{key}.{name}.")
        elif arguments and isinstance(value, list):
            for i, item in enumerate(value):
                yield from _key_problems(arguments[-1], item, where, f"{prefix}{key}[{i}].")


def to_yaml(config: Any) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def changes(path: str | Path, config: Any) -> list[str]:
    """The fields in which a configuration differs from the one that is stored at `path`, as `field old -> new`.

    Nothing where none is stored, or it cannot be read.
    """
    try:
        before = _flat(OmegaConf.to_container(OmegaConf.load(path)))
    except Exception:  # it serves to tell people, nothing depends on it
        return []
    now = _flat(OmegaConf.to_container(OmegaConf.structured(config)))
    return [f"{key} {before.get(key)} -> {value}" for key, value in now.items() if before.get(key) != value]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {
        k: v for key, part in value.items() for k, v in _flat(part, f"{prefix}.{key}" if prefix else str(key)).items()
    }
