"""Everything that stops a run by itself, each provoked once, with the words that it is stopped with."""

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import pytest

from bloomery.data.prompts import Prompt
from bloomery.errors import BloomeryError, DivergenceError
from bloomery.generate import Completion, SamplingParams
from bloomery.posttrain.rl_config import Tripwires
from bloomery.posttrain.rollouts import Rollouts, Sample, roll_out
from bloomery.posttrain.tripwires import Canaries, Watch, check_rollouts
from bloomery.verify import Verdict

LIMITS = Tripwires(window=3)


def prompt(number: int = 0, verifier: str = "answer", answer: str = "1") -> Prompt:
    return Prompt(f"p{number}", "s", [], answer, verifier, (number,))


def sample(number: int = 0, status: Any = "wrong", version: int = 1, reason: Any = "stop") -> Sample:
    return Sample(prompt(number), Completion([1, 2], [-1.0, -1.0], reason, version, ""), Verdict.of(status, "it died"))


def test_sound_rollouts_pass() -> None:
    check_rollouts(Rollouts([[sample(0, "correct"), sample(0)], [sample(1), sample(1)]]), LIMITS, weight_version=1)


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        ([[sample(version=1), sample(version=0)]], DivergenceError,
         "weight version: completions of version 0, the generator was given version 1"),
        ([[sample(), sample(reason="abort")]], DivergenceError, "1 completions were cut by a change of weights"),
        ([[sample(), sample(status="infra_error")]], BloomeryError,
         r"could not judge 1 of 2 completions \(at most 5% allowed\); the first reason: it died"),
        ([[sample(0)], [sample(0)], [sample(0)], [sample(1)]], DivergenceError,
         r"50% of the step's 4 prompts stand in it before \(at most 40% allowed\)"),
    ],
)  # fmt: skip
def test_what_one_step_must_not_be(groups: list[list[Sample]], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_rollouts(Rollouts(groups), Tripwires(max_repeated=0.4), weight_version=1)


@pytest.mark.parametrize(
    ("name", "good", "bad", "message"),
    [
        ("degenerate", 0.9, 1.0, r"degenerate: 97% of the groups have equal rewards over the last 3 steps \(at most"),
        ("truncated", 0.8, 1.0, r"truncated: 93% of the completions are cut off .* raise max_new_tokens"),
        ("entropy", 0.02, 0.001, r"entropy: 0.00733 nats per token .* the policy has collapsed"),
    ],
)
def test_means_over_a_window(name: str, good: float, bad: float, message: str) -> None:
    progress: dict[str, Any] = {}
    for value in (good, good, good, bad):  # within the limit on average
        Watch(LIMITS).see({name: value}, progress)
    for value in (bad, bad, bad):
        Watch(LIMITS).see({name: value}, {})  # no full window
    with pytest.raises(DivergenceError, match=message):
        Watch(LIMITS).see({name: bad}, progress)


class Scripted:
    """Judges by a function, at once."""

    def __init__(self, judge: Any):
        self.judge = judge

    def submit(self, verifier: str, completion: str, answer: str) -> "Future[Verdict]":
        future: Future[Verdict] = Future()
        try:
            future.set_result(self.judge(completion))
        except ZeroDivisionError as error:
            future.set_exception(error)
        return future


def test_a_verifier_that_refuses_a_gold_answer_is_broken() -> None:
    prompts = [prompt(0), prompt(1), prompt(2, "format", "")]  # `format` has no gold
    honest = Scripted(lambda text: Verdict.of("correct" if text == r"\boxed{1}" else "wrong"))
    Canaries(honest, prompts, 2, require_think=False).check()
    zero = Scripted(lambda text: Verdict.of("wrong", "0 points for all"))
    with pytest.raises(BloomeryError, match=r"boxed\{1\}', the gold answer of prompt p0, as wrong \(0 points for all"):
        Canaries(zero, prompts, 1, require_think=False).check()
    Canaries(zero, prompts, 0, require_think=False).check()  # not asked
    bountiful = Scripted(lambda text: Verdict.of("correct"))
    with pytest.raises(BloomeryError, match="judges '', an empty answer of prompt p0, as correct"):
        Canaries(bountiful, prompts, 1, require_think=False).check()
    moods = iter(["timeout", "wrong", "correct"])
    slow = Scripted(lambda text: Verdict.of(next(moods)))  # type: ignore[arg-type]
    Canaries(slow, prompts[:1], 1, require_think=False).check()  # the first is asked again
    moods = iter(["timeout", "wrong", "timeout"])
    with pytest.raises(BloomeryError, match="the gold answer of prompt p0, as timeout"):
        Canaries(slow, prompts[:1], 1, require_think=False).check()
    thoughtful = Scripted(lambda text: Verdict.of("correct" if text.startswith("</think>") else "no_think"))
    Canaries(thoughtful, prompts, 1, require_think=True).check()


class Typist:
    """Writes a letter a request, and counts."""

    def __init__(self) -> None:
        self.written = 0

    def stream(self, requests: Sequence[Any]) -> Any:
        for index in range(len(requests)):
            self.written += 1
            yield index, Completion([index], [-1.0], "stop", 0, "x")


def test_a_bug_in_a_verifier_is_raised_before_the_rest_is_written() -> None:
    def buggy(text: str) -> Verdict:
        raise ZeroDivisionError("in the verifier")

    typist = Typist()
    with pytest.raises(ZeroDivisionError, match="in the verifier"):
        roll_out(typist, Scripted(buggy), [prompt(0)], 8, SamplingParams(), (0,))
    assert typist.written == 1
