"""What the benchmark is made of, without a simulator: tasks, the ladder of video, cells and layouts.

All of it follows from the configuration alone, so that every machine has the same; `fingerprint` says so in the rows,
`training_fingerprint` in the names of what was trained.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mmseq.errors import ConfigError, did_you_mean
from mmseq.evaluation.lockstep import Layout
from mmseq.plugins import names
from mmseq.simulation.shifts import SHIFTS

VERSION = 2  # of the benchmark: a change that moves numbers makes it another
FIRST_LAYOUT = 500_000  # of those that are driven; recording never draws so few of so small numbers
SPREAD, MOST_SPREAD = 1.5, 2.0
MOST_SEEDS = 1000  # so that nobody's video is filmed in the layouts that another seed's robot was taught in
CHUNK = 2  # actions that every method here predicts at once

ROBOT_TASKS = (
    *("button-press-topdown", "button-press", "coffee-button", "door-open", "drawer-open", "window-open"),
    *("faucet-close", "handle-press", "handle-press-side", "dial-turn", "plate-slide", "door-lock"),
)
# Most are the opposites of robot tasks, in the same scenes: whoever reads the task off the scene fails
VIDEO_TASKS = (
    *("window-close", "faucet-open", "drawer-close", "door-unlock", "door-close", "plate-slide-back"),
    *("button-press-topdown-wall", "handle-pull"),
)
MW7_TASKS = (
    *("door-open", "door-close", "button-press", "button-press-topdown", "faucet-open", "faucet-close"),
    "handle-press",
)
# Success of others on these seven, 5 demonstrations, 25 trials each (SpatialVAM's table; the same method differs by up
# to 20 points from paper to paper): cameras of 128 to 320 pixels, Meta-World's 80 Hz, some with depth
MW7_PUBLISHED = {
    "UniPi": 0.114,
    "BC": 0.262,
    "BC-R3M": 0.354,
    "Diffusion Policy": 0.377,
    "AVDC": 0.589,
    "DreamZero-5B": 0.611,
    "Track2Act": 0.674,
    "SpatialVAM": 0.891,
}


@dataclass(frozen=True, kw_only=True)
class Rung:
    """How video of the ladder differs from what the robot sees.

    body, camera, shift: as in `MetaWorldEnv`. speed: a video's is drawn from there. failing: share of videos that end
    before the task is done. miscaptioned: share whose words are of another task.
    """

    body: str = "robot"
    camera: str = "front"
    shift: str = "plain"
    speed: tuple[float, float] = (1.0, 1.0)
    failing: float = 0.0
    miscaptioned: float = 0.0

    @property
    def scene(self) -> dict[str, str]:
        """How it is drawn: arguments of `MetaWorldEnv`."""
        return {"body": self.body, "camera": self.camera, "shift": self.shift}


LADDER = {
    "V0": Rung(),  # the same robot, its actions unknown
    "V1": Rung(camera="human"),  # another view
    "V2": Rung(shift="colours"),  # other colours
    "V3": Rung(body="hand"),  # a hand that floats in place of the gripper
    "V4": Rung(body="human", camera="human"),  # a person's arm
    "V5": Rung(body="human", camera="human", shift="distractors", speed=(0.7, 1.5)),
    "V6": Rung(body="human", camera="human", failing=0.25, miscaptioned=0.25),
    "V4-shuffled": Rung(body="human", camera="human", miscaptioned=1.0),  # a floor of V4: words that tell nothing
}


@dataclass(kw_only=True)
class Config:
    """Which cells are run, and how large they are."""

    out: str = "runs/lfv"  # data, checkpoints and rows; what is there already, of the same settings, is kept
    methods: list[str] = field(default_factory=lambda: ["model", "labelled", "true_labels"])  # by name
    video: list[str] = field(default_factory=lambda: ["V0"])  # rungs of the ladder
    demonstrations: list[int] = field(default_factory=lambda: [50])  # of each robot task
    floors: list[str] = field(default_factory=lambda: ["labelled"])  # methods that are also driven blind and deaf
    seeds: list[int] = field(default_factory=lambda: [0])  # of data and weights
    robot_tasks: list[str] = field(default_factory=lambda: list(ROBOT_TASKS))  # with demonstrations
    video_tasks: list[str] = field(default_factory=lambda: list(VIDEO_TASKS))  # seen as video only
    videos: int = 50  # of each video task
    videos_taught: int = 0  # of each robot task, beside its demonstrations
    play: int = 40  # episodes of undirected play, three seconds each, in the scene of each robot task
    shifts: list[str] = field(default_factory=lambda: ["plain"])  # under which policies are driven
    reworded: bool = False  # ask in a phrasing of the task that nobody heard
    spread: float = SPREAD  # of the layouts, relative to Meta-World's own range
    episodes: int = 10  # driven for each task
    execute: int = 1  # control steps of a decision
    max_steps: int = 90  # after which an episode has failed
    steps: int = 500  # of a policy's training
    vision_steps: int = 600  # of the vision tokenizer's
    labeller_steps: int = 2000  # of the labeller's

    def check(self) -> None:
        """Raises: ConfigError naming the field."""
        known = {"methods": names("methods"), "floors": names("methods"), "video": list(LADDER), "shifts": list(SHIFTS)}
        for name, there in known.items():
            for value in getattr(self, name):
                if value not in there:
                    raise ConfigError(f"{name}: no {value!r}: {did_you_mean(value, there)}")
        positive = ("videos", "episodes", "execute", "max_steps", "steps", "vision_steps", "labeller_steps")
        for name in positive:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}", fix="give at least 1")
        for name in ("methods", "video", "demonstrations", "seeds", "robot_tasks", "shifts"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty", fix="name at least one")
        for name, values in asdict(self).items():
            if isinstance(values, list) and len(set(values)) < len(values):
                raise ConfigError(f"{name} names something twice: {values}", fix="it would count twice: name it once")
        if self.execute > CHUNK:
            raise ConfigError(f"execute is {self.execute}", fix=f"a decision is {CHUNK} actions: give 1 to {CHUNK}")
        if min(self.play, self.videos_taught, *self.seeds) < 0 or min(self.demonstrations) < 1:
            raise ConfigError(
                f"play is {self.play}, videos_taught {self.videos_taught}, demonstrations {self.demonstrations}, seeds "
                f"{self.seeds}",
                fix="play, videos_taught and seeds are 0 or more, demonstrations at least 1",
            )
        if max(self.seeds) >= MOST_SEEDS:
            raise ConfigError(f"seeds are {self.seeds}", fix=f"give numbers below {MOST_SEEDS}")
        if not 0 < self.spread <= MOST_SPREAD:
            raise ConfigError(f"spread is {self.spread:g}", fix=f"give more than 0, at most {MOST_SPREAD:g}")
        both = set(self.robot_tasks) & set(self.video_tasks)
        if both:
            raise ConfigError(f"{sorted(both)} are robot_tasks and video_tasks", fix="name each in one of them")

    @property
    def published(self) -> Mapping[str, float]:
        """Success that others have published on the robot tasks, by method."""
        return {}

    @property
    def filmed(self) -> dict[str, int]:
        """How many videos there are of each task."""
        return {
            **(dict.fromkeys(self.robot_tasks, self.videos_taught) if self.videos_taught else {}),
            **dict.fromkeys(self.video_tasks, self.videos),
        }


@dataclass(kw_only=True)
class MW7(Config):
    """The seven tasks that others have published, with five demonstrations each; what differs stands in the docs."""

    out: str = "runs/mw7"  # data, checkpoints and rows; what is there already, of the same settings, is kept
    methods: list[str] = field(default_factory=lambda: ["cloning", "model", "labelled", "true_labels"])  # by name
    demonstrations: list[int] = field(default_factory=lambda: [5])  # of each robot task
    robot_tasks: list[str] = field(default_factory=lambda: list(MW7_TASKS))  # with demonstrations
    video_tasks: list[str] = field(default_factory=list)  # seen as video only
    videos_taught: int = 50  # of each robot task, beside its demonstrations
    spread: float = 1.0  # of the layouts, relative to Meta-World's own range
    episodes: int = 25  # driven for each task

    @property
    def published(self) -> Mapping[str, float]:
        return MW7_PUBLISHED if set(self.robot_tasks) == set(MW7_TASKS) else {}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One entry of the comparison."""

    method: str
    demonstrations: int
    video: str
    seed: int

    def __str__(self) -> str:
        return f"{self.method}-d{self.demonstrations}-{self.video}-s{self.seed}"


def cells(config: Config) -> Iterator[Cell]:
    """Every combination, so ordered that data of one seed are used up before the next."""
    for seed in config.seeds:
        for video in config.video:
            for count in config.demonstrations:
                for method in config.methods:
                    yield Cell(method=method, demonstrations=count, video=video, seed=seed)


def there_is(config: Config, video: str) -> dict[str, bool]:
    """Which fields of `Data` a cell with this video has. Where the speed of video was changed there is no `truth`: what
    was done is not what is seen."""
    filmed, played = bool(config.filmed), config.play > 0
    truth = filmed and LADDER[video].speed == (1.0, 1.0)
    always = dict.fromkeys(("robot", "contract"), True)
    return {**always, "play": played, "video": filmed, "truth": truth, "poses": filmed and played}


def way_to(config: Config, lacking: Sequence[str]) -> str:
    """What to give for cells to have the fields of `Data` that they lack."""
    ways = []
    if not config.filmed and {"video", "truth", "poses"} & set(lacking):
        ways.append("give video_tasks or videos_taught")
    if not config.play and {"play", "poses"} & set(lacking):
        ways.append("give play")
    if config.filmed and "truth" in lacking:
        there = [video for video in LADDER if there_is(config, video)["truth"]]
        ways.append(f"choose video whose speed is as it was: {', '.join(there)}")
    return f"{' and '.join(ways)}, or compare other methods"


def layouts(config: Config, tasks: Sequence[str], shift: str) -> list[Layout]:
    """What is driven of some tasks: the same for every method, so that they are compared pair by pair."""
    options = (("shift", shift), ("spread", config.spread))
    return [Layout(task, FIRST_LAYOUT + i, options) for task in tasks for i in range(config.episodes)]


OF_CELLS = ("out", "methods", "floors", "seeds", "demonstrations", "video")  # what a cell says of itself
OF_DRIVING = ("shifts", "reworded", "episodes", "execute", "max_steps")  # which nothing that is trained depends on


def fingerprint(config: Config) -> str:
    """16 hexadecimal digits of everything that decides a cell's number but the machine."""
    return digest(_said(config, OF_CELLS))[:16]


def training_fingerprint(config: Config) -> str:
    """8 hexadecimal digits of what decides what a method learns, of a cell: another's checkpoint is none of its."""
    return digest(_said(config, (*OF_CELLS, *OF_DRIVING)))[:8]


def _said(config: Config, but: Sequence[str]) -> dict[str, Any]:
    said = {k: v for k, v in asdict(config).items() if k not in but}
    said |= {"version": VERSION, "first_layout": FIRST_LAYOUT}
    return said | {"ladder": {name: asdict(rung) for name, rung in LADDER.items()}}


def digest(said: Any) -> str:
    """The SHA-256 of what JSON can hold, as hexadecimal digits."""
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
