"""Is this completion right? Pure functions, no torch.

`judge(verifier, completion, answer)` gives one `Verdict`; `Pool` gives many, in worker processes where a verifier may
hang. Three outcomes: right (1), not right (0), could not be judged (`None`); the last never becomes a zero. A bug in a
verifier is an exception.
"""

from bloomery.verify.canaries import echo, self_test
from bloomery.verify.deferred import Deferred
from bloomery.verify.pool import Pool, judge
from bloomery.verify.ray_pool import open_pool
from bloomery.verify.verdict import Status, Verdict
from bloomery.verify.verifiers import VERIFIERS

__all__ = ["VERIFIERS", "Deferred", "Pool", "Status", "Verdict", "echo", "judge", "open_pool", "self_test"]
