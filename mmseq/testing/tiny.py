"""Tiny real parts for tests: a robot, episodes, tokenizers and a model that fit into milliseconds."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from mmseq.embodiment import Axes, Camera, Embodiment, Gripper
from mmseq.episode import Episode
from mmseq.model.config import ModelConfig
from mmseq.model.sequence_model import SequenceModel
from mmseq.tokenization.bundle import Tokenizers
from mmseq.tokenization.continuous import BinTokenizer, ScalarTokenizer
from mmseq.tokenization.text import TextTokenizer
from mmseq.tokenization.vision import FSQAutoencoder, VisionConfig, VisionTokenizer

TEXTS = ["open the window", "close the red drawer", "press the button", "pull the handle down", "turn the dial"]


def axes(names: str, limit: float = 1.0) -> Axes:
    """Axes with one-letter names and range [-limit, limit]."""
    n = len(names)
    return Axes(
        names=tuple(names),
        units=("unitless",) * n,
        low=(-limit,) * n,
        high=(limit,) * n,
        minimum=(-limit,) * n,
        maximum=(limit,) * n,
    )


def embodiment(name: str = "arm", cameras: tuple[str, ...] = ("front",), size: int = 16) -> Embodiment:
    return Embodiment(
        name=name,
        rate_hz=20.0,
        cameras=tuple(Camera(name=c, height=size, width=size) for c in cameras),
        proprio=axes("xyz"),
        action=axes("xyzg"),
        action_form="delta",
        grippers=(Gripper(axis="g", open=-1.0, closed=1.0),),
    )


def episode(seed: int = 0, length: int = 24, robot: Embodiment | None = None, size: int = 16) -> Episode:
    """A bright square that moves by the action: proprio, action and picture agree with each other."""
    robot = robot or embodiment()
    rng = np.random.default_rng(seed)
    action = np.clip(np.cumsum(rng.normal(0, 0.2, (length, 4)), 0), -1, 1).astype(np.float32)
    proprio = np.clip(np.cumsum(action[:, :3] * 0.1, 0), -1, 1).astype(np.float32)
    frames = np.full((length, size, size, 3), 40, dtype=np.uint8)
    for t, (x, y, _) in enumerate(proprio):
        row, column = int((y + 1) / 2 * (size - 4)), int((x + 1) / 2 * (size - 4))
        frames[t, row : row + 4, column : column + 4] = (220, 80, 60)
    arrays = {f"image.{c.name}": frames for c in robot.cameras}
    return Episode.from_arrays(
        f"tiny-{seed}",
        robot.rate_hz,
        {**arrays, "proprio": proprio, "action": action},  # type: ignore[arg-type]
        texts=[TEXTS[seed % len(TEXTS)], TEXTS[seed % len(TEXTS)] + " now"],
        plans=["reach for it, then move it"],
        embodiment=robot.name,
        success=True,
    )


def video(seed: int = 0, length: int = 24, size: int = 16) -> Episode:
    """The same without a robot: pictures and a caption."""
    source = episode(seed, length, size=size)
    return Episode.from_arrays(
        f"video-{seed}", source.rate_hz, {"image.main": source["image.front"]}, texts=source.texts, success=True
    )


def tokenizers(
    robots: tuple[Embodiment, ...] | None = None, *, merge: int = 2, seed: int = 0, text: Path | None = None
) -> Tokenizers:
    """Untrained vision (4 x 4 tokens of 16 x 16 pixels), real text (or the tokenizer at `text`), bins."""
    import torch

    torch.manual_seed(seed)
    config = VisionConfig(
        size=16, patch=4, margin=2, levels=(4, 4, 4), width=32, hidden=32, decoder_depth=1, decoder_reach=1
    )
    return Tokenizers(
        {
            "text": TextTokenizer.load(text) if text else TextTokenizer.train(TEXTS, vocab_size=300),
            "vision": VisionTokenizer(config, FSQAutoencoder(config)),
            "action": BinTokenizer(32),
            "proprio": BinTokenizer(32),
            "progress": ScalarTokenizer(16),
        },
        embodiments=robots if robots is not None else (embodiment(),),
        merge=merge,
    )


def model(bundle: Tokenizers | None = None, *, seed: int = 0, **changes) -> SequenceModel:
    config = ModelConfig(**{"width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_size": 8, "mlp": 64, **changes})
    made = SequenceModel.new(config, bundle or tokenizers(), seed=seed).eval()
    if made.config.copying:  # it begins at zero, and would hide mistakes in what may be copied
        torch.nn.init.normal_(made.transformer.copy_gate.weight, generator=torch.Generator().manual_seed(seed))
    return made


def language_model(directory: str | Path, family: str = "llama", *, seed: int = 0, padding: int = 7, **changes):
    """A random language model as Hugging Face publishes them, written to `directory`: config.json,
    model.safetensors, tokenizer.json. Biases and norms are random too.

    padding: rows of the embedding beyond the tokenizer's pieces. changes: fields of its config.
    Returns: the model of transformers, in evaluation mode.
    """
    import transformers

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    text = Tokenizer(models.BPE())
    text.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    text.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"]
    text.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "max_position_embeddings": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    fields = {**shape, **heads, **ids, "vocab_size": text.get_vocab_size() + padding, **changes}
    config = transformers.AutoConfig.for_model(family, **fields)
    torch.manual_seed(seed)
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        for name, p in made.named_parameters():
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                p.add_(torch.randn(p.shape[1]) * 0.2)  # rows of language models share a direction
    made.save_pretrained(directory)
    text.save(str(Path(directory, "tokenizer.json")))
    return made


def write_episodes(directory: str | Path, episodes: Iterable[Episode], robots: tuple[Embodiment, ...] = ()) -> Path:
    """Episode shards, as `mmseq data import` writes them."""
    from mmseq.data.shards import ShardWriter
    from mmseq.mp4 import encode_video

    directory = Path(directory)
    manifest = {
        "kind": "episodes",
        "name": directory.name,
        "source": "tiny",
        "embodiments": {r.name: r.fingerprint for r in robots},
        "tokenizers": {},
    }
    with ShardWriter(directory, manifest) as writer:
        for robot in robots:
            writer.add_file(f"embodiments/{robot.name}.json", json.dumps(robot.to_dict()).encode())
        for i, e in enumerate(episodes):
            head = {
                "id": e.id,
                "rate_hz": e.rate_hz,
                "length": len(e),
                "texts": e.texts,
                "plans": e.plans,
                "embodiment": e.embodiment,
                "success": e.success,
                "source": e.source,
                "metadata": e.metadata,
            }
            members: dict = {"json": head}
            for name in e.streams:
                if name.startswith("image."):
                    members[f"{name}.mp4"] = encode_video(iter(e[name]), e.rate_hz)[0]
                else:
                    members[f"{name}.npy"] = e[name]
            note = {key: head[key] for key in ("id", "length", "rate_hz", "embodiment", "success")}
            note |= {"streams": list(e.streams), "texts": len(e.texts), "plans": len(e.plans)}
            writer.add(f"{i:08d}", members, metadata=note)
    return directory
