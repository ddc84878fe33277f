"""A policy of mmseq as one of LeRobot: `--policy.path=OUT` of `mmseq export CHECKPOINT lerobot OUT`."""

from lerobot_policy_mmseq.configuration_mmseq import MmseqConfig

__all__ = ["MmseqConfig"]
