"""Behaviour cloning with a small convolutional network: the plain peer that everybody knows, without video.

A picture, the state and the words of the task (a bag of hashed words) give the next `CHUNK` actions, by squared error.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mmseq.data.sources import open_source
from mmseq.episode import IMAGE_PREFIX, Episode
from mmseq.evaluation.lfv.manifest import CHUNK, Config
from mmseq.evaluation.lfv.record import Data
from mmseq.evaluation.lockstep import Controller, Seen
from mmseq.labelling.network import convolutions, to_windows
from mmseq.reading import AS_IT_IS

CHANNELS = (32, 64, 96, 128)  # of the layers of its eyes
WORDS = 512  # buckets
BATCH, LEARNING_RATE, WEIGHT_DECAY = 128, 1e-3, 0.05
STEPS = 3  # of cloning for one of our model's: it is so much smaller


class Network(nn.Module):
    """Frames (N, 3, H, W), states (N, S) in units of their spread, words (N, WORDS) to actions (N, CHUNK, A)."""

    def __init__(self, state: int, action: int, width: int = 256):
        super().__init__()
        self.eyes = nn.Sequential(*convolutions(3, CHANNELS), nn.Flatten(), nn.LazyLinear(width))
        self.words, self.state = nn.Linear(WORDS, width), nn.Linear(state, width)
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CHUNK * action))

    def forward(self, frames: Tensor, states: Tensor, words: Tensor) -> Tensor:
        told = self.words(words)
        seen = self.eyes(frames) * (1 + told) + told + self.state(states)  # FiLM: what is asked for decides what counts
        return self.head(seen).float().unflatten(1, (CHUNK, -1))


class BehaviourCloning:
    """An entry of `mmseq.methods`."""

    def __init__(self, config: Config, say: Callable[[str], None]):
        self.config, self.say = config, say

    def train(self, data: Data, out: Path, seed: int) -> Controller:
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        camera = f"{IMAGE_PREFIX}{data.contract.cameras[0].name}"
        source = open_source(data.robot, AS_IT_IS)
        frames, states, actions, words = (torch.cat(part) for part in zip(*(_samples(e, camera) for e in source)))
        centre, spread = states.mean(0), states.std(0) + 1e-6
        network = Network(states.shape[1], actions.shape[2])
        network(_pixels(frames[:2]), states[:2], words[:2].float())  # the lazy layer
        optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        steps = STEPS * self.config.steps
        for step in range(steps):
            chosen = torch.randint(0, len(frames), (BATCH,), generator=generator)
            seen = _pixels(frames[chosen])
            dx, dy = (int(d) for d in torch.randint(-2, 3, (2,), generator=generator))
            seen = torch.roll(seen, (dy, dx), (2, 3))
            with torch.autocast("cpu", torch.bfloat16):
                found = network(seen, (states[chosen] - centre) / spread, words[chosen].float())
            loss = F.mse_loss(found, actions[chosen])
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1, (step + 1) / 50) * max(0.02, 1 - step / steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return _Cloned(network.eval(), centre, spread, camera, self.config.execute)


class _Cloned:
    """What it learned, driving."""

    def __init__(
        self, network: Network, centre: Tensor, spread: Tensor, camera: str, execute: int, *, blank_images: bool = False
    ):
        self._all = network, centre, spread, camera, execute
        self._blank = blank_images

    @torch.no_grad()
    def act(self, seen: Sequence[Seen]) -> list[np.ndarray]:
        network, centre, spread, camera, execute = self._all
        frames = torch.from_numpy(np.stack([one.observation[camera] for one in seen]))
        if self._blank:
            frames = torch.full_like(frames, 128)
        states = torch.from_numpy(np.stack([one.observation["proprio"] for one in seen]))
        words = torch.stack([_words(one.text) for one in seen]).float()
        found = network(_pixels(frames), (states - centre) / spread, words)
        return list(found.clamp(-1, 1)[:, :execute].numpy())

    def blanked(self) -> _Cloned:
        """The same policy, which does not see."""
        return _Cloned(*self._all, blank_images=True)


def _samples(episode: Episode, camera: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Frames, states, the next actions and words of each step; every phrasing is used in turn."""
    length = len(episode)
    ahead = np.minimum(np.arange(length)[:, None] + np.arange(CHUNK), length - 1)
    told = torch.stack([_words(episode.texts[step % len(episode.texts)]) for step in range(length)])
    arrays = (episode[camera], episode["proprio"], episode["action"][ahead])
    return *(torch.from_numpy(np.ascontiguousarray(a)) for a in arrays), told  # type: ignore[return-value]


def _words(text: str) -> Tensor:
    """bool (WORDS,): which buckets the words of a text fall into."""
    bag = torch.zeros(WORDS, dtype=torch.bool)
    bag[[zlib.crc32(word.encode()) % WORDS for word in re.findall(r"\w+", text.lower())]] = True
    return bag


def _pixels(frames: Tensor) -> Tensor:
    """uint8 (N, H, W, 3) as (N, 3, H, W), -0.5 to 0.5: windows of one frame."""
    return to_windows(frames[:, None])
