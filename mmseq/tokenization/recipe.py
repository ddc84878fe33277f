"""What a set of tokenizers is made of: the schema of `tokenizers/<name>/recipe.yaml`.

Training them is in `mmseq/training/tokenizers.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from mmseq.errors import ConfigError
from mmseq.tokenization.vision import VisionConfig


@dataclass(kw_only=True)
class TokenizerSource:
    """path: episode shards, LeRobot, HDF5 or videos. weight: share of the vision batches.

    rate_hz: resample to this rate (datasets and videos only). map: which columns of a dataset fill which streams.
    swap_colours: cameras whose red and blue are exchanged.
    """

    path: str = "???"
    weight: float = 1.0
    rate_hz: float | None = None
    map: dict[str, Any] = field(default_factory=dict)
    swap_colours: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class TextRecipe:
    """kind: `sentencepiece`, trained on the texts and plans of the sources with at most `vocab_size`
    pieces (or read from `path`); `huggingface`, the tokenizer.json at `path`."""

    kind: str = "sentencepiece"
    path: str | None = None
    vocab_size: int = 512


@dataclass(kw_only=True)
class VisionRecipe:
    """How the vision tokenizer is trained, then the fields of `VisionConfig`.

    path: a trained vision tokenizer to take as it is. frames_per_source: frames read of each source
    and camera, evenly spaced. threads: of the CPU, default torch's.
    """

    path: str | None = None
    steps: int = 400
    batch_images: int = 32
    max_seconds: float | None = None
    threads: int | None = None
    foreground: float = 1.0
    frames_per_source: int = 20_000
    device: str = "cpu"
    size: int = VisionConfig.size
    patch: int = VisionConfig.patch
    margin: int = VisionConfig.margin
    levels: list[int] = field(default_factory=lambda: list(VisionConfig.levels))
    width: int = VisionConfig.width
    hidden: int = VisionConfig.hidden
    encoder_depth: int = VisionConfig.encoder_depth
    decoder_depth: int = VisionConfig.decoder_depth
    decoder_reach: int = VisionConfig.decoder_reach

    def config(self) -> VisionConfig:
        return VisionConfig(**{f.name: getattr(self, f.name) for f in fields(VisionConfig)})


@dataclass(kw_only=True)
class TokenizerConfig:
    """All tokenizers of a model. out: their folder. holdout: share of each source's episodes that is
    kept for measuring; a mix with the same source names and holdout keeps the same ones.

    Bins per axis of `action` and `proprio`, and of `progress`. merge: given vision joins merge x merge
    tokens into one position.
    """

    out: str = "???"
    seed: int = 0
    sources: dict[str, TokenizerSource] = field(default_factory=dict)
    text: TextRecipe = field(default_factory=TextRecipe)
    vision: VisionRecipe = field(default_factory=VisionRecipe)
    action_bins: int = 64
    proprio_bins: int = 128
    progress_bins: int = 32
    merge: int = 2
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
