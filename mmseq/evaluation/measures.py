"""What predictions are compared with: errors of actions, phrasings that mean the same, and baselines.

A baseline is what one would answer without looking: the mean action, the last frame, the most
frequent caption. It is measured on the same samples and by the same rule as the model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from mmseq.embodiment import Axes
from mmseq.episode import Episode


def action_error(true: np.ndarray, predicted: np.ndarray, axes: Axes) -> np.ndarray:
    """Mean absolute error per sample as a share of each axis' range (low to high).

    (N, steps, axes) twice -> (N,). An axis that never moves in the training data counts by its own unit.
    """
    error = np.abs(true.astype(np.float64) - predicted) / spans(axes)
    return error.reshape(len(error), -1).mean(1)


def spans(axes: Axes) -> np.ndarray:
    """float64 (axes,): what errors are shares of, each axis's range; 1 for one that never moves."""
    span = np.asarray(axes.high, dtype=np.float64) - np.asarray(axes.low, dtype=np.float64)
    return np.where(span > 1e-8, span, 1.0)


def mean_action(episodes: Iterable[Episode], embodiment: str, stream: str = "action") -> np.ndarray | None:
    """The mean vector (axes,) over all steps of one robot's episodes; None without any."""
    values = [e[stream] for e in episodes if e.embodiment == embodiment and stream in e]
    return np.concatenate(values).astype(np.float64).mean(0) if values else None


def median_action(episodes: Iterable[Episode], embodiment: str, stream: str = "action") -> np.ndarray | None:
    """The median: the constant with the least absolute error, so a harder baseline than the mean."""
    values = [e[stream] for e in episodes if e.embodiment == embodiment and stream in e]
    return np.median(np.concatenate(values).astype(np.float64), axis=0) if values else None


def normalise(text: str) -> str:
    """Lower case, words and digits only, single spaces."""
    return " ".join(re.findall(r"\w+", text.lower()))


class Phrasings:
    """Which texts mean the same: those that were ever given to one episode, and what these share in turn.

    "open the door" and "pull the door open" are one task because some episode carries both. Where the texts of an
    episode change on the way, what holds at the same steps belongs together.
    """

    def __init__(self, episodes: Iterable[Episode], stream: str = "text"):
        self.stream = stream
        self._parent: dict[str, str] = {}
        self._anchor: dict[str, set[str]] = {}
        for known in (known for episode in episodes for _, _, known in episode.pieces()):
            texts = [normalise(t) for t in known.get("text", ())]
            self._join(texts)
            if stream != "text":
                own = [normalise(t) for t in known.get(stream, ())]
                for text in texts[:1]:
                    self._anchor.setdefault(text, set()).update(own)
        # a plan belongs to the task, whichever of its phrasings the plan was written under
        self._of_task: dict[str, set[str]] = {}
        for text, own in self._anchor.items():
            self._of_task.setdefault(self._root(text), set()).update(own)

    def _root(self, text: str) -> str:
        while self._parent.get(text, text) != text:
            text = self._parent[text]
        return text

    def _join(self, texts: Sequence[str]) -> None:
        for text in texts:
            self._parent.setdefault(text, text)
            self._parent[self._root(text)] = self._root(texts[0])

    def task(self, episode: Episode, step: int = 0) -> str:
        """A name for the task of an episode at a step: one of its phrasings, the same for all that share it."""
        texts = episode.texts_of("text", step)
        return self._root(normalise(texts[0])) if texts else ""

    def accepts(self, episode: Episode, text: str, step: int = 0) -> bool:
        """Whether `text` is a known way to write this episode's text at a step."""
        text = normalise(text)
        if text in {normalise(t) for t in episode.texts_of(self.stream, step)}:
            return True
        if self.stream == "text":
            return text in self._parent and self._root(text) == self.task(episode, step)
        # answers depend on the question, so only texts of the whole task are shared
        return self.stream == "plan" and text in self._of_task.get(self.task(episode, step), set())

    def majority(self, episodes: Iterable[Episode]) -> str | None:
        """The text with which one is right most often: a phrasing of the most frequent task; None without texts.

        An episode counts once for each text that it has on the way.
        """
        counts = Counter()
        for episode in episodes:
            found = [(start, texts[self.stream][0]) for start, _, texts in episode.pieces() if self.stream in texts]
            if self.stream == "text":
                counts.update({self.task(episode, start) for start, _ in found})
            else:
                counts.update({normalise(text) for _, text in found})
        return max(counts, key=lambda text: (counts[text], text)) if counts else None
