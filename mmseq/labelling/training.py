"""Training a labeller on a robot's own episodes.

mmseq labeller train sources=[shards/robot,shards/play] out=runs/labeller
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmseq.data.mixture import held_out
from mmseq.data.sources import embodiments_of, open_source
from mmseq.embodiment import Embodiment
from mmseq.episode import IMAGE_PREFIX, Episode
from mmseq.errors import ConfigError, DataError, did_you_mean
from mmseq.labelling.network import LabellerNetwork, NetworkConfig, to_windows
from mmseq.reading import Reading
from mmseq.streams import OWN_VECTORS

STATE_WEIGHT = 0.3  # of the state's loss beside the action's
ERROR_WEIGHT = 0.05  # of learning how wrong the labels are, beside learning the labels
SWITCH_SHARE = 0.99  # of an axis's values that are one of two: then it is a switch
MOST_BYTES = 12 << 30  # of frames in memory
PREDICTED = tuple(reversed(OWN_VECTORS))  # the action first


@dataclass(frozen=True, kw_only=True)
class LabellerConfig(Reading):
    """How a labeller is trained, and how its sources are read."""

    sources: list[str] = field(default_factory=list)  # the robot's episodes: demonstrations, and play above all
    out: str = "???"  # its folder
    camera: str | None = None  # that it sees; default: the first of the contract
    around: list[int] = field(default_factory=lambda: [-2, -1, 0, 1, 2, 3])  # steps of a window, 0 is labelled
    steps: int = 2500  # of training
    batch: int = 128  # windows of a step
    learning_rate: float = 1e-3  # peak
    weight_decay: float = 0.05  # of AdamW
    shift_pixels: int = 2  # windows are moved by up to so many pixels
    colour: float = 1.0  # how far colours are changed; 0 leaves them
    holdout: float = 0.05  # share of episodes that it is measured on
    seed: int = 0  # of weights, batches and changes

    def check(self) -> None:
        """Raises: ConfigError naming the field."""
        if not self.sources:
            raise ConfigError("sources is empty", fix="name episodes of the robot: demonstrations, play")
        for name in ("steps", "batch", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}", fix="give more than 0")
        if 0 not in self.around or len(set(self.around)) < len(self.around) or len(self.around) > 16:
            raise ConfigError(f"around is {self.around}", fix="name up to 16 different steps, 0 among them")
        if not 0 <= self.holdout < 1 or self.shift_pixels < 0 or self.colour < 0:
            raise ConfigError(
                f"holdout is {self.holdout}, shift_pixels {self.shift_pixels}, colour {self.colour}",
                fix="a holdout from 0 to below 1, the others 0 or more",
            )


def train_labeller(config: LabellerConfig, on_progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Train, measure and save a labeller; returns the report that is saved with it.

    Raises: ConfigError or DataError before anything is trained, when the sources cannot teach it.
    """
    config.check()
    contract, camera, episodes = _gather(config)
    judged = [e for e in episodes if held_out(e.id, config.holdout)]
    taught = [e for e in episodes if not held_out(e.id, config.holdout)]
    if not taught:
        raise DataError(f"all {len(episodes)} episodes are held out", fix="lower holdout or add episodes")
    labeller = teach(taught, camera, contract, config, on_progress)
    report = {"taught": len(taught), "steps": int(sum(map(len, taught))), "sources": list(config.sources)}
    report |= {"held_out": measure(labeller, judged)} if judged else {}
    labeller.save(config.out, report)
    return report


def teach(
    taught: Sequence[Episode],
    camera: str,
    contract: Embodiment,
    config: LabellerConfig,
    on_progress: Callable[[int, int], None] | None = None,
) -> LabellerNetwork:
    """A labeller of one camera of one robot, taught by all of some episodes that have frames of it and the vectors of
    `PREDICTED`; their frames are moved to one place.

    Raises: DataError when they cannot teach it; EpisodeError for a value that is outside the contract's limits.
    """
    generator = torch.Generator().manual_seed(config.seed)
    torch.manual_seed(config.seed)
    frames, targets, switches = _stack(taught, camera, contract)
    centre, spread = targets.mean(0), targets.std(0) + 1e-6
    spread[np.ptp(targets, axis=0) == 0] = 1  # what never moves: rounding would be all that there is to learn
    height, width = frames.shape[1:3]
    network = NetworkConfig(camera=camera, height=height, width=width, around=tuple(config.around))
    labeller = LabellerNetwork(network, contract, centre, spread, switches)
    begins = np.cumsum([0, *map(len, taught[:-1])])
    windows = torch.from_numpy(
        np.concatenate([start + labeller.window_indices(len(e)) for start, e in zip(begins, taught)])
    )
    wanted = torch.from_numpy((targets - centre) / spread).float()
    weights = torch.ones(wanted.shape[1])
    weights[labeller.action_axes :] = STATE_WEIGHT
    pixels = torch.from_numpy(frames)
    optimizer = torch.optim.AdamW(labeller.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    warm = min(50, config.steps // 10)
    at = lambda step: min(1.0, (step + 1) / (warm + 1)) * max(0.02, 1 - step / config.steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, at)
    for step in range(config.steps):
        chosen = torch.randint(0, len(windows), (config.batch,), generator=generator)
        seen = _change(pixels[windows[chosen]], config, generator)
        with torch.autocast("cpu", torch.bfloat16):
            mean, error = labeller(seen)
        squared = (mean - wanted[chosen]) ** 2
        expected = F.softplus(error) + 1e-6  # never told by the labels' own loss, so that these stay means
        surprise = (squared.detach() / expected + expected.log()).mean()
        loss = (weights * squared).mean() + ERROR_WEIGHT * surprise
        if not torch.isfinite(loss):
            raise DataError(f"the labeller's loss is {loss.item()} at step {step}", fix="lower learning_rate")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if on_progress is not None:
            on_progress(step + 1, config.steps)
    return labeller


def measure(labeller: LabellerNetwork, episodes: Sequence[Episode]) -> dict[str, Any]:
    """How good labels are on episodes whose truth is known: R2 of each axis, or for a switch the share that is right.

    `shuffled` is the same for labels of another step: what guessing the distribution gives. An axis that never moves in
    these episodes, and is no switch, has no R2 and is left out.
    """
    camera = f"{IMAGE_PREFIX}{labeller.config.camera}"
    truth = np.concatenate([np.concatenate([e[name] for name in PREDICTED], 1) for e in episodes]).astype(np.float64)
    found = np.concatenate([labeller.label(e[camera]).values for e in episodes])
    shuffled = found[np.random.default_rng(0).permutation(len(found))]
    names = [f"{stream}.{axis}" for stream in PREDICTED for axis in labeller.contract.vectors[stream].names]

    def score(labels: np.ndarray, axis: int) -> float:
        if axis in labeller.switches:
            middle = sum(labeller.switches[axis]) / 2
            return float(np.mean((labels[:, axis] > middle) == (truth[:, axis] > middle)))
        residue = ((labels[:, axis] - truth[:, axis]) ** 2).sum()
        return float(1 - residue / ((truth[:, axis] - truth[:, axis].mean()) ** 2).sum())

    told = [axis for axis in range(len(names)) if axis in labeller.switches or np.ptp(truth[:, axis]) > 0]
    return {
        "episodes": len(episodes),
        "switches": [names[axis] for axis in labeller.switches],
        "labels": {names[axis]: score(found, axis) for axis in told},
        "shuffled": {names[axis]: score(shuffled, axis) for axis in told},
    }


def _gather(config: LabellerConfig) -> tuple[Embodiment, str, list[Episode]]:
    """The robot that all sources are of, the camera, and their episodes."""
    sources, contracts = [], {}
    for path in config.sources:  # all by the contract of the first: its axes, limits and rate are the labeller's
        sources.append(open_source(path, config, embodiments=contracts))
        contracts = {c.name: c for c in embodiments_of(sources[-1])} | contracts
    if len(contracts) != 1:
        raise DataError(
            f"a labeller is of one robot, the sources are of {sorted(contracts) or 'none'}", fix="name one robot's"
        )
    (contract,) = contracts.values()
    missing = [name for name in PREDICTED if name not in contract.vectors]
    if missing:
        raise DataError(f"{contract.name!r} has no {' and no '.join(missing)} to be labelled", fix="name another robot")
    cameras = [camera.name for camera in contract.cameras]
    if not cameras or config.camera not in (None, *cameras):
        raise ConfigError(
            f"camera: {contract.name!r} has no {config.camera!r}: {did_you_mean(str(config.camera), cameras)}"
        )
    camera = config.camera or cameras[0]
    episodes = [source[i] for source in sources for i in range(len(source))]
    episodes = [e for e in episodes if e.embodiment == contract.name and camera in e.cameras]
    episodes = [e for e in episodes if all(name in e for name in PREDICTED)]
    if not episodes:
        raise DataError(
            f"no episode of {', '.join(config.sources)} shows {contract.name!r} to {camera!r}, and what it did"
        )
    return contract, camera, episodes


def _stack(
    episodes: Sequence[Episode], camera: str, contract: Embodiment
) -> tuple[np.ndarray, np.ndarray, dict[int, tuple[float, float]]]:
    """Frames uint8 (steps, H, W, 3), actions and states float32 (steps, axes), and the axes that are switches.

    Raises: DataError for more frames than `MOST_BYTES`, or of several sizes; EpisodeError for a value that is not
    finite or outside the contract's limits.
    """
    name = f"{IMAGE_PREFIX}{camera}"
    first = episodes[0][name]
    steps = sum(map(len, episodes))
    if steps * first[0].nbytes > MOST_BYTES:
        raise DataError(
            f"{steps:,} frames of {first.shape[1:]} do not fit into {MOST_BYTES >> 30} GiB of memory",
            fix="name fewer episodes, or import them with a smaller --size",
        )
    frames, at = np.empty((steps, *first.shape[1:]), np.uint8), 0
    for episode in episodes:
        own = episode[name]
        if own.shape[1:] != first.shape[1:]:
            raise DataError(
                f"episode {episode.id!r} has frames of {own.shape[1:]}, others of {first.shape[1:]}",
                fix="import them with the same --size",
            )
        frames[at : at + len(own)] = own
        episode.streams[name] = replace(episode.streams[name], values=frames[at : at + len(own)])  # one copy is enough
        at += len(own)
    check = lambda e, stream: contract.vectors[stream].check(e[stream], what=stream, where=f"episode {e.id!r}")
    targets = np.concatenate([np.concatenate([check(e, stream) for stream in PREDICTED], 1) for e in episodes])
    return frames, targets, switches_of(targets[:, : episodes[0]["action"].shape[1]])


def switches_of(actions: np.ndarray) -> dict[int, tuple[float, float]]:
    """The axes of actions (steps, axes) that only ever had two values, such as a gripper's, with these."""
    switches = {}
    for axis, values in enumerate(actions.T):
        low, high = float(values.min()), float(values.max())
        shares = [float((apart <= 0.02 * (high - low)).mean()) for apart in (values - low, high - values)]
        if high > low and sum(shares) >= SWITCH_SHARE and min(shares) >= 1 - SWITCH_SHARE:  # not one that hardly moves
            switches[axis] = (low, high)
    return switches


def _change(windows: Tensor, config: LabellerConfig, generator: torch.Generator) -> Tensor:
    """One small shift of all windows, uint8 (N, frames, H, W, 3), and one small change of colours of each, as input.

    Large changes teach more slowly (docs/log.md).
    """
    most = config.shift_pixels
    dy, dx = (int(d) for d in torch.randint(-most, most + 1, (2,), generator=generator))
    height, width = windows.shape[2:4]
    rows = (torch.arange(height) + dy).clamp(0, height - 1)
    columns = (torch.arange(width) + dx).clamp(0, width - 1)
    x = to_windows(windows[:, :, rows][:, :, :, columns])
    if not config.colour:
        return x
    count, frames = len(x), x.shape[1] // 3
    random = lambda *shape: torch.randn(*shape, generator=generator)
    bright = 0.8 + 0.4 * torch.rand(count, 1, 1, generator=generator)
    mix = torch.eye(3) * (1 + config.colour * (bright - 1)) + 0.08 * config.colour * random(count, 3, 3)
    moved = torch.einsum("nij,ntjhw->ntihw", mix, x.unflatten(1, (frames, 3)))
    moved = moved + 0.08 * config.colour * random(count, 1, 3, 1, 1)
    return moved.flatten(1, 2).contiguous(memory_format=torch.channels_last)
