"""Data to measure with, made from nothing: a toy robot and videos as tokens of the demo's mix, and as LeRobot v3."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import mmseq.recipes
from mmseq.data.tokens import write_token_shards
from mmseq.embodiment import Embodiment
from mmseq.testing import tiny
from mmseq.tokenization.bundle import Tokenizers
from mmseq.tokenization.continuous import BinTokenizer, ScalarTokenizer
from mmseq.tokenization.text import TextTokenizer
from mmseq.tokenization.vision import FSQAutoencoder, VisionConfig, VisionTokenizer

SIZE = 64  # pixels: 8 x 8 tokens, as in the demo
STEPS = 48


def demo_tokenizers(text: TextTokenizer, robots: Iterable[Embodiment], *, merge: int = 2) -> Tokenizers:
    """As large as the demo's, untrained: how fast codes are read does not depend on what they mean."""
    config = VisionConfig(size=SIZE, patch=8, levels=(8, 8, 6, 5), width=32, hidden=32)
    return Tokenizers(
        {
            "text": text,
            "vision": VisionTokenizer(config, FSQAutoencoder(config)),
            "action": BinTokenizer(33),
            "proprio": BinTokenizer(128),
            "progress": ScalarTokenizer(16),
        },
        embodiments=tuple(robots),
        merge=merge,
    )


def make_tokens(directory: Path, *, vocabulary: int, episodes: int = 12) -> Tokenizers:
    """`tokenizers`, `tokens` and `mix.yaml` in `directory`. vocabulary: of the text, beside 1,920 vision codes."""
    robot = tiny.embodiment(size=SIZE)
    tokenizers = demo_tokenizers(word_tokenizer(vocabulary), [robot])
    tokenizers.save(directory / "tokenizers")
    robots = (tiny.episode(i, STEPS, robot, SIZE) for i in range(episodes))
    videos = (tiny.video(i, STEPS, SIZE) for i in range(episodes))
    for name, source in (("robot", robots), ("human", videos)):
        write_token_shards(source, directory / "tokens" / name, tokenizers, name=name)
    shutil.copy(Path(mmseq.recipes.__file__).with_name("demo_mix.yaml"), directory / "mix.yaml")
    return tokenizers


def word_tokenizer(size: int) -> TextTokenizer:
    """A tokenizer of `size` words, as many as a language model's; nearly all of them stand only for its size."""
    words = sorted({word for text in [*tiny.TEXTS, "now reach for it, then move it"] for word in text.split()})
    words = ["<unk>", "<|endoftext|>", *words]
    words += [f"word{i}" for i in range(size - len(words))]
    model = {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": "<unk>"}
    parts = {"version": "1.0", "model": model, "pre_tokenizer": {"type": "WhitespaceSplit"}, "added_tokens": []}
    absent = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    return TextTokenizer(json.dumps(parts | absent).encode(), huggingface=True)


def write_lerobot(path: Path, *, episodes: int, length: int, height: int, width: int) -> Path:
    """A LeRobot v3 dataset with one camera, written by lerobot with its own defaults."""
    import numpy as np
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    robot = tiny.embodiment(size=height)
    assert robot.proprio is not None
    assert robot.action is not None
    shape = {"shape": (height, width, 3), "names": ["height", "width", "channels"]}
    features = {
        "observation.images.front": {"dtype": "video", **shape},
        "observation.state": {"dtype": "float32", "shape": (len(robot.proprio),), "names": list(robot.proprio.names)},
        "action": {"dtype": "float32", "shape": (len(robot.action),), "names": list(robot.action.names)},
    }
    dataset = LeRobotDataset.create("local/bench", int(robot.rate_hz), features, root=path, robot_type=robot.name)
    for number in range(episodes):
        episode = tiny.episode(number, length, robot, height)
        for t in range(length):
            image = np.resize(episode["image.front"][t].transpose(1, 0, 2), (width, height, 3)).transpose(1, 0, 2)
            frame = {"observation.images.front": np.ascontiguousarray(image), "task": episode.texts[0]}
            dataset.add_frame(frame | {"observation.state": episode["proprio"][t], "action": episode["action"][t]})
        dataset.save_episode()
    dataset.finalize()
    return path
