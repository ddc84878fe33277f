"""How a raw dataset is read: what its owner knows and its files do not say, the same wherever one is opened.

The settings of a source are a `Reading`, and `add_reading` (`mmseq/cli/parser.py`) makes options of its fields.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What the owner of a dataset says of it. map: also as `--map` has it, which is read at once.

    Raises: ConfigError naming the part of a map that is wrong.
    """

    # which columns fill which streams, such as {action: actions, image: {front: rgb}}; as an option
    # action=actions,image.front=rgb, or the name of a YAML file
    map: dict[str, Any] = field(default_factory=dict)
    swap_colours: list[str] = field(default_factory=list)  # cameras whose red and blue were exchanged when stored
    assume_success: bool = False  # episodes that say nothing of their outcome reach their goal, so they have progress

    def __post_init__(self):
        if self.map:
            from mmseq.data.mapping import read_map  # a noun does not rest on data: reached for on demand

            object.__setattr__(self, "map", read_map(self.map))

    def said(self) -> dict[str, Any]:
        """What is said, by field; without the further fields of settings that are a `Reading` too."""
        return {f.name: value for f in fields(Reading) if (value := getattr(self, f.name))}


AS_IT_IS = Reading()
