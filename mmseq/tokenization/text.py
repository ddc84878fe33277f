"""Text tokenizers: SentencePiece trained on the mix's own captions, or any Hugging Face `tokenizer.json`.

Both give pieces without special tokens and close each text with one end token that lies in the
text range, so that a decoder knows when a text is over.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mmseq.errors import CheckpointError, ConfigError

MODEL_FILE = "text.model"
HF_FILE = "text.tokenizer.json"


class TextTokenizer:
    """`encode(str) -> int64 (n,)` with the end token last; `decode` is its inverse."""

    kind, readout = "text", "likeliest"

    def __init__(self, data: bytes, *, huggingface: bool = False):
        self.data = data
        self.huggingface = huggingface
        try:
            if huggingface:
                from tokenizers import Tokenizer

                self._hf = Tokenizer.from_str(data.decode())
                self.size = max(self._hf.get_vocab().values(), default=-1) + 1  # ids may leave gaps
                self.end = self._find_end()
            else:
                import sentencepiece

                self._sp = sentencepiece.SentencePieceProcessor(model_proto=data)
                self.size = self._sp.vocab_size()
                self.end = self._sp.eos_id()
            if self.size < 1:
                raise ValueError("it has no pieces")
        except ConfigError:
            raise
        except Exception as error:
            raise CheckpointError(f"not a text tokenizer: {error}") from error

    def _find_end(self) -> int:
        for token in ("<|endoftext|>", "<|im_end|>", "</s>", "<|end_of_text|>", "<eos>", "[SEP]"):
            end = self._hf.token_to_id(token)
            if end is not None:
                return end
        raise ConfigError(
            "the tokenizer.json names no end-of-text token", fix="add one of <|endoftext|>, </s> to its added tokens"
        )

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int = 512) -> TextTokenizer:
        """A SentencePiece unigram model with byte fallback, at most `vocab_size` pieces."""
        import sentencepiece

        lines = sorted({t.strip() for t in texts if t.strip()})
        if not lines:
            raise ConfigError("a text tokenizer needs text", fix="give the mix captions or instructions")
        model = io.BytesIO()
        sentencepiece.set_min_log_level(2)
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            model_type="unigram",
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            max_sentence_length=65536,
            num_threads=1,
            minloglevel=2,
        )
        return cls(model.getvalue())

    def encode(self, text: str) -> np.ndarray:
        ids = self._hf.encode(text, add_special_tokens=False).ids if self.huggingface else self._sp.encode(text)
        return np.array([*ids, self.end], dtype=np.int64)

    def decode(self, codes: np.ndarray) -> str:
        """The text before the first end token."""
        ids = [int(c) for c in codes]
        if self.end in ids:
            ids = ids[: ids.index(self.end)]
        return self._hf.decode(ids) if self.huggingface else self._sp.decode(ids)

    def piece(self, code: int) -> str:
        """How the tokenizer writes one code."""
        return str(self._hf.id_to_token(code) if self.huggingface else self._sp.id_to_piece(code))

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.data).hexdigest()[:16]

    def code_features(self) -> None:
        return None

    def save(self, directory: str | Path) -> dict[str, Any]:
        Path(directory, HF_FILE if self.huggingface else MODEL_FILE).write_bytes(self.data)
        return {}

    @classmethod
    def load(cls, path: str | Path, settings: Any = None, *, device: Any = "cpu") -> TextTokenizer:
        """From a directory that `save` wrote, a SentencePiece `.model` or a `tokenizer.json`."""
        path = Path(path)
        if path.is_dir():
            names = (MODEL_FILE, HF_FILE, "tokenizer.json")
            path = next((path / name for name in names if (path / name).is_file()), path / MODEL_FILE)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"no text tokenizer at {path}: {error.strerror}") from error
        return cls(data, huggingface=path.suffix == ".json")
