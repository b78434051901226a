"""`python -m bloomery`, and from a checkout `torchrun --nproc-per-node 8 bloomery …`."""

import sys
from pathlib import Path

if not __package__:  # started by the folder's path: its modules must not pass for top-level ones
    sys.path[0] = str(Path(__file__).parent.parent)

from bloomery.cli import main

main()
