"""mmseq: one any-to-any sequence transformer for robots.

from mmseq import Episode, SequenceModel, Task
model = SequenceModel.from_pretrained("runs/demo/checkpoint")
model.predict("image, action[8] -> image@+8", episode, t=12)
"""

from typing import TYPE_CHECKING

from mmseq.embodiment import Embodiment
from mmseq.episode import Episode
from mmseq.errors import MMSeqError
from mmseq.tasks import Task

if TYPE_CHECKING:
    from mmseq.model.sequence_model import SequenceModel

__version__ = "0.1.0"
__all__ = ["Embodiment", "Episode", "MMSeqError", "SequenceModel", "Task", "__version__"]


def __getattr__(name: str):
    # torch takes most of a second to import, so the model is loaded when it is asked for
    if name == "SequenceModel":
        from mmseq.model.sequence_model import SequenceModel

        return SequenceModel
    raise AttributeError(f"module 'mmseq' has no attribute {name!r}")
