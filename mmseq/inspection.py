"""Inspect: what a checkpoint is, or how large the model of a recipe will be.

mmseq inspect runs/demo/checkpoint
mmseq inspect train/7b.yaml
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmseq.errors import CheckpointError

STATE_BYTES = 16  # per parameter in training: bf16 weight and gradient, fp32 master weight and Adam's two moments


def inspect_checkpoint(directory: str | Path) -> dict[str, Any]:
    """What a checkpoint directory says about itself. Raises: CheckpointError."""
    import torch

    from mmseq.model.sequence_model import CONFIG_FILE, SequenceModel
    from mmseq.training.dry_run import sizes

    directory = Path(directory)
    model = SequenceModel.from_pretrained(directory, dtype=torch.bfloat16)
    assert model.tokenizers is not None
    parameters, inner = sizes(model)
    out: dict[str, Any] = {
        "checkpoint": str(directory),
        "model": {**model.config.to_dict(), "parameters": parameters, "parameters_without_embeddings": inner},
        "dtype_on_disk": json.loads((directory / CONFIG_FILE).read_text()).get("dtype"),
        "ranges": {r.name: {"first": r.start, "size": r.size} for r in model.vocabulary.ranges.values()},
        "vocabulary": len(model.vocabulary),
        "fingerprints": model.tokenizers.fingerprints(),
        "embodiments": [e.to_dict() for e in model.tokenizers.embodiments.values()],
        "tasks": model.tasks,
        "mix": None,
        "measured": None,
    }
    if (directory / "mix.yaml").is_file():
        from mmseq.data.mixture import load_mix

        mix = load_mix(directory / "mix.yaml")
        out["mix"] = {"name": mix.name, "sources": list(mix.sources)}
    names = ("results.json", "finetune.json")
    for path in (folder / name for folder in (directory, directory.parent) for name in names):
        if path.is_file():
            try:
                out["measured"] = json.loads(path.read_text())
            except ValueError as error:
                raise CheckpointError(
                    f"{path} is not valid JSON: {error}", fix="measure again, or remove it"
                ) from error
            break
    return out


def inspect_recipe(path: str | Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """The size of a recipe's model, without allocating it.

    The vocabulary comes from the recipe's tokenizers where they exist, else from `model.vocabulary`.
    Raises: ConfigError when neither says it.
    """
    from mmseq.config import load_config
    from mmseq.training.config import TrainConfig
    from mmseq.training.dry_run import attention_flops, recipe_model, sizes

    config = load_config(TrainConfig, path, overrides or [])
    m = recipe_model(config)
    parameters, inner = sizes(m)
    tokens = config.data.row_tokens * config.data.rows_per_step
    return {
        "recipe": str(path),
        "model": {**m.to_dict(), "parameters": parameters, "parameters_without_embeddings": inner},
        "tokens_per_step": tokens,
        "tokens": tokens * config.steps,
        # rows of one document are the upper bound
        "gflops_per_token": (6 * inner + attention_flops(m, config.data.row_tokens)) / 1e9,
        "training_state_gib": parameters * STATE_BYTES / 2**30,
        "cache_bytes_per_token": 2 * 2 * m.layers * m.kv_heads * m.head_size,
    }


def print_checkpoint(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    say = lambda text: console.print(text, markup=False)
    say(f"{found['checkpoint']}: {_model_line(found['model'])}, stored as {found['dtype_on_disk']}")
    table = Table("range", "first id", "size", box=None, pad_edge=False)
    for name, r in found["ranges"].items():
        table.add_row(name, str(r["first"]), str(r["size"]))
    say(f"\nvocabulary of {found['vocabulary']} ids")
    console.print(table)
    for robot in found["embodiments"]:
        cameras = ", ".join(f"{c['name']} {c['width']}x{c['height']}" for c in robot["cameras"]) or "no cameras"
        say(f"\nembodiment {robot['name']}: {robot['rate_hz']:g} Hz, {cameras}, {robot['action_form']} actions")
        for stream, axes in {**robot, **robot.get("streams", {})}.items():
            if isinstance(axes, dict) and "names" in axes:
                rows = zip(axes["names"], axes["units"], axes["low"], axes["high"], axes["minimum"], axes["maximum"])
                say(f"  {stream}: in the data, and at most")
                for n, u, low, high, least, most in rows:
                    say(f"    {n:<16} {low:g} to {high:g} {u}, {least:g} to {most:g}")
    if found["mix"]:
        say(f"\ntrained on the mix {found['mix']['name']!r} of {', '.join(found['mix']['sources'])}")
    for name, task in found["tasks"].items():
        say(f"  {name}: {task}")
    if found["measured"] is None:
        say("\nnothing is measured yet: there is no results.json or finetune.json in or beside the checkpoint")
    else:
        say(f"\nmeasured{': ' + found['measured']['unit'] if 'tasks' in found['measured'] else ''}")
        for name, value in flat(found["measured"]):
            say(f"  {name}: {value}")


def print_recipe(found: dict[str, Any]) -> None:
    print(f"{found['recipe']}: {_model_line(found['model'])}, vocabulary {found['model']['vocabulary']}")
    print(f"{found['tokens_per_step']:,} tokens a step, {found['tokens']:,} in all")
    print(f"at most {found['gflops_per_token']:.2f} GFLOP a token (rows of one document), forward and backward")
    print(f"{found['training_state_gib']:.1f} GiB of weights, gradients, Adam, divided by the ranks with ZeRO-3")
    print(f"{found['cache_bytes_per_token'] / 1024:.1f} KiB of key/value cache a token in bf16")


def _model_line(m: dict[str, Any]) -> str:
    return (
        f"{m['parameters'] / 1e6:,.2f} M parameters "
        f"({m['parameters_without_embeddings'] / 1e6:,.2f} M without embeddings), "
        f"width {m['width']}, {m['layers']} layers, {m['heads']} heads, {m['kv_heads']} key/value heads"
    )


def flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Nested numbers as (dotted name, text)."""
    if isinstance(value, list) and all(isinstance(row, dict) and "name" in row for row in value):  # results.json
        shown = "{value:.4g} {unit} ({baseline_name} {baseline_value:.4g}, n {n})"
        return [(row["name"], shown.format_map(row)) for row in value]
    if isinstance(value, dict) and value.keys() == {"before", "after"}:  # finetune.json
        before = "" if value["before"] is None else f"{value['before']:.3f} -> "
        return [(prefix.removeprefix("tasks."), f"{before}{value['after']:.3f}")]
    if isinstance(value, dict):
        return [line for k, v in value.items() for line in flat(v, f"{prefix}.{k}" if prefix else str(k))]
    return [(prefix, f"{value:.4g}" if isinstance(value, float) else value)]
