"""What is compared. A method is a class with an entry point in the group `mmseq.methods`.

    class MyMethod:
        def __init__(self, config: Config, say: Callable[[str], None]): ...
        def train(self, data: Data, out: Path, seed: int) -> Controller: ...

`train` learns from `data` (from `data.truth` only where that is the point: a ceiling), keeps what it wants in `out`,
and returns what drives the robots (`mmseq.evaluation.lockstep.Controller`). `out` is of one cell and of everything that
decides what is learned, so what lies there is its own. A method may have `needs`, names of fields of `Data` without
which a cell of it is left out; `poses` are there for those alone that need them. Those here that train our model do so
with the same tokenizers, for as many steps of as many tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from mmseq.config import load_config
from mmseq.data.importing import EpisodeList, write_episodes
from mmseq.data.mixture import MixConfig, SourceConfig, TaskConfig, save_mix
from mmseq.data.shards import holds_shards
from mmseq.data.sources import open_source
from mmseq.data.tokenize import tokenize_mix
from mmseq.errors import MMSeqError
from mmseq.evaluation.lfv.manifest import CHUNK, Config
from mmseq.evaluation.lfv.record import Data
from mmseq.evaluation.lockstep import Controller, Seen
from mmseq.labelling.labels import PixelLabeller, label_episode
from mmseq.labelling.network import SETTINGS
from mmseq.labelling.retargeting import Retargeting
from mmseq.labelling.training import LabellerConfig, teach, train_labeller
from mmseq.reading import AS_IT_IS
from mmseq.serving.model_policy import ModelPolicy
from mmseq.simulation.base import to_wire

RECIPES = Path(__file__).parents[2] / "recipes"
HOLDOUT = 0.05


class Method(Protocol):
    """One entry of the comparison."""

    def __init__(self, config: Config, say: Callable[[str], None]): ...

    def train(self, data: Data, out: Path, seed: int) -> Controller: ...


class RobotOnly:
    """Our model, taught by the demonstrations alone: what video has to beat."""

    needs: tuple[str, ...] = ()
    policy = f"text, image -> action[{CHUNK}]"  # no state: see `LabelledState`

    def __init__(self, config: Config, say: Callable[[str], None]):
        self.config, self.say = config, say

    def train(self, data: Data, out: Path, seed: int) -> Controller:
        checkpoint = out / "train/checkpoint"
        if not checkpoint.is_dir():
            video = self.from_video(data, seed)
            self._train(data, video, out, seed)
        return ModelController(ModelPolicy.from_pretrained(checkpoint, arrow=self.policy), self.config.execute)

    def from_video(self, data: Data, seed: int) -> Mapping[str, Path]:
        """What the video of the cell becomes, as further sources of the mix, by name."""
        return {}

    def tasks(self, video: Mapping[str, Path]) -> list[TaskConfig]:
        """What is trained. video: the sources that came from video."""
        return [
            TaskConfig(name="policy", task=self.policy, weight=8, sources=["robot", *video]),
            TaskConfig(name="state", task="image -> proprio", weight=1, sources=["robot"]),
        ]

    def _train(self, data: Data, video: Mapping[str, Path], out: Path, seed: int) -> None:
        from mmseq.training.local import local_ranks, train_here

        config = self.config
        tokenizers = shared_tokenizers(data, config, seed, self.say)
        share = len(config.filmed) / len(config.robot_tasks)  # a task of video counts as much as one of the robot
        weights = {"robot": 1.0, **dict.fromkeys(video, share)}
        sources = {
            name: SourceConfig(path=str(path.resolve()), weight=weights[name])
            for name, path in {"robot": data.robot, **video}.items()
        }
        out.mkdir(parents=True, exist_ok=True)
        mix = MixConfig(name=out.name, holdout=HOLDOUT, sources=sources, tasks=self.tasks(video))
        save_mix(mix, out / "mix.yaml")
        tokens = tokenizers.with_name(tokenizers.name.replace("tokenizers", "tokens"))  # each source once for all
        tokenize_mix(out / "mix.yaml", tokens, tokenizers, overwrite=True)
        settings = [
            *(f"data.mix={out / 'mix.yaml'}", f"data.tokens={tokens}", f"data.tokenizers={tokenizers}"),
            *(f"out={out / 'train'}", f"seed={seed}", f"steps={config.steps}", "optimizer.average_decay=0.99"),
        ]
        train_here(
            RECIPES / "demo_train.yaml", settings, ranks=local_ranks(), log=out / "train.log", say=lambda _: None
        )


class TrueLabels(RobotOnly):
    """The ceiling: the video with the actions and states that it was made with."""

    needs = ("truth",)

    def from_video(self, data: Data, seed: int) -> Mapping[str, Path]:
        assert data.truth is not None
        return {"truth": data.truth}


class Labelled(RobotOnly):
    """Actions and states read off the video by a labeller that knows the robot's demonstrations and its play."""

    needs: tuple[str, ...] = ("video",)
    source = "labelled"  # its name in the mix

    def from_video(self, data: Data, seed: int) -> Mapping[str, Path]:
        assert data.video is not None
        trained = self._labeller(data, seed)
        labelled = data.video.with_name(f"{data.video.name}-{trained.name}")  # shared by methods
        if not holds_shards(labelled):
            labeller = PixelLabeller(trained)
            videos = open_source(data.video, AS_IT_IS)
            episodes = [label_episode(labeller, videos, i, None)[0] for i in range(len(videos))]
            write_episodes(
                EpisodeList(episodes, data.contract), labelled, {"name": "labelled", "source": str(data.video)}
            )
        return {self.source: labelled}

    def _labeller(self, data: Data, seed: int) -> Path:
        """Shared by all methods and videos of a seed and its robot data."""
        steps = self.config.labeller_steps
        out = data.robot.parent / f"labeller{steps}-{data.robot.name}-{_named(data.play)}"
        if not (out / SETTINGS).is_file():
            self.say(f"training {out.name}")
            sources = [str(path) for path in (data.robot, data.play) if path is not None]
            train_labeller(LabellerConfig(sources=sources, out=str(out), steps=steps, seed=seed, holdout=HOLDOUT))
        return out


class Tracked(Labelled):
    """Actions and states of whoever is in the video, read off by a tracker that knows such a hand's play.

    The tracker is a labeller that was taught where a hand is, with the actions with which the robot would have moved so
    (`mmseq.labelling.retargeting`). Nobody's actions are known but the robot's own.
    """

    needs = ("video", "poses")
    source = "tracked"

    def _labeller(self, data: Data, seed: int) -> Path:
        assert data.poses is not None
        out = data.robot.parent / f"tracker{self.config.labeller_steps}-{data.robot.name}-{data.poses.name}"
        if not (out / SETTINGS).is_file():
            self.say(f"training {out.name}")
            robot = [path for path in (data.robot, data.play) if path is not None]
            known = (episode for path in robot for episode in open_source(path, AS_IT_IS))
            retargeting = Retargeting.fit(known, data.contract)
            taught = [retargeting.retargeted(e) for e in open_source(data.poses, AS_IT_IS)]
            config = LabellerConfig(steps=self.config.labeller_steps, seed=seed)
            tracker = teach(taught, data.contract.cameras[0].name, data.contract, config)
            tracker.save(out, {"taught": len(taught), "sources": [str(data.poses)]})
        return out


class LabelledState(Labelled):
    """The same with a policy that is given the state, where video has a labelled one: what leaning on it costs.

    Labels lose more of the state than of the action, and a policy that leans on a state which its video lacked fails
    when it meets the real one (docs/learning_from_video.md).
    """

    policy = f"text, image, proprio -> action[{CHUNK}]"


class ModelState(RobotOnly):
    """Our model, taught by the demonstrations alone, given the state."""

    policy = f"text, image, proprio -> action[{CHUNK}]"


class ModelController:
    """A policy that drives several robots, in one batch. execute: control steps of each chunk that are used."""

    def __init__(self, policy: ModelPolicy, execute: int):
        self.policy, self.execute = policy, execute
        self.robot = next(iter(policy.robots.values()))

    def act(self, seen: Sequence[Seen]) -> list[np.ndarray]:
        cameras = [camera.name for camera in self.robot.cameras]
        asked = [
            {**to_wire(one.observation, cameras), "prompt": one.text, "embodiment": self.robot.name} for one in seen
        ]
        answers = self.policy.infer_many(asked)
        for answer in answers:
            if isinstance(answer, MMSeqError):
                raise answer
        return [answer["actions"][: self.execute] for answer in answers]  # type: ignore[index]

    def blanked(self) -> ModelController:
        """The same policy, which does not see."""
        arrow = str(self.policy.arrow)
        return ModelController(ModelPolicy(self.policy.model, arrow=arrow, blank_images=True), self.execute)


def shared_tokenizers(data: Data, config: Config, seed: int, say: Callable[[str], None]) -> Path:
    """Tokenizers that all methods of a seed share: of the demonstrations, the play and the video."""
    from mmseq.tokenization.recipe import TokenizerConfig
    from mmseq.training.tokenizers import train_tokenizers

    made_of = "-".join(_named(path) for path in (data.robot, data.play, data.video))
    out = data.robot.parent / f"tokenizers{config.vision_steps}-{made_of}"
    if not (out / "tokenizers.json").is_file():
        say(f"training {out.name}")
        sources = {"robot": data.robot, "play": data.play, "video": data.video}
        settings = [f"out={out}", f"seed={seed}", f"holdout={HOLDOUT}", f"vision.steps={config.vision_steps}"]
        settings += [f"sources.{name}.path={path}" for name, path in sources.items() if path is not None]
        train_tokenizers(load_config(TokenizerConfig, RECIPES / "demo_tokenizers.yaml", settings), lambda *_: None)
    return out


def _named(data: Path | None) -> str:
    return data.name if data is not None else "none"
