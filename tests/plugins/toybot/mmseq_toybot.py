"""An example of a person's own parts: a reader of a made-up format, a tokenizer for a force stream, and a policy.

A `.toylog` file is text: a line of JSON about the robot, then one line of JSON for each step of each episode. Nothing
of it is known to mmseq, which finds the three classes by the entry points in pyproject.toml.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmseq.embodiment import Axes, Camera, Embodiment
from mmseq.episode import Episode
from mmseq.errors import ConfigError, DataError
from mmseq.serving.model_policy import ModelPolicy

STREAMS = {"proprio": "joints", "action": "command", "force": "force"}  # ours: what the file calls it


class ToyReader:
    """The episodes of a `.toylog` file. Keeps `mmseq.data.reader.EpisodeSource`."""

    def __init__(
        self,
        path: str | Path,
        rate_hz: float | None = None,
        embodiment: Embodiment | None = None,
        map: Mapping[str, Any] | None = None,
    ):
        if map or rate_hz:
            raise ConfigError(f"{path}: a toylog takes neither a map nor another rate", fix="leave them out")
        self.path, self._given = Path(path), embodiment
        try:
            self._head, *rows = [json.loads(line) for line in self.path.read_text().splitlines()]
            self._episodes: dict[int, list[dict]] = {}
            for row in rows:
                self._episodes.setdefault(row["episode"], []).append(row)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path} is no toylog: {error}", fix="record it again") from error

    @staticmethod
    def detects(path: str | Path) -> bool:
        return Path(path).suffix == ".toylog"

    def __len__(self) -> int:
        return len(self._episodes)

    def embodiment(self) -> Embodiment:
        if self._given is not None:
            return self._given
        rows = [row for episode in self._episodes.values() for row in episode]
        axes = {
            ours: Axes.from_values(np.array([row[theirs] for row in rows]), self._head[theirs]["names"])
            for ours, theirs in STREAMS.items()
        }
        size = self._head["size"]
        eye = Camera(name="eye", height=size, width=size)
        return Embodiment(name=self._head["robot"], rate_hz=10.0, cameras=(eye,)).with_vectors(axes)

    def frames(self, index: int, camera: str) -> Iterator[np.ndarray]:
        size = self._head["size"]
        for row in list(self._episodes.values())[index]:  # a picture is stored as its grey level
            yield np.full((size, size, 3), row["grey"], np.uint8)

    def __getitem__(self, index: int) -> Episode:
        rows = list(self._episodes.values())[index]
        arrays = {ours: np.array([row[theirs] for row in rows], np.float32) for ours, theirs in STREAMS.items()}
        arrays["image.eye"] = lambda: np.stack(list(self.frames(index, "eye")))  # type: ignore[assignment]
        return Episode.from_arrays(
            f"toy-{index}",
            10.0,
            arrays,  # type: ignore[arg-type]
            length=len(rows),
            texts=[self._head["task"]],
            embodiment=self.embodiment().name,
            source=str(self.path),
        )


class ForceLevels:
    """Forces as levels, finer near zero: codes of the square root. Keeps `mmseq.tokenization.base.Tokenizer`."""

    kind, readout = "force-levels", "median"

    def __init__(self, levels: int = 15, largest: float = 10.0):
        self.size, self.largest = int(levels) | 1, float(largest)  # an odd number, so that zero has a code

    @classmethod
    def train(cls, values: Iterable[tuple[np.ndarray, Axes]], levels: int = 15) -> ForceLevels:
        """The largest force that was ever felt decides the scale."""
        return cls(levels, max((float(np.abs(found).max()) for found, _ in values), default=1.0) or 1.0)

    def encode(self, values: np.ndarray, axes: Axes) -> np.ndarray:
        share = np.sign(values) * np.sqrt(np.clip(np.abs(values) / self.largest, 0, 1))
        return np.rint((share + 1) / 2 * (self.size - 1)).astype(np.int64)

    def decode(self, codes: np.ndarray, axes: Axes) -> np.ndarray:
        share = np.asarray(codes) / (self.size - 1) * 2 - 1
        return (np.sign(share) * share**2 * self.largest).astype(np.float32)

    def code_features(self) -> None:
        return None

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.kind} {self.size} {self.largest}".encode()).hexdigest()[:16]

    def save(self, directory: str | Path) -> dict[str, Any]:
        return {"levels": self.size, "largest": self.largest}

    @classmethod
    def load(cls, directory: str | Path, settings: dict[str, Any], *, device: Any = "cpu") -> ForceLevels:
        return cls(settings["levels"], settings["largest"])


class GentlePolicy(ModelPolicy):
    """A checkpoint whose commands are halved where the robot feels a force."""

    def infer_many(self, observations: Any) -> list[Any]:
        results = super().infer_many(observations)
        for observation, result in zip(observations, results):
            if isinstance(result, dict) and np.abs(observation.get("observation.force", 0)).max() > 1:
                result["actions"] = result["actions"] / 2
        return results
