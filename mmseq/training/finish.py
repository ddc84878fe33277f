"""Finish: from the training state of a run to a directory that `predict`, `serve` and `export` load."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from mmseq.config import to_yaml
from mmseq.data.mixture import MixConfig, save_mix, task_name
from mmseq.data.shards import partial_folder, replace_folder
from mmseq.model.sequence_model import SequenceModel
from mmseq.training.checkpoint import StoredTensors
from mmseq.training.config import TrainConfig
from mmseq.training.lora import merge_adapters
from mmseq.training.start import build_model


def write_model(
    checkpoint: Path, directory: Path, trained: SequenceModel, config: TrainConfig, mix: MixConfig, *, averaged: bool
) -> None:
    """Write the model of a training checkpoint to `directory`, complete or not at all. One rank does it.

    trained: the model of the run, for its shape; its weights may lie on other ranks. averaged: with the moving
    average of the weights. Raises: CheckpointError when the checkpoint is damaged.
    """
    assert trained.tokenizers is not None
    if config.lora.rank:  # what was frozen is where it came from
        model = build_model(config, trained.tokenizers)
    else:
        model = SequenceModel(trained.config, trained.vocabulary, trained.tokenizers)
        if trained.transformer.code_projection is not None:
            model.learn_codes()
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in StoredTensors(checkpoint).weights(averaged=averaged):
            own[name].copy_(weight)
    if config.lora.rank:
        merge_adapters(model)
    model.tasks = {task_name(t): t.task for t in mix.tasks}
    model.parallel = [task_name(t) for t in mix.tasks if t.parallel]
    partial = partial_folder(directory)
    model.save_pretrained(partial)
    save_mix(mix, partial / "mix.yaml")
    (partial / "train.yaml").write_text(to_yaml(config))
    if (code := directory.parent / "code.json").is_file():
        shutil.copy(code, partial)
    replace_folder(partial, directory)
