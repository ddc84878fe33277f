"""What a set of tokenizers is made of: the schema of `tokenizers/<name>/recipe.yaml`.

Training them is in `mmseq/training/tokenizers.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from mmseq.errors import ConfigError
from mmseq.reading import Reading
from mmseq.tokenization.vision import VisionConfig


@dataclass(frozen=True, kw_only=True)
class TokenizerSource(Reading):
    """Episodes to train tokenizers on, and how they are read."""

    path: str = "???"  # episode shards, LeRobot, HDF5 or videos
    weight: float = 1.0  # share of the vision batches
    rate_hz: float | None = None  # resample to so many steps per second (datasets and videos only)
    skip_bad: int = 0  # leave out up to so many episodes that cannot be read (datasets and videos only)


@dataclass(kw_only=True)
class TextRecipe:
    """Where the text tokenizer comes from."""

    # `sentencepiece`, trained on the texts and plans of the sources; `huggingface`, the tokenizer.json at `path`
    kind: str = "sentencepiece"
    path: str | None = None  # a tokenizer to take as it is; needed for `huggingface`
    vocab_size: int = 512  # pieces at most, of a trained one


@dataclass(frozen=True, kw_only=True)
class VisionRecipe(VisionConfig):
    """How the vision tokenizer is trained, beside what it is."""

    path: str | None = None  # a trained vision tokenizer to take as it is
    steps: int = 400  # training steps
    batch_images: int = 32  # images per step
    max_seconds: float | None = None  # stop there, with the steps so far; default: no limit
    threads: int | None = None  # of the CPU; default: torch's choice
    foreground: float = 1.0  # extra weight of a pixel per standard deviation from its mean; 0: all pixels alike
    frames_per_source: int = 20_000  # frames read of each source and camera, evenly spaced
    device: str = "cpu"  # cpu, cuda
    augment: tuple[str, ...] = ()  # changes of the training frames, by name: `shift`, or a plug-in's

    def config(self) -> VisionConfig:
        return VisionConfig(**{f.name: getattr(self, f.name) for f in fields(VisionConfig)})


@dataclass(kw_only=True)
class TokenizerConfig:
    """All tokenizers of a model."""

    out: str = "???"  # their folder
    seed: int = 0  # of training
    sources: dict[str, TokenizerSource] = field(default_factory=dict)  # by name
    text: TextRecipe = field(default_factory=TextRecipe)
    vision: VisionRecipe = field(default_factory=VisionRecipe)
    action_bins: int = 64  # per axis of an action
    proprio_bins: int = 128  # per axis of the robot's state
    progress_bins: int = 32  # of progress, 0 to 1
    # of other vector streams, or of these in place of bins: kind and settings of a tokenizer, {force: {kind: bins}}
    vectors: dict[str, dict[str, Any]] = field(default_factory=dict)
    encoder: str | None = None  # given pictures enter as the features of this plug-in, not as merged codes
    merge: int = 2  # given vision joins merge x merge tokens into one position
    # share of each source's episodes kept for measuring; a mix with the same source names and holdout keeps the same
    # ones
    holdout: float = 0.1

    def check(self) -> None:
        """Raises: ConfigError naming the field."""
        if not self.sources:
            raise ConfigError("the recipe names no sources", fix="add sources: {name: {path: ...}}")
        if self.text.kind not in ("sentencepiece", "huggingface"):
            raise ConfigError(f"text.kind is {self.text.kind!r}", fix="use sentencepiece or huggingface")
        if self.text.kind == "huggingface" and not self.text.path:
            raise ConfigError("text.kind=huggingface needs text.path", fix="name a tokenizer.json")
        if not 0 <= self.holdout < 1:
            raise ConfigError(f"holdout must be in [0, 1), got {self.holdout}")
        if self.vision.frames_per_source < 1:
            raise ConfigError(f"vision.frames_per_source must be at least 1, got {self.vision.frames_per_source}")
        side = self.vision.config().side
        if self.merge < 1 or side % self.merge:
            raise ConfigError(f"merge={self.merge} does not divide the {side} tokens along one side of a frame")
