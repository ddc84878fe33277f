"""LeRobot's pipelines around the policy. Nothing is normalised in them: the policy takes and gives physical units."""

from __future__ import annotations

from typing import Any

from lerobot.processor import (
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    PolicyAction,
    PolicyProcessorPipeline,
    RenameObservationsProcessorStep,
    make_policy_processor_pipelines,
)

from lerobot_policy_mmseq.configuration_mmseq import MmseqConfig


def make_mmseq_pre_post_processors(
    config: MmseqConfig, dataset_stats: Any = None
) -> tuple[
    PolicyProcessorPipeline[dict[str, Any], dict[str, Any]], PolicyProcessorPipeline[PolicyAction, PolicyAction]
]:
    """What `mmseq export` writes; dataset_stats are not used, since the contract has its own."""
    return make_policy_processor_pipelines(
        [
            RenameObservationsProcessorStep(rename_map={}),
            AddBatchDimensionProcessorStep(),
            DeviceProcessorStep(device=config.device or "cpu"),
        ],
        [DeviceProcessorStep(device="cpu")],
    )
