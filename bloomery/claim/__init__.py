"""Claims of papers, tested: arms, seeds and a verdict whose rule is fixed before the first number is seen.

A claim is one file `claims/NAME.py` at the root of a checkout that holds `CLAIM = Claim(...)`. `bloomery claim NAME`
measures its cells (one arm, one seed, one process), judges them and writes `docs/claims/NAME.{json,md,svg}`.
"""

from bloomery.claim.claim import Cells, Claim, Expectation, Finding, JSONValue
from bloomery.claim.run import listing, run
from bloomery.claim.source import load

__all__ = ["Cells", "Claim", "Expectation", "Finding", "JSONValue", "listing", "load", "run"]
