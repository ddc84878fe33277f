"""The labeller's network: a window of frames in; the action and the state of its middle step out, with their errors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mmseq.embodiment import Embodiment
from mmseq.errors import CheckpointError, DataError
from mmseq.files import save_tensors

WEIGHTS, SETTINGS, CONTRACT = "labeller.safetensors", "labeller.json", "embodiment.json"
BATCH = 256  # windows of one pass
GROUPS = 8  # of channels, normalised together


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """What the network sees, and how large it is."""

    camera: str  # of the contract
    height: int  # of its frames, in pixels
    width: int
    around: tuple[int, ...] = (-2, -1, 0, 1, 2, 3)  # steps of the window, 0 is the one that is labelled
    channels: tuple[int, ...] = (32, 64, 96, 128)  # of each layer, which halves the picture
    hidden: int = 256


class LabellerNetwork(nn.Module):
    """Reads actions and states of one robot off one of its cameras.

    Vectors are predicted in the unit of their spread over the training episodes: `centre` and `spread` are float32
    (axes,), those of the action first. switches: axes that only ever had two values, such as a gripper's: labels have
    one of these.
    """

    centre: Tensor
    spread: Tensor

    def __init__(
        self,
        config: NetworkConfig,
        contract: Embodiment,
        centre: np.ndarray,
        spread: np.ndarray,
        switches: dict[int, tuple[float, float]],
    ):
        super().__init__()
        self.config, self.contract, self.switches = config, contract, switches
        self.action_axes = len(contract.vectors["action"].names)
        shrunk = lambda pixels: -(-pixels // 2 ** len(config.channels))
        flat = config.channels[-1] * shrunk(config.height) * shrunk(config.width)
        layers = convolutions(3 * len(config.around), config.channels)
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(flat, config.hidden), nn.ReLU())
        self.mean = nn.Linear(config.hidden, len(centre))
        self.error = nn.Linear(config.hidden, len(centre))  # its softplus is the squared error to expect
        self.register_buffer("centre", torch.as_tensor(centre, dtype=torch.float32))
        self.register_buffer("spread", torch.as_tensor(spread, dtype=torch.float32))

    def forward(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """windows: float (N, 3 x frames, H, W), about -0.5 to 0.5. Returns (N, axes) twice: means, and what gives the
        squared errors by softplus."""
        hidden = self.trunk(windows)
        return self.mean(hidden).float(), self.error(hidden).float()

    def window_indices(self, length: int) -> np.ndarray:
        """int64 (length, frames): the frames of the window of each step; at the ends the first and last repeat."""
        return np.clip(np.arange(length)[:, None] + np.array(self.config.around), 0, length - 1)

    @torch.no_grad()
    def label(self, frames: np.ndarray) -> Labels:
        """Label uint8 (steps, H, W, 3). Raises: DataError for frames of another size."""
        wanted = (self.config.height, self.config.width, 3)
        if frames.ndim != 4 or frames.shape[1:] != wanted or frames.dtype != np.uint8:
            raise DataError(
                f"the labeller reads uint8 frames {wanted}, got {frames.dtype} {frames.shape[1:]}",
                fix="import the video with --size, or train a labeller on frames of this size",
            )
        self.eval()
        pixels, at = torch.from_numpy(np.ascontiguousarray(frames)), torch.from_numpy(self.window_indices(len(frames)))
        found = [self(to_windows(pixels[part])) for part in at.split(BATCH)]
        mean = torch.cat([m for m, _ in found]) * self.spread + self.centre
        error = torch.cat([e for _, e in found])
        values = mean.numpy()
        set_switches(values, self.switches)
        return Labels(values, (nn.functional.softplus(error) + 1e-6).numpy(), self.action_axes)

    def save(self, directory: str | Path, report: dict[str, Any]) -> None:
        """Write the folder that `load` reads, with what was measured of it."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        save_tensors({k: v.contiguous() for k, v in self.state_dict().items()}, directory / WEIGHTS)
        self.contract.save(directory / CONTRACT)
        said = {"network": asdict(self.config), "switches": {str(k): v for k, v in self.switches.items()}}
        (directory / SETTINGS).write_text(json.dumps(said | {"report": report}, indent=2) + "\n")

    @classmethod
    def load(cls, directory: str | Path) -> LabellerNetwork:
        """Raises: CheckpointError for a folder that holds no labeller, or a damaged one."""
        directory = Path(directory)
        try:
            said = json.loads((directory / SETTINGS).read_text())
            weights = load_file(directory / WEIGHTS)
            network: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in said["network"].items()}
            switches = {int(k): (float(v[0]), float(v[1])) for k, v in said["switches"].items()}
            contract = Embodiment.load(directory / CONTRACT)
            vectors = weights["centre"].numpy(), weights["spread"].numpy()
            labeller = cls(NetworkConfig(**network), contract, *vectors, switches)
            labeller.load_state_dict(weights)
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{directory} holds no labeller: {error.filename} is missing", fix="train one with mmseq labeller train"
            ) from error
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"the labeller in {directory} is damaged: {error}") from error
        return labeller


@dataclass(frozen=True)
class Labels:
    """What was read of an episode. values: float32 (steps, axes), of the action and then of the state. squared_error:
    what to expect, in squares of each axis's spread: 0 is certain, 1 is a guess."""

    values: np.ndarray
    squared_error: np.ndarray
    action_axes: int

    @property
    def action(self) -> np.ndarray:
        return self.values[:, : self.action_axes].astype(np.float32)

    @property
    def state(self) -> np.ndarray:
        return self.values[:, self.action_axes :].astype(np.float32)

    @property
    def confidence(self) -> np.ndarray:
        """float32 (steps,), 0 to 1: the share of the axes' variance that the labels are expected to explain."""
        return np.clip(1 - self.squared_error.mean(1), 0, 1).astype(np.float32)


def set_switches(values: np.ndarray, switches: Mapping[int, tuple[float, float]]) -> None:
    """Give each switch among the axes of `values` (steps, axes) the nearer of its two values, in place."""
    for axis, (low, high) in switches.items():
        values[:, axis] = np.where(values[:, axis] > (low + high) / 2, high, low)


def convolutions(width: int, channels: Sequence[int]) -> list[nn.Module]:
    """Layers from `width` channels to each of `channels` in turn, each of which halves the picture."""
    layers: list[nn.Module] = []
    for before, after in pairwise((width, *channels)):
        layers += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(GROUPS, after), nn.ReLU()]
    return layers


def to_windows(pixels: Tensor) -> Tensor:
    """uint8 (N, frames, H, W, 3) as the network wants it: float (N, 3 x frames, H, W), -0.5 to 0.5."""
    x = pixels.permute(0, 1, 4, 2, 3).flatten(1, 2).contiguous(memory_format=torch.channels_last)
    return x.float() / 255 - 0.5
