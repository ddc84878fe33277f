"""What a tokenizer is: the protocol that all of them keep, and where those of plug-ins are found.

A tokenizer owns one range of the vocabulary: codes 0 .. size - 1. What it encodes depends on the kind of the streams
that use the range:

=========  ==========================================================  ============================================
kind       encode                                                      decode
=========  ==========================================================  ============================================
text       str -> (n,), its end token last                             (n,) -> str
vision     uint8 (N, H, W, 3) -> (N, tokens)                           (N, tokens) -> uint8 (N, height, width, 3)
vector     float (steps, axes), `Axes` -> (steps, axes)                (steps, axes), `Axes` -> float32 (steps, axes)
scalar     float in 0..1 -> int                                        float -> float in 0..1
=========  ==========================================================  ============================================

Codes of a vision tokenizer also have a `grid` (rows, columns), and those of text an `end`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mmseq.plugins import find

READOUTS = ("likeliest", "median", "medoid", "mean")


@runtime_checkable
class Tokenizer(Protocol):
    """One range of the vocabulary.

    kind: the name that it is registered under. size: how many codes it has. readout: one of `READOUTS`, what the model
    answers with at temperature 0: the likeliest code; the median, where codes have an order; the medoid, where
    `code_features` say which are alike; the mean, between codes.
    fingerprint: changes with anything that changes a code's meaning.
    """

    @property
    def kind(self) -> str: ...

    @property
    def size(self) -> int: ...

    @property
    def readout(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def encode(self) -> Callable[..., Any]: ...

    @property
    def decode(self) -> Callable[..., Any]: ...

    def code_features(self) -> np.ndarray | None:
        """float32 (size, F): of each code a row of unit length, alike for codes that mean nearly the same; or None."""
        ...

    def save(self, directory: str | Path) -> dict[str, Any]:
        """Write what it needs to the folder of all tokenizers; returns its settings, which JSON can hold."""
        ...

    @classmethod
    def load(cls, directory: str | Path, settings: dict[str, Any], /, *, device: Any = "cpu") -> Tokenizer:
        """Raises: CheckpointError for a folder or settings that are not complete."""
        ...


@runtime_checkable
class Encoder(Protocol):
    """What gives the model features of *given* pictures in place of codes; what is predicted stays codes.

    kind: the name that it is registered under. positions: of a frame, each a vector of `features` numbers; both are
    known before any data is read. fingerprint: changes with anything that changes a feature.
    """

    kind: str
    positions: int
    features: int

    @property
    def fingerprint(self) -> str: ...

    def encode(self, frames: np.ndarray) -> np.ndarray:
        """uint8 (N, H, W, 3) of any size -> float32 (N, positions, features)."""
        ...

    def save(self, directory: str | Path) -> dict[str, Any]: ...

    @classmethod
    def load(cls, directory: str | Path, settings: dict[str, Any], /, *, device: Any = "cpu") -> Encoder: ...


def tokenizer_class(kind: str) -> type[Tokenizer]:
    """The class that reads a tokenizer of a kind. Raises: ConfigError naming the kinds that are installed."""
    return find("tokenizers", kind)
