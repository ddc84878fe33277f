"""Plug-ins: parts that a person adds without editing mmseq, found by their entry points.

    [project.entry-points."mmseq.readers"]
    myformat = "my_package.reader:MyReader"

Groups are those of `GROUPS`; `docs/extending.md` has an example of each. What is built in is found the same way, and a
plug-in's name must be another. `register` does for one process what an entry point does for all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from mmseq.errors import ConfigError, DependencyError, MMSeqError, did_you_mean

GROUPS: dict[str, dict[str, str]] = {  # what is built in, by name
    "tokenizers": {
        "text": "mmseq.tokenization.text:TextTokenizer",
        "fsq": "mmseq.tokenization.vision:VisionTokenizer",
        "bins": "mmseq.tokenization.continuous:BinTokenizer",
        "scalar": "mmseq.tokenization.continuous:ScalarTokenizer",
    },
    "readers": {
        "lerobot": "mmseq.data.lerobot:LeRobotReader",
        "hdf5": "mmseq.data.hdf5:Hdf5Reader",
        "video": "mmseq.data.video_folder:VideoFolderReader",
    },
    "encoders": {},
    "loggers": {
        "tensorboard": "mmseq.training.logging:TensorBoard",
        "wandb": "mmseq.training.logging:Wandb",
        "trackio": "mmseq.training.logging:Trackio",
    },
    "policies": {"model": "mmseq.serving.model_policy:ModelPolicy"},
    "simulators": {"metaworld": "mmseq.simulation.metaworld:MetaWorldEnv"},
    "methods": {
        "model": "mmseq.evaluation.lfv.methods:RobotOnly",
        "labelled": "mmseq.evaluation.lfv.methods:Labelled",
        "labelled_state": "mmseq.evaluation.lfv.methods:LabelledState",
        "model_state": "mmseq.evaluation.lfv.methods:ModelState",
        "tracked": "mmseq.evaluation.lfv.methods:Tracked",
        "true_labels": "mmseq.evaluation.lfv.methods:TrueLabels",
        "cloning": "mmseq.evaluation.lfv.cloning:BehaviourCloning",
    },
    "augmentations": {"shift": "mmseq.tokenization.augmentation:shift"},
}
_registered: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}


def register(group: str, name: str, part: Any) -> None:
    """Add a part for this process. Raises: ConfigError when the name is taken by another part."""
    if name in _targets(group) or _registered[group].get(name, part) is not part:
        raise ConfigError(f"{group}: {name!r} is there already", fix="give the plug-in another name")
    _registered[group][name] = part


def names(group: str) -> list[str]:
    """The names of everything in a group, built in or installed."""
    return sorted({*_targets(group), *_registered[group]})


def find(group: str, name: str) -> Any:
    """The part of a name, imported.

    Raises: ConfigError naming what there is, DependencyError when it cannot be imported.
    """
    if name in _registered[group]:
        return _registered[group][name]
    if name not in _targets(group):
        raise ConfigError(
            f"there is no {name!r} among the {group}: {did_you_mean(name, names(group))}",
            fix="or install the package that brings it",
        )
    return _load(group, name)


@cache
def _targets(group: str) -> dict[str, str]:
    found = dict(GROUPS[group])
    for point in entry_points(group=f"mmseq.{group}"):
        if found.setdefault(point.name, point.value) != point.value:
            raise ConfigError(
                f"{point.value} wants to be {point.name!r} among the {group}, which {found[point.name]} is already",
                fix="uninstall one of the two packages",
            )
    return found


@cache
def _load(group: str, name: str) -> Any:
    point = EntryPoint(name, _targets(group)[name], f"mmseq.{group}")
    try:
        return point.load()
    except (Exception, SystemExit) as error:  # whatever its code does when it is imported
        raise DependencyError(f"the plug-in {name!r} of {group} ({point.value}) cannot be imported: {error}") from error


@dataclass(frozen=True)
class Installed:
    """An entry point of a package: distribution, its name and version; problem, why it is of no use, None if it is."""

    group: str
    name: str
    target: str
    distribution: str
    problem: str | None


def installed() -> list[Installed]:
    """Every entry point of a group of ours, or one that looks like it, each imported to see whether it can be."""
    found = []
    for point in (p for p in entry_points() if p.group.startswith("mmseq.")):
        group = point.group.removeprefix("mmseq.")
        problem = None
        try:
            if group not in GROUPS:
                raise ConfigError(f"there is no group {point.group}: {did_you_mean(group, GROUPS)}")
            if GROUPS[group].get(point.name, point.value) != point.value:
                raise ConfigError(f"{point.name!r} is built in", fix="give the plug-in another name")
            point.load()
        except (Exception, SystemExit) as error:
            problem = f"{type(error).__name__}: {error}" if not isinstance(error, MMSeqError) else str(error)
        brought = f"{point.dist.name} {point.dist.version}" if point.dist is not None else "no distribution"
        found.append(Installed(group, point.name, point.value, brought, problem))
    return sorted(found, key=lambda one: (one.group, one.name, one.target))
