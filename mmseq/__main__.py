"""`python -m mmseq ...`, the form that torchrun and deepspeed launch."""

import sys

from mmseq.cli import main

sys.exit(main())
