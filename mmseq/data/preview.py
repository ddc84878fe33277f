"""Preview: what a model will read, segment by segment, with the pictures its tokens stand for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from mmseq.data.mixture import Mixture
from mmseq.data.moments import Sample
from mmseq.layout import split_codes
from mmseq.sequence import SegmentSpan, TokenSequence
from mmseq.streams import TEXT, VISION, stream_row


def choose_samples(mixture: Mixture, count: int) -> list[Sample]:
    """The first `count` samples of the run, as many different tasks among them as possible."""
    samples = [s for row in mixture.block(0) for s in row]
    seen: set[int] = set()
    first = [s for s in samples if not (s.task in seen or seen.add(s.task))]
    rest = [s for s in samples if s not in first[:count]]
    return (first + rest)[:count]


def describe(mixture: Mixture, sample: Sample, sequence: TokenSequence) -> str:
    """A sequence as text: one line per segment with its header, and what its tokens mean."""
    vocabulary, tokenizers = mixture.builder.vocabulary, mixture.tokenizers
    task = mixture.tasks[sample.task]
    lines = [
        mixture.provenance(sample),
        f"  {task}",
        f"  {len(sequence)} tokens, {len(sequence.target_at)} of them learned",
    ]
    done = 0
    for span in sequence.segments:
        header = " ".join(vocabulary.describe(int(i)) for i in sequence.ids[done : span.start])
        ids = sequence.ids[span.start : span.stop]
        role = "predicted" if span.predicted else "given"
        step = "" if span.step is None else f" from step {span.step}"
        row = stream_row(span.stream)
        if row.kind is TEXT:
            meaning = repr(tokenizers[row.range].decode(vocabulary.decode(row.range, ids)))
        elif row.kind is VISION and not span.predicted and tokenizers.layout.merge > 1:
            meaning = f"{len(ids)} positions of {tokenizers.layout.merge**2} merged codes"
        else:
            meaning = f"ids {ids.min()} to {ids.max()} of {row.range}"
        if span.padding:
            meaning += f", {span.padding} after the end of the episode, not learned"
        lines.append(f"  {span.start:5d} to {span.stop - 1:5d}  {role:9s}  {header}{step}  {meaning}")
        done = span.stop
    lines.append(f"  {done:5d} to {len(sequence) - 1:5d}  closed by  {vocabulary.describe(int(sequence.ids[-1]))}")
    return "\n".join(lines)


def frames_of(mixture: Mixture, sequence: TokenSequence, span: SegmentSpan) -> np.ndarray:
    """The frames that a vision segment's tokens stand for, uint8 (frames, size, size, 3)."""
    vocabulary, tokenizers = mixture.builder.vocabulary, mixture.tokenizers
    merged = sequence.input.cut(span.start, span.stop)
    if len(merged.patch_at):
        patches = vocabulary.decode("vision", merged.patch_ids)
        positions = tokenizers.layout.frame_positions(predicted=False)
        codes = split_codes(patches.reshape(-1, positions, patches.shape[1]), tokenizers.layout)
    else:
        codes = vocabulary.decode("vision", sequence.ids[span.start : span.stop])
        codes = codes.reshape(-1, tokenizers.layout.frame_tokens)
    return tokenizers.vision.decode(codes)


def save_frames(mixture: Mixture, sequence: TokenSequence, directory: str | Path, prefix: str) -> list[Path]:
    """One PNG per vision segment, its frames side by side; returns their paths."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, span in enumerate(sequence.segments):
        if stream_row(span.stream).kind is not VISION:
            continue
        strip = np.concatenate(list(frames_of(mixture, sequence, span)), axis=1)
        role = "predicted" if span.predicted else "given"
        camera = f".{span.camera}" if span.camera else ""
        paths.append(directory / f"{prefix}_{i:02d}_{span.stream}{camera}_{role}.png")
        Image.fromarray(strip).save(paths[-1])
    return paths
