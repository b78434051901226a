"""Is this completion right? Pure functions, no torch.

`judge(verifier, completion, answer)` gives one `Verdict`; `Pool` gives many, in worker processes where a verifier may
hang. Three outcomes: right (1), not right (0), could not be judged (`None`); the last never becomes a zero. A bug in a
verifier is an exception.
"""

from bloomery.verify.canaries import echo, self_test
from bloomery.verify.deferred import Deferred
from bloomery.verify.pool import Pool, judge
from bloomery.verify.ray_pool import open_pool
from bloomery.verify.reward import Reward, form_of
from bloomery.verify.verdict import Status, Verdict
from bloomery.verify.verifiers import ANSWER_FORMS, VERIFIERS, for_form

__all__ = [
    "ANSWER_FORMS", "VERIFIERS", "Deferred", "Pool", "Reward", "Status", "Verdict", "echo", "for_form", "form_of",
    "judge", "open_pool", "self_test",
]  # fmt: skip
