"""The data of the benchmark's cells, recorded once from seeds and kept as episode shards.

    data = Recorder(config, seed=0).data("V0", demonstrations=50)
    data.robot, data.play, data.video, data.truth, data.poses

`truth` is the video with the actions and states that it was made with: for ceilings alone. `poses` is undirected play
of whoever is in the video, filmed as it is, with where the hand was and no actions: what a hand tracker is taught with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from mmseq.data.importing import EpisodeList, write_episodes
from mmseq.data.shards import holds_shards
from mmseq.embodiment import Embodiment
from mmseq.episode import IMAGE_PREFIX, Episode
from mmseq.evaluation.lfv.manifest import LADDER, VERSION, Config, digest, there_is
from mmseq.simulation.experts import TASKS, task_language
from mmseq.simulation.metaworld import robot
from mmseq.simulation.play import record_play
from mmseq.simulation.record import RecordedEpisode, record_episodes

EXPERTS: dict[str, Any] = {"gain": 0.5, "noise": 0.5}  # as in the demo: gentler than Meta-World's own
# apart from the robot's: nobody filmed the layouts that it was taught in
VIDEO_SEED, PLAY_SEED, POSES_SEED = 1000, 2000, 3000


@dataclass(frozen=True)
class Data:
    """What a method may learn from: folders of episode shards, by name; None where there is none (`there_is`),
    and of poses where nobody needs them."""

    robot: Path
    play: Path | None
    video: Path | None
    truth: Path | None
    poses: Path | None
    contract: Embodiment


class Recorder:
    """Records what is asked for, and keeps it in `config.out`."""

    def __init__(self, config: Config, seed: int, say: Callable[[str], None] = print):
        self.config, self.seed, self.say = config, seed, say
        self.folder = Path(config.out) / "data" / f"seed{seed}"
        self.contract = robot()

    def data(self, rung: str, demonstrations: int, *, poses: bool = True) -> Data:
        """What a cell learns from. poses: whether they are wanted, as few methods do: they take minutes to record.

        Raises: DataError when an expert fails again and again.
        """
        config = self.config
        tasks = config.robot_tasks, config.video_tasks
        made_of = digest([VERSION, *tasks, config.spread, EXPERTS, {k: asdict(rung) for k, rung in LADDER.items()}])[:8]
        folder = self.folder / f"tasks{'-'.join(str(len(t)) for t in tasks)}-{made_of}"
        taught = self._store(
            folder / f"robot{demonstrations}",
            lambda: self._demonstrations(config.robot_tasks, demonstrations),
            self.contract,
        )
        play = config.play and self._store(
            folder / f"play{config.play}",
            lambda: record_play(config.robot_tasks, config.play, seed=self.seed + PLAY_SEED, spread=config.spread),
            self.contract,
        )
        if not config.filmed:
            return Data(taught, play or None, None, None, None, self.contract)
        counts = (config.videos_taught, config.videos if config.video_tasks else 0)
        name = "-".join([rung, *(str(count) for count in counts if count)])
        filmed, truth = folder / name, folder / f"{name}-true"
        if not holds_shards(filmed):
            episodes = list(self._film(rung))
            self._write(truth, episodes, self.contract)
            self._write(filmed, [_video_of(e) for e in episodes], None)
        tracked = self._poses(folder, rung) if poses and config.play else None
        known = truth if there_is(config, rung)["truth"] else None
        return Data(taught, play or None, filmed, known, tracked, self.contract)

    def _poses(self, folder: Path, rung: str) -> Path:
        scene: dict[str, Any] = LADDER[rung].scene
        config = self.config
        path = folder / f"poses{config.play}-{'-'.join(scene.values())}"  # rungs that are filmed alike share them
        if not holds_shards(path):
            seed = self.seed + POSES_SEED
            played = record_play(config.robot_tasks, config.play, seed=seed, spread=config.spread, **scene)
            seen = (replace(e, camera=self.contract.cameras[0].name).to_episode() for e in played)
            self._write(path, [_with_streams(e, IMAGE_PREFIX, "proprio") for e in seen], self.contract)
        return path

    def _store(self, path: Path, make: Callable[[], Iterable[RecordedEpisode]], contract: Embodiment | None) -> Path:
        if not holds_shards(path):
            self._write(path, [episode.to_episode() for episode in make()], contract)
        return path

    def _write(self, path: Path, episodes: Sequence[Episode], contract: Embodiment | None) -> None:
        self.say(f"{len(episodes)} episodes for {path.relative_to(self.config.out)}")
        said = {"name": path.name, "source": f"seed {self.seed}"}
        write_episodes(EpisodeList(episodes, contract), path, said, overwrite=True)  # the half of a pair, after a kill

    def _demonstrations(self, tasks: Sequence[str], count: int) -> Iterable[RecordedEpisode]:
        recorded = record_episodes(tasks, count, seed=self.seed, spread=self.config.spread, **EXPERTS)
        return map(_as_heard, recorded)

    def _film(self, rung: str) -> Iterable[Episode]:
        film = LADDER[rung]
        scene: dict[str, Any] = {"seed": self.seed + VIDEO_SEED, "spread": self.config.spread, **EXPERTS, **film.scene}
        filmed = self.config.filmed
        amounts = {count: [task for task in filmed if filmed[task] == count] for count in filmed.values()}
        recorded = chain.from_iterable(record_episodes(tasks, count, **scene) for count, tasks in amounts.items())
        rng = np.random.default_rng([self.seed, VIDEO_SEED])
        for episode in map(_as_heard, recorded):
            length = len(episode)
            speed = rng.uniform(*film.speed)
            at = np.minimum((np.arange(0, length, speed)).round().astype(int), length - 1)
            if rng.random() < film.failing:  # somebody stops half-way
                at = at[: max(8, int(len(at) * rng.uniform(0.4, 0.7)))]
                episode = replace(episode, success=False)
            if rng.random() < film.miscaptioned:
                other = str(rng.choice([t for t in TASKS if t != episode.task]))
                words = task_language(other)
                episode = replace(episode, texts=_heard(other, words.instructions), plan=words.plan)
            yield replace(
                episode,
                camera=self.contract.cameras[0].name,  # wherever it stood: what is filmed is taken for what is seen
                images=episode.images[at],
                proprio=episode.proprio[at],
                action=episode.action[at],
            ).to_episode()


def unheard(task: str) -> str:
    """The phrasing of a task that no episode here is told in."""
    return task_language(task).instructions[-1]


def _heard(task: str, texts: Sequence[str]) -> tuple[str, ...]:
    return tuple(text for text in texts if text != unheard(task))


def _as_heard(episode: RecordedEpisode) -> RecordedEpisode:
    return replace(episode, texts=_heard(episode.task, episode.texts))


def _with_streams(episode: Episode, *beginnings: str) -> Episode:
    return replace(episode, streams={name: s for name, s in episode.streams.items() if name.startswith(beginnings)})


def _video_of(episode: Episode) -> Episode:
    """What a camera saw, and what was said of it."""
    return replace(_with_streams(episode, IMAGE_PREFIX), embodiment=None, success=None)
