"""torchrun for machines that may be taken away: its options, and the ranks' own way to end.

    python -m mmseq.training.torchrun --nproc-per-node 8 -m mmseq train RECIPE

Told to end, torchrun kills its ranks after 30 seconds, too soon for a large checkpoint, and whatever a rank
exits with, torchrun exits with 1. Here SIGTERM is handed to the ranks, which save in their own time, and the
exit code is that of the first rank that failed: 85 asks to be started again (`distributed.EXIT_PREEMPTED`).
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Sequence

from mmseq.training.distributed import EXIT_PREEMPTED


def main(arguments: Sequence[str]) -> int:
    import psutil
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    def hand_on(number: int, frame: object) -> None:
        ranks = psutil.Process().children()
        if not ranks:  # none has started
            sys.exit(EXIT_PREEMPTED)
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(number)

    signal.signal(signal.SIGTERM, hand_on)
    try:
        run.main(["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT", *arguments])
    except ChildFailedError as error:
        print(error, file=sys.stderr, flush=True)
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code  # killed by a signal, in the way of shells
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
