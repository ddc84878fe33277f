"""Tokenize: the episodes of every source of a mix become token shards, one folder per source.

    mmseq data tokenize data_mixes/demo.yaml tokens --tokenizers runs/tokenizers

A source that is already there, made from the same data with the same tokenizers, is left as it is,
so an interrupted run goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mmseq.data.mixture import SourceConfig, load_mix
from mmseq.data.sources import bad_episodes, open_source, source_identity
from mmseq.data.tokens import TokenShards, token_fingerprints, write_token_shards
from mmseq.episode import Episode
from mmseq.errors import DataError, MMSeqError
from mmseq.tokenization.bundle import Tokenizers

Progress = Callable[[str, int, int], None]


def tokenize_mix(
    mix_path: str | Path,
    out: str | Path,
    tokenizers: Tokenizers | str | Path,
    root: str | Path | None = None,
    overwrite: bool = False,
    on_progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, str]:
    """Write `out/<source>/` for each source of the mix; returns what became of each: `written` or `kept`.

    root: where the paths of the sources begin; default: the folder of the mix. overwrite: replace
    shards that were made from other data or with other tokenizers, instead of refusing.
    on_progress(source, episodes done, episodes in all). say: is told which episodes are left out, and why.
    Raises: DataError for more bad episodes of a source than its `skip_bad`, all named: raw data are held to their
    contract here as `mmseq data import` holds them.
    """
    mix = load_mix(mix_path)
    root = Path(root) if root is not None else Path(mix_path).parent
    if not isinstance(tokenizers, Tokenizers):
        tokenizers = Tokenizers.load(tokenizers)
    missing = [f"{name}: {root / s.path}" for name, s in mix.sources.items() if not (root / s.path).exists()]
    if missing:
        raise DataError(f"sources of {mix_path} do not exist ({'; '.join(missing)})", fix="correct the paths or --root")
    return {
        name: _tokenize_source(name, source, root, Path(out) / name, tokenizers, overwrite, on_progress, say)
        for name, source in mix.sources.items()
    }


def _tokenize_source(
    name: str,
    config: SourceConfig,
    root: Path,
    directory: Path,
    tokenizers: Tokenizers,
    overwrite: bool,
    on_progress: Progress | None,
    say: Callable[[str], None] | None,
) -> str:
    path = root / config.path
    identity = source_identity(path, config, rate_hz=config.rate_hz)
    if directory.is_dir() and any(directory.iterdir()):
        why = _outdated(directory, identity, tokenizers)
        if why is None:
            return "kept"
        if not overwrite:
            raise DataError(f"{directory} {why}", fix="pass --overwrite to replace it, or choose another folder")
    reader = open_source(path, config, rate_hz=config.rate_hz, embodiments=tokenizers.embodiments)
    bad = bad_episodes(reader, config, f"source {name} ({path})", say or (lambda _: None))
    kept = [i for i in range(len(reader)) if i not in bad.found]

    def episodes() -> Iterator[Episode]:
        yield from (reader[i] for i in kept)
        bad.settle()  # pictures are decoded only now

    write_token_shards(
        episodes(),
        directory,
        tokenizers,
        name=name,
        source=identity,
        total=len(kept),
        overwrite=overwrite,
        attempt=lambda n, work: bad.attempt(kept[n], work),
        on_progress=(lambda done, _: on_progress(name, done, len(kept))) if on_progress else None,
    )
    return "written"


def _outdated(directory: Path, identity: dict[str, Any], tokenizers: Tokenizers) -> str | None:
    """Why shards that are there cannot be kept; None when they can."""
    try:
        manifest = json.loads((directory / "manifest.json").read_text())
        stored = {key: manifest.get(key) for key in ("tokenizers", "embodiments")}
        if stored != token_fingerprints(tokenizers):
            return "was made with other tokenizers or embodiments"
        theirs = manifest.get("source") or {}
        if any(theirs.get(key) != identity[key] for key in ("sha256", "rate_hz")):
            return f"was made from other data than {identity['path']} holds now"
        TokenShards(directory, tokenizers)
    except (OSError, ValueError, AttributeError, MMSeqError) as error:
        return f"is not complete ({error})"
    return None
