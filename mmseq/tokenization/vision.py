"""Vision tokenizer: an image becomes a grid of codes and back; a video is tokenized frame by frame.

An autoencoder with finite scalar quantization (Mentzer et al. 2023, arXiv 2309.15505). Each token
is read from one patch and a margin around it, so that it depends on its own neighbourhood only and
changes only where the image does; the decoder reads each token with its neighbours. Neither knows
which place of the grid it is at, so a code means the same everywhere (but for the image's edge) and
a thing that moves by one place keeps its codes. Training is in `vision_training.py`.

Axes: N images, T tokens of one image (rows x columns of the grid), D width of the network,
C numbers per code (one per FSQ level), P numbers of one patch (side x side x RGB).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int32, Integer, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mmseq.errors import CheckpointError, ConfigError, DataError, EpisodeError, MMSeqError, did_you_mean
from mmseq.files import save_tensors

WEIGHTS_FILE = "vision.safetensors"
CONFIG_FILE = "vision.json"
FORMAT = 2
CHUNK_IMAGES = 64  # images per forward pass: small enough to stay near the cache


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """A vision tokenizer."""

    size: int = 64  # pixels along one side of an image
    patch: int = 8  # pixels along one side of the square that a token stands for
    margin: int = 2  # pixels around its patch that a token also sees
    levels: tuple[int, ...] = (8, 5, 5, 5)  # values per number of a code; their product is the size of the codebook
    width: int = 192  # of the residual layers
    hidden: int = 512  # width inside each residual layer
    encoder_depth: int = 1  # residual layers before the code
    decoder_depth: int = 3  # residual layers after it
    decoder_reach: int = 2  # a patch is drawn from the tokens up to this many places away

    def __post_init__(self):
        object.__setattr__(self, "levels", tuple(self.levels))
        lowest = {"size": 1, "patch": 1, "width": 1, "hidden": 1} | dict.fromkeys(
            ("margin", "encoder_depth", "decoder_depth", "decoder_reach"), 0
        )
        for name, low in lowest.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ConfigError(f"vision {name}={value!r}", fix=f"give a whole number of at least {low}")
        if self.size % self.patch:
            raise ConfigError(
                f"vision size={self.size} is not a multiple of patch={self.patch}",
                fix="choose one that divides the other",
            )
        if not self.levels or any(not isinstance(n, int) or isinstance(n, bool) or n < 2 for n in self.levels):
            raise ConfigError(
                f"vision levels={self.levels!r}", fix="give whole numbers of at least 2, such as (8, 5, 5, 5)"
            )
        if math.prod(self.levels) > 2**20:
            raise ConfigError(
                f"vision levels={self.levels} make {math.prod(self.levels)} codes", fix="stay below a million"
            )

    @property
    def side(self) -> int:
        """Tokens along one side of the grid."""
        return self.size // self.patch

    @property
    def codebook_size(self) -> int:
        return math.prod(self.levels)


def fit_frames(frames: np.ndarray, size: int) -> UInt8[np.ndarray, "N size size 3"]:
    """Frames (N, H, W, 3) cropped to their central square and resized to `size` (bilinear, antialiased).

    Raises: EpisodeError when they are not uint8 RGB.
    """
    if getattr(frames, "dtype", None) != np.uint8:
        found = getattr(frames, "dtype", type(frames).__name__)
        raise EpisodeError(f"frames are {found}, not uint8", fix="give RGB values of 0 to 255 as a uint8 numpy array")
    if frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape[1:3]:
        raise EpisodeError(
            f"frames have shape {frames.shape}, not (frames, height, width, 3)",
            fix="add a leading axis to a single image: frames[None]"
            if frames.ndim == 3
            else "give RGB with the channels last",
        )
    height, width = frames.shape[1:3]
    if height == width == size:
        return frames
    square = min(height, width)
    top, left = (height - square) // 2, (width - square) // 2
    out = np.empty((len(frames), size, size, 3), np.uint8)
    for i in range(0, len(frames), CHUNK_IMAGES):
        crop = np.ascontiguousarray(frames[i : i + CHUNK_IMAGES, top : top + square, left : left + square])
        x = torch.from_numpy(crop).permute(0, 3, 1, 2)
        x = F.interpolate(x, size=(size, size), mode="bilinear", antialias=True)
        out[i : i + CHUNK_IMAGES] = x.permute(0, 2, 3, 1).numpy()
    return out


class _Residual(nn.Module):
    """x + MLP(norm(x)) with a squared ReLU."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        nn.init.normal_(self.down.weight, std=0.2 / math.sqrt(hidden))
        nn.init.zeros_(self.down.bias)

    def forward(self, x_NTD: Tensor) -> Tensor:
        return x_NTD + self.down(F.relu(self.up(self.norm(x_NTD))).square())


class FSQAutoencoder(nn.Module):
    """Images (N, size, size, 3) in [-1, 1] to codes in [-1, 1] and back."""

    basis: Tensor
    steps: Tensor

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        c, numbers = config, len(config.levels)
        seen, around = c.patch + 2 * c.margin, 2 * c.decoder_reach + 1
        self.encoder_in = nn.Linear(seen * seen * 3, c.width)
        self.encoder = nn.Sequential(*(_Residual(c.width, c.hidden) for _ in range(c.encoder_depth)))
        self.encoder_norm = nn.LayerNorm(c.width)
        self.encoder_out = nn.Linear(c.width, numbers)
        self.decoder_in = nn.Linear(numbers * around * around, c.width)
        self.decoder = nn.Sequential(*(_Residual(c.width, c.hidden) for _ in range(c.decoder_depth)))
        self.decoder_norm = nn.LayerNorm(c.width)
        self.decoder_out = nn.Linear(c.width, c.patch**2 * 3)
        nn.init.normal_(self.encoder_out.weight, std=1 / math.sqrt(c.width))
        nn.init.zeros_(self.decoder_out.weight)
        nn.init.zeros_(self.decoder_out.bias)
        # constants of the code, not weights
        steps = torch.tensor(c.levels, dtype=torch.float32) - 1
        self.register_buffer("steps", steps, persistent=False)
        basis = np.cumprod((1, *c.levels[:-1]))
        self.register_buffer("basis", torch.from_numpy(basis.astype(np.int64)), persistent=False)

    def patches(self, x: Float[Tensor, "N size size 3"], margin: int = 0) -> Float[Tensor, "N T P"]:
        """Every patch of the grid with `margin` pixels around it; the image's edge is repeated outwards."""
        if margin:
            x = F.pad(x.permute(0, 3, 1, 2), (margin,) * 4, mode="replicate").permute(0, 2, 3, 1)
        seen = self.config.patch + 2 * margin
        windows = x.unfold(1, seen, self.config.patch).unfold(2, seen, self.config.patch)
        return windows.reshape(len(x), self.config.side**2, -1)

    def images(self, patches_NTP: Float[Tensor, "N T P"]) -> Float[Tensor, "N size size 3"]:
        """The inverse of `patches` with no margin."""
        c = self.config
        grid = patches_NTP.reshape(-1, c.side, c.side, 3, c.patch, c.patch)
        return grid.permute(0, 1, 4, 2, 5, 3).reshape(-1, c.size, c.size, 3)

    def encode(self, x: Float[Tensor, "N size size 3"]) -> Float[Tensor, "N T C"]:
        """Codes before rounding, each number within [-1, 1]."""
        x_NTD = self.encoder_in(self.patches(x, self.config.margin))
        return torch.tanh(self.encoder_out(self.encoder_norm(self.encoder(x_NTD))).float())

    def quantize(self, z_NTC: Float[Tensor, "N T C"]) -> Float[Tensor, "N T C"]:
        """The nearest code; gradients pass straight through."""
        rounded = self.unit(self.digits(z_NTC))
        return z_NTC + (rounded - z_NTC).detach()

    def digits(self, z: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch C"]:
        """[-1, 1] to whole numbers 0 .. level - 1."""
        return ((z + 1) / 2 * self.steps).round()

    def unit(self, digits: Tensor) -> Float[Tensor, "*batch C"]:
        """The inverse of `digits`."""
        return digits / self.steps * 2 - 1

    def to_index(self, z: Float[Tensor, "*batch C"]) -> Integer[Tensor, "*batch"]:
        return (self.digits(z).long() * self.basis).sum(-1)

    def from_index(self, index: Integer[Tensor, "*batch"]) -> Float[Tensor, "*batch C"]:
        levels = self.steps.long() + 1
        return self.unit((index.long()[..., None] // self.basis) % levels)

    def decode(self, z_NTC: Float[Tensor, "N T C"]) -> Float[Tensor, "N T P"]:
        """Patches in about [-1, 1]."""
        c, reach = self.config, self.config.decoder_reach
        around = 2 * reach + 1
        grid = F.pad(z_NTC.reshape(len(z_NTC), c.side, c.side, -1), (0, 0) + (reach,) * 4)
        near = grid.unfold(1, around, 1).unfold(2, around, 1).reshape(len(z_NTC), c.side**2, -1)
        x_NTD = self.decoder_in(near)
        return self.decoder_out(self.decoder_norm(self.decoder(x_NTD))).float()

    def forward(self, x: Float[Tensor, "N size size 3"]) -> Float[Tensor, "N T P"]:
        return self.decode(self.quantize(self.encode(x)))


class VisionTokenizer:
    """Images to codes and back.

    Inference is in float32 and row by row: the codes of an image are the same whatever it is
    batched with, at tokenizing and at serving. Across CPU models and devices a code that lies
    between two levels can differ.
    """

    kind, readout = "fsq", "medoid"

    def __init__(self, config: VisionConfig, network: FSQAutoencoder, *, device: str | torch.device = "cpu"):
        self.config = config
        self.device = torch.device(device)
        self._network = network.float().eval().requires_grad_(False).to(self.device)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.config.side, self.config.side

    @property
    def tokens_per_frame(self) -> int:
        return self.config.side**2

    @property
    def size(self) -> int:
        return self.config.codebook_size

    def fit(self, frames: np.ndarray) -> UInt8[np.ndarray, "N size size 3"]:
        """Frames of any size as this tokenizer sees and draws them. Raises: EpisodeError (`fit_frames`)."""
        return fit_frames(frames, self.config.size)

    def encode(self, frames: np.ndarray) -> Int32[np.ndarray, "N T"]:
        """uint8 RGB frames (N, H, W, 3) of any size (see `fit_frames`) to codes, row by row of the grid.

        Raises: EpisodeError when frames are not uint8 (N, H, W, 3).
        """
        frames = self.fit(frames)
        codes = np.empty((len(frames), self.tokens_per_frame), np.int32)
        with _exact(self.device):
            for part in _chunks(len(frames)):
                codes[part] = self._network.to_index(self._network.encode(self._load(frames[part]))).cpu().numpy()
        return codes

    def decode(self, codes: np.ndarray) -> UInt8[np.ndarray, "N size size 3"]:
        """Codes (N, T) of any integer type to RGB frames.

        Raises: DataError when codes are not whole numbers of shape (N, tokens_per_frame) within the codebook.
        """
        codes = np.asarray(codes)
        if not np.issubdtype(codes.dtype, np.integer):
            raise DataError(
                f"vision codes are {codes.dtype}, not whole numbers", fix="give the array that encode returned"
            )
        if codes.ndim != 2 or codes.shape[1] != self.tokens_per_frame:
            raise DataError(
                f"vision codes have shape {codes.shape}, not (frames, {self.tokens_per_frame})",
                fix=f"one frame is {self.grid[0]} x {self.grid[1]} tokens in one row",
            )
        bad = (codes < 0) | (codes >= self.size)
        if bad.any():
            frame, token = np.argwhere(bad)[0]
            raise DataError(
                f"vision code {codes[frame, token]} (frame {frame}, token {token}) is outside 0..{self.size - 1}",
                fix="subtract the start of the vision range from vocabulary ids first",
            )
        frames = np.empty((len(codes), self.config.size, self.config.size, 3), np.uint8)
        net = self._network
        with _exact(self.device):
            for part in _chunks(len(codes)):
                index = torch.from_numpy(codes[part].astype(np.int64)).to(self.device)
                x = net.images(net.decode(net.from_index(index)))
                frames[part] = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy()
        return frames

    def reconstruct(self, frames: np.ndarray) -> UInt8[np.ndarray, "N size size 3"]:
        """What is left of frames after the tokenizer: its ceiling for every generated image."""
        return self.decode(self.encode(frames))

    def code_features(self) -> Float[np.ndarray, "codes F"]:
        """What every code is made of: its FSQ coordinates in [-1, 1], and which value of each level it has.

        Rows of unit length; codes that differ in one coordinate share most of them.
        """
        coordinates = self._network.from_index(torch.arange(self.size, device=self.device))
        digits = self._network.digits(coordinates).long()
        values = [0.5 * F.one_hot(digits[:, i], n) for i, n in enumerate(self.config.levels)]
        return F.normalize(torch.cat([coordinates, *values], 1), dim=1).cpu().numpy()

    def save(self, directory: str | Path) -> dict[str, Any]:
        """Writes `vision.safetensors` and `vision.json`."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        save_tensors(self._weights(), directory / WEIGHTS_FILE)
        settings = {"format": FORMAT, "kind": "fsq", "fingerprint": self.fingerprint, "config": asdict(self.config)}
        (directory / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n")
        return {}

    @classmethod
    def load(
        cls, directory: str | Path, settings: Any = None, *, device: str | torch.device = "cpu"
    ) -> VisionTokenizer:
        """Raises: CheckpointError naming the file that is absent, damaged or does not fit the other."""
        config_path, weights_path = Path(directory) / CONFIG_FILE, Path(directory) / WEIGHTS_FILE
        train = "train one with `mmseq tokenizer train`, or copy the folder again"
        try:
            settings = json.loads(config_path.read_text())
            if isinstance(settings, dict) and settings.get("format") in range(1, FORMAT):
                raise CheckpointError(
                    f"{config_path} has format {settings['format']}, this version of mmseq reads format {FORMAT}",
                    fix="load it with the version of mmseq that wrote it, or train the tokenizers again",
                )
            if settings["format"] != FORMAT or settings["kind"] != "fsq":
                raise ValueError(
                    f"format {settings['format']!r}, kind {settings['kind']!r} is not known to this version"
                )
            config = _read_config(settings["config"])
            fingerprint = settings["fingerprint"]
        except CheckpointError:
            raise
        except (OSError, ValueError, KeyError, TypeError, MMSeqError) as error:
            raise CheckpointError(f"{config_path} is not a vision tokenizer: {_reason(error)}", fix=train) from error
        try:
            weights = load_file(weights_path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{weights_path} cannot be read: {_reason(error)}", fix=train) from error
        network = FSQAutoencoder(config)
        wrong = _mismatch(network.state_dict(), weights)
        if wrong:
            raise CheckpointError(f"{weights_path} does not fit {config_path}: {wrong}", fix=train)
        network.load_state_dict(weights)
        tokenizer = cls(config, network, device=device)
        if tokenizer.fingerprint != fingerprint:
            raise CheckpointError(
                f"{weights_path} is damaged or was exchanged: its fingerprint is {tokenizer.fingerprint}, "
                f"{config_path} says {fingerprint}",
                fix=train,
            )
        return tokenizer

    @property
    def fingerprint(self) -> str:
        """16 hex digits of the settings and every weight."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps(asdict(self.config), sort_keys=True).encode())
        for name, weight in sorted(self._weights().items()):
            digest.update(name.encode())
            digest.update(weight.numpy().tobytes())
        return digest.hexdigest()[:16]

    def _weights(self) -> dict[str, Tensor]:
        return {name: w.detach().cpu().contiguous() for name, w in self._network.state_dict().items()}

    def _load(self, frames: np.ndarray) -> Tensor:
        return to_signed(torch.from_numpy(np.require(frames, requirements=["C", "W"])).to(self.device))

    def __repr__(self) -> str:
        return f"VisionTokenizer({self.config}, fingerprint={self.fingerprint})"


def to_signed(frames: UInt8[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """0 .. 255 to [-1, 1]."""
    return frames.float() / 127.5 - 1


def _chunks(n: int) -> Iterator[slice]:
    return (slice(i, i + CHUNK_IMAGES) for i in range(0, n, CHUNK_IMAGES))


@contextmanager
def _exact(device: torch.device):
    """Plain float32 whatever the caller has set: reduced precision would move codes across levels."""
    precision = torch.get_float32_matmul_precision()
    if precision != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.inference_mode(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        if precision != "highest":
            torch.set_float32_matmul_precision(precision)


def _read_config(values: dict) -> VisionConfig:
    known = [f.name for f in fields(VisionConfig)]
    for name in values:
        if name not in known:
            raise ConfigError(f"unknown setting {name!r}: {did_you_mean(name, known)}")
    missing = [name for name in known if name not in values]
    if missing:
        raise ConfigError(f"settings are missing: {', '.join(missing)}")
    return VisionConfig(**{**values, "levels": tuple(values["levels"])})


def _reason(error: Exception) -> str:
    return f"no entry {error}" if isinstance(error, KeyError) else str(error)


def _mismatch(wanted: dict[str, Tensor], found: dict[str, Tensor]) -> str:
    """The first difference in names, shapes or values that no trained network has; empty when there is none."""
    if wanted.keys() != found.keys():
        return f"weights {sorted(wanted.keys() ^ found.keys())} stand on one side only"
    for name, weight in found.items():
        if weight.shape != wanted[name].shape:
            return f"{name} has shape {tuple(weight.shape)}, not {tuple(wanted[name].shape)}"
        if weight.dtype != torch.float32:
            return f"{name} is {weight.dtype}, not float32"
        if not bool(torch.isfinite(weight).all()):
            return f"{name} holds numbers that are not finite"
    return ""
