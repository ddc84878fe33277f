"""`python -m mmseq ...`, the form that torchrun and deepspeed launch."""

import sys

from mmseq.cli import main

if __name__ == "__main__":  # spawned processes import this file under another name
    sys.exit(main())
