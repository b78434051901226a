"""The process of one cell; `bloomery claim` starts it."""

import sys

from bloomery.claim.cells import main

main(*sys.argv[1:])
