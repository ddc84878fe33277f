"""Tokenizers: the tokenizers of one model together, their vocabulary, and the way from an episode
to its tokens and back.

On disk a folder: `tokenizers.json`, `text.model` (or `text.tokenizer.json`), `vision.json` and
`vision.safetensors`, `embodiments/<name>.json`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from mmseq.embodiment import Embodiment
from mmseq.episode import IMAGE_PREFIX, Episode
from mmseq.errors import CheckpointError, EpisodeError, FingerprintError, TaskError, did_you_mean
from mmseq.sequence import Layout, SequenceBuilder
from mmseq.tokenization.continuous import BinTokenizer, ScalarTokenizer, value_features
from mmseq.tokenization.text import TextTokenizer
from mmseq.tokenization.vision import VisionTokenizer
from mmseq.vocabulary import Vocabulary

FILE = "tokenizers.json"


class Tokenizers:
    """Everything between episodes and vocabulary ids."""

    def __init__(
        self,
        *,
        text: TextTokenizer,
        vision: VisionTokenizer,
        action: BinTokenizer,
        proprio: BinTokenizer,
        progress: ScalarTokenizer,
        embodiments: Sequence[Embodiment] = (),
        merge: int = 2,
    ):
        self.text, self.vision = text, vision
        self.action, self.proprio, self.progress = action, proprio, progress
        self.embodiments = {e.name: e for e in embodiments}
        self.layout = Layout(vision.grid, merge)
        self.vocabulary = Vocabulary(
            text=text.size,
            vision=vision.codebook_size,
            action=action.bins,
            proprio=proprio.bins,
            progress=progress.bins,
            embodiments=list(self.embodiments),
        )

    def code_features(self) -> np.ndarray:
        """float32 (C, F): what the last C ids of the vocabulary, from the first vision code on, are made of.

        Each tokenizer has columns of its own; rows are zero for ids without a feature.
        """
        parts = {
            "vision": self.vision.code_features(),
            "action": value_features(self.action.bins),
            "proprio": value_features(self.proprio.bins),
            "progress": value_features(self.progress.bins),
        }
        first = self.vocabulary.ranges["vision"].start
        out = np.zeros((len(self.vocabulary) - first, sum(p.shape[1] for p in parts.values())), np.float32)
        column = 0
        for name, features in parts.items():
            ids = self.vocabulary.ranges[name]
            out[ids.start - first : ids.stop - first, column : column + features.shape[1]] = features
            column += features.shape[1]
        return out

    def builder(self) -> SequenceBuilder:
        cameras = {e.name: [c.name for c in e.cameras] for e in self.embodiments.values()}
        return SequenceBuilder(self.vocabulary, self.layout, cameras)  # type: ignore[arg-type]

    def embodiment(self, name: str | None) -> Embodiment:
        if name is None or name not in self.embodiments:
            raise EpisodeError(
                f"embodiment {name!r} is unknown to this model: {did_you_mean(name or '', self.embodiments)}"
            )
        return self.embodiments[name]

    def with_embodiments(self, embodiments: Sequence[Embodiment]) -> Tokenizers:
        """The same tokenizers for other robots; those that are here should come first, in their order."""
        return Tokenizers(
            text=self.text,
            vision=self.vision,
            action=self.action,
            proprio=self.proprio,
            progress=self.progress,
            embodiments=embodiments,
            merge=self.layout.merge,
        )

    def fingerprints(self) -> dict[str, str]:
        """Of every part that token shards depend on; embodiments as `embodiment/<name>`."""
        return {
            "text": self.text.fingerprint,
            "vision": self.vision.fingerprint,
            "action": f"bins-{self.action.bins}",
            "proprio": f"bins-{self.proprio.bins}",
            "progress": f"bins-{self.progress.bins}",
            **{f"embodiment/{e.name}": e.fingerprint for e in self.embodiments.values()},
        }

    def require_fingerprints(
        self, theirs: dict[str, str], *, what: str, fix: str = "tokenize again with `mmseq data tokenize`"
    ) -> None:
        """Raises: FingerprintError naming each tokenizer or embodiment that differs."""
        mine = self.fingerprints()
        wrong = [f"{k}: {v} there, {mine.get(k, 'absent')} here" for k, v in sorted(theirs.items()) if mine.get(k) != v]
        if wrong:
            raise FingerprintError(
                f"{what} was made with other tokenizers ({'; '.join(wrong)})",
                fix=fix,
            )

    def save(self, directory: str | Path) -> None:
        directory = Path(directory)
        (directory / "embodiments").mkdir(parents=True, exist_ok=True)
        self.text.save(directory)
        self.vision.save(directory)
        for embodiment in self.embodiments.values():
            embodiment.save(directory / "embodiments" / f"{embodiment.name}.json")
        settings = {
            "format": 1,
            "action_bins": self.action.bins,
            "proprio_bins": self.proprio.bins,
            "progress_bins": self.progress.bins,
            "merge": self.layout.merge,
            "embodiments": list(self.embodiments),
            "fingerprints": self.fingerprints(),
        }
        (directory / FILE).write_text(json.dumps(settings, indent=2) + "\n")

    @classmethod
    def load(cls, directory: str | Path, *, device: str | torch.device = "cpu") -> Tokenizers:
        """device: of the vision tokenizer's network.

        Raises: CheckpointError when the folder is not complete, FingerprintError when a part was exchanged.
        """
        directory = Path(directory)
        try:
            settings = json.loads((directory / FILE).read_text())
            names, fingerprints = settings["embodiments"], settings["fingerprints"]
            parts = {k: int(settings[k]) for k in ("action_bins", "proprio_bins", "progress_bins", "merge")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{directory} holds no tokenizers ({FILE}: {error})", fix="train them with `mmseq tokenizer train`"
            ) from error
        bundle = cls(
            text=TextTokenizer.load(directory),
            vision=VisionTokenizer.load(directory, device=device),
            action=BinTokenizer(parts["action_bins"]),
            proprio=BinTokenizer(parts["proprio_bins"]),
            progress=ScalarTokenizer(parts["progress_bins"]),
            embodiments=[Embodiment.load(directory / "embodiments" / f"{name}.json") for name in names],
            merge=parts["merge"],
        )
        bundle.require_fingerprints(fingerprints, what=f"{directory / FILE}")
        return bundle


class EpisodeTokens:
    """The tokens of an `Episode`, made when they are asked for. Implements `TokenSource`."""

    def __init__(self, episode: Episode, tokenizers: Tokenizers, *, texts: dict[str, str] | None = None):
        """texts: replaces or adds text streams (`text`, `plan`, `question`)."""
        self.episode = episode
        self.tokenizers = tokenizers
        self.rate_hz = episode.rate_hz
        self.embodiment = episode.embodiment if episode.embodiment in tokenizers.embodiments else None
        self._texts: dict[str, list[str]] = {"text": list(episode.texts), "plan": list(episode.plans)}
        for stream in ("question", "answer"):
            if stream in episode.metadata:
                self._texts[stream] = [str(episode.metadata[stream])]
        for stream, text in (texts or {}).items():
            self._texts[stream] = [text]

    def __len__(self) -> int:
        return len(self.episode)

    @property
    def streams(self) -> list[str]:
        names = [name for name, texts in self._texts.items() if texts]
        if self.episode.success is not False:  # a demonstration leads to its goal unless it says otherwise
            names.append("progress")
        if self.episode.success is not None:
            names.append("success")
        for name in self.episode.streams:
            if name.startswith(IMAGE_PREFIX) or self._axes(name) is not None:
                names.append(name)
        return names

    def _axes(self, stream: str):
        if self.embodiment is None or stream not in ("action", "proprio"):
            return None
        return getattr(self.tokenizers.embodiments[self.embodiment], stream)

    def text(self, stream: str, variant: int) -> np.ndarray:
        texts = self._texts.get(stream)
        if not texts:
            raise TaskError(f"episode {self.episode.id!r} has no {stream!r}", fix=f"pass {stream}=... to predict")
        return self.tokenizers.text.encode(texts[variant % len(texts)])

    def vision(self, camera: str, start: int, stop: int) -> np.ndarray:
        return self.tokenizers.vision.encode(self.episode[f"{IMAGE_PREFIX}{camera}"][start:stop])

    def vector(self, stream: str, start: int, stop: int) -> np.ndarray:
        axes = self._axes(stream)
        if axes is None:
            raise TaskError(
                f"episode {self.episode.id!r} of embodiment {self.episode.embodiment!r} has no {stream!r} here"
            )
        where = f"episode {self.episode.id!r}"
        values = axes.check(self.episode[stream][start:stop], what=stream, where=where)
        return getattr(self.tokenizers, stream).encode(values, axes)

    def scalar(self, stream: str, step: int) -> int:
        return scalar_code(stream, step, len(self), self.episode.success, self.tokenizers.progress)


def scalar_code(stream: str, step: int, length: int, success: bool | None, progress: ScalarTokenizer) -> int:
    """The code of `progress` (the share of a successful episode that is over) or `success` (its end)."""
    if stream == "progress":
        return progress.encode(step / max(1, length - 1))
    return int(bool(success) and step >= 0.9 * (length - 1))
