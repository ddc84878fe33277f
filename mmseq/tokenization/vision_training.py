"""Trains a vision tokenizer: frames in, `VisionTokenizer` out.

Every matrix inside the network is trained with Muon, the rest with AdamW. Sources (robot, human
video, ...) share each batch by weight, whatever their sizes. A pixel counts more the further it is
from its usual range at its place: a static background is learned from any frame, while a small
object is a few pixels in a few frames, and the policy needs it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from mmseq.errors import ConfigError, DataError, DependencyError
from mmseq.tokenization.pictures import psnr_db
from mmseq.tokenization.vision import FSQAutoencoder, VisionConfig, VisionTokenizer, fit_frames, to_signed

WARM_UP_STEPS = 30
FLOOR = 0.02  # of the learning rate, at the end
MUON_RATE = 0.04
ADAMW_RATE = 4e-3
DEVIATIONS = 6.0  # standard deviations from the mean of its place from which on a pixel's extra weight grows no further
DEVIATION_FLOOR = 0.05  # of [-1, 1], added to the standard deviation: noise on a static place is no foreground
SURVEY_FRAMES = 512  # per source, to estimate a mean or median image

Frames = np.ndarray  # uint8 (N, H, W, 3), checked by `fit_frames`
Augmentation = Callable[[np.ndarray, np.random.Generator], np.ndarray]
Progress = Callable[[int, int, float], None]


def train_vision(
    frames: Frames | Sequence[Frames] | Mapping[str, Frames],
    *,
    config: VisionConfig | None = None,
    steps: int = 400,
    batch_images: int = 32,
    max_seconds: float | int | None = None,
    seed: int = 0,
    threads: int | None = None,
    weights: Sequence[float | int] | None = None,
    foreground: float | int = 4.0,
    augment: Sequence[Augmentation] = (),
    device: str = "cpu",
    on_progress: Progress | None = None,
) -> VisionTokenizer:
    """A tokenizer trained on uint8 RGB frames (N, H, W, 3), from one source or several.

    weights: the share of each source in a batch (default: equal). foreground: extra weight of a
    pixel per standard deviation from its mean (0: all pixels alike). augment: what changes the frames of a batch, in
    this order. max_seconds: stops there, with
    the steps so far; a finished learning-rate schedule is worth more than a cut one, so prefer fewer
    steps. Without it the same seed gives the same weights on the same machine with the same threads.
    on_progress(step, total, psnr): psnr in dB of the step's batch; total is the number of steps, and
    the last call has step < total when time ran out.
    Raises: DataError without frames, EpisodeError for frames that are not uint8 RGB, ConfigError,
    DependencyError when torch is older than 2.9.
    """
    config = config or VisionConfig()
    sources = fitted_sources(frames, config.size)
    shares = _shares(weights, list(sources))
    if not (math.isfinite(foreground) and foreground >= 0):
        raise ConfigError(f"foreground={foreground}", fix="give a number of at least 0")
    if steps < 1 or batch_images < 1:
        raise ConfigError(f"steps={steps}, batch_images={batch_images}", fix="give at least 1 of each")
    if not hasattr(torch.optim, "Muon"):
        raise DependencyError(f"torch {torch.__version__} has no Muon optimizer", fix="install torch 2.9 or newer")
    with _threads(threads):
        network = _initial(config, seed).to(device)
        stacks = [_Source(f, device, foreground, augment) for f in sources.values()]
        with torch.no_grad():
            mean = torch.stack([float(share) * s.mean for share, s in zip(shares, stacks, strict=True)]).sum(0)
            network.decoder_out.bias.copy_(network.patches(mean[None])[0].mean(0))
        optimizers = _optimizers(network)
        draw = np.random.default_rng(seed)
        started = time.monotonic()
        for step in range(steps):
            rate = _rate(step, steps)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * rate
            x, weight = _batch(stacks, draw.multinomial(batch_images, shares), draw)
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=_fast_bfloat16(device)):
                drawn = network(x)
            error = (drawn - network.patches(x)).square()
            loss = (error * network.patches(weight)).mean()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            mse = float(error.detach().mean())
            if not math.isfinite(mse):
                raise ConfigError(f"vision training diverged at step {step}", fix="train with a larger batch_images")
            late = max_seconds is not None and time.monotonic() - started >= max_seconds
            if on_progress is not None:
                on_progress(step + 1, steps, float(psnr_db(mse * 127.5**2)))
            if late:
                break
    return VisionTokenizer(config, network, device=device)


class _Source:
    """Frames of one source, with what its foreground is judged by."""

    def __init__(
        self,
        frames: UInt8[np.ndarray, "N size size 3"],
        device: str,
        foreground: float | int,
        augment: Sequence[Augmentation],
    ):
        self.frames, self.device, self.foreground, self.augment = frames, device, foreground, augment
        seen = to_signed(torch.from_numpy(survey(frames)).to(device))
        self.mean = seen.mean(0)
        self.deviation = (seen - self.mean).square().mean((0, -1)).sqrt()[..., None] + DEVIATION_FLOOR
        self.scale = 1.0
        self.scale = 1 / float(self.weight(seen).mean())

    def weight(self, x: Float[Tensor, "N size size 3"]) -> Float[Tensor, "N size size 3"]:
        """The weight of each pixel, one on average."""
        off = (x - self.mean).square().mean(-1, keepdim=True).sqrt() / self.deviation
        return ((1 + self.foreground * off.clamp(max=DEVIATIONS)) * self.scale).expand_as(x)

    def draw(self, n: int, rng: np.random.Generator) -> Float[Tensor, "N size size 3"]:
        frames = self.frames[rng.integers(len(self.frames), size=n)]
        for change in self.augment:
            changed = change(frames, rng)
            if changed.shape != frames.shape or changed.dtype != np.uint8:
                raise ConfigError(
                    f"the augmentation {change} gives {changed.dtype} {changed.shape}, not {frames.shape}"
                )
            frames = changed
        return to_signed(torch.from_numpy(frames).to(self.device))


def _batch(sources: list[_Source], counts: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    drawn = [(s, s.draw(int(n), rng)) for s, n in zip(sources, counts, strict=True)]
    return torch.cat([x for _, x in drawn]), torch.cat([s.weight(x) for s, x in drawn])


def fitted_sources(frames: Frames | Sequence[Frames] | Mapping[str, Frames], size: int) -> dict[str, np.ndarray]:
    if isinstance(frames, np.ndarray):
        frames = [frames]
    named = dict(frames) if isinstance(frames, Mapping) else {f"source {i}": f for i, f in enumerate(frames)}
    if not named:
        raise DataError("there are no frames", fix="give at least one array (frames, height, width, 3)")
    fitted = {name: fit_frames(f, size) for name, f in named.items()}
    for name, f in fitted.items():
        if len(f) == 0:
            raise DataError(f"{name} has no frames", fix="leave an empty source out")
    return fitted


def _shares(weights: Sequence[float | int] | None, names: list[str]) -> np.ndarray:
    shares = np.ones(len(names)) if weights is None else np.asarray(weights, np.float64)
    if shares.shape != (len(names),) or not np.isfinite(shares).all() or (shares < 0).any() or shares.sum() <= 0:
        raise ConfigError(f"weights={weights} for the sources {names}", fix="give one number of at least 0 per source")
    return shares / shares.sum()


def survey(frames: np.ndarray) -> np.ndarray:
    """At most `SURVEY_FRAMES` frames, evenly spaced."""
    return frames[np.unique(np.linspace(0, len(frames) - 1, min(len(frames), SURVEY_FRAMES)).astype(int))]


def _initial(config: VisionConfig, seed: int) -> FSQAutoencoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FSQAutoencoder(config)


def _optimizers(network: FSQAutoencoder) -> list[torch.optim.Optimizer]:
    # Muon is for maps between hidden spaces; the maps to the code and to pixels, and everything
    # that is not a matrix, go to AdamW
    outer = (network.encoder_out, network.decoder_out)
    inner = [m.weight for m in network.modules() if isinstance(m, nn.Linear) and not any(m is o for o in outer)]
    rest = [p for p in network.parameters() if not any(p is q for q in inner)]
    return [
        torch.optim.Muon([{"params": inner, "peak": MUON_RATE}], lr=MUON_RATE, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW([{"params": rest, "peak": ADAMW_RATE}], lr=ADAMW_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def _rate(step: int, steps: int) -> float:
    """Warm-up, then a cosine; a share of the peak."""
    warm = min(1.0, (step + 1) / min(WARM_UP_STEPS, max(1, steps // 5)))
    return warm * (FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * step / steps)) / 2)


def _fast_bfloat16(device: str) -> bool:
    if torch.device(device).type != "cpu":
        return True
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(supported and supported())


@contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
