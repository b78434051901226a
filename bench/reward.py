"""How much of the time that verdicts take is hidden behind decoding: programs judged while completions are written.

The model of `recipes/tiny.yaml` writes 32 × 8 completions that end by themselves, after about 26 of at most 64 tokens;
each is judged by running a program in the sandbox, every other one right, with 8 workers. The model is random, so what
is run is not what it wrote but a program as long as the recipe's.

`reward/hidden`: ours, completions a second, written and judged; peer, the same without any verdict: the limit.
`hidden`: of the seconds that the same verdicts take alone, with the same workers, the share that nothing waits for
after the last completion. On few cores the verdicts also slow the decoding down; the ratio shows it, `hidden` does not.
`python -m bench.reward [--quick]` prints one JSON line.
"""

import itertools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future

import torch

from bench.figure import figure
from bench.grpo import CASES, build_model
from bloomery.data.prompts import Prompt
from bloomery.generate.engine import Engine
from bloomery.generate.sampling import SamplingParams
from bloomery.posttrain.rollouts import roll_out
from bloomery.verify import Pool, Verdict

PROMPTS, GROUP, WORKERS = 32, 8, 8
Item = tuple[str, str, str]


def item(number: int) -> Item:
    """A program of the recipe's kind with its tests; the odd ones are wrong."""
    cases = [{"args": [list(range(n))], "ret": [3 * x for x in range(n)]} for n in range(8)]
    tests = json.dumps({"kind": "call", "fn_name": "f", "cases": cases, "time_limit_s": 1})
    factor = 3 + number % 2
    return "program", f"```python\ndef f(xs):\n    return [{factor} * x for x in xs]  # {number}\n```", tests


class Programs:
    """Judges the next program whatever the completion says."""

    def __init__(self, pool: Pool):
        self.pool, self.numbers = pool, itertools.count()

    def submit(self, verifier: str, completion: str, answer: str) -> "Future[Verdict]":
        """The pool's own, with all its overlap."""
        return self.pool.submit(*item(next(self.numbers)))


class Nothing:
    """No verdict at all: decoding alone."""

    def submit(self, verifier: str, completion: str, answer: str) -> "Future[Verdict]":
        """At once."""
        future: Future[Verdict] = Future()
        future.set_result(Verdict.of("wrong"))
        return future


def measure(repeats: int, prompts: int = PROMPTS, workers: int = WORKERS) -> dict[str, object]:
    """Medians over alternating repeats, after one to warm up."""
    [case] = [each for each in CASES if each.ends]
    model, words = build_model(case), case.model.vocab_size - 1
    asked = [Prompt(str(n), "bench", [], "", "", tuple(row)) for n, row in enumerate(_random_ids(prompts, words))]
    engine = Engine(model, prompts * GROUP, case.prompt_tokens + case.new_tokens, decode=lambda ids: "")
    params = SamplingParams(max_new_tokens=case.new_tokens, stop_token_ids=(words,))
    rates: dict[str, list[float]] = {"judged": [], "plain": []}
    hidden: list[float] = []
    with Pool(workers) as pool:
        for repeat in range(repeats + 1):
            seconds: dict[str, float] = {}
            for name, judge in (("judged", Programs(pool)), ("plain", Nothing())):
                engine.sync()
                start = time.perf_counter()
                rollouts = roll_out(engine, judge, asked, GROUP, params, (repeat,))
                seconds[name] = time.perf_counter() - start
                if name == "judged":
                    waited = rollouts.seconds["reward_wait_seconds"]
            alone = _alone(pool, prompts * GROUP)
            if repeat:
                hidden.append(1 - waited / alone)
                for name, taken in seconds.items():
                    rates[name].append(prompts * GROUP / taken)
    found = figure("reward/hidden", rates["judged"], rates["plain"], "completions/s")
    return found | {"hidden": round(statistics.median(hidden), 3)}


def _random_ids(rows: int, words: int) -> Sequence[Sequence[int]]:
    torch.manual_seed(1)
    [case] = [each for each in CASES if each.ends]
    return torch.randint(words, (rows, case.prompt_tokens)).tolist()


def _alone(pool: Pool, count: int) -> float:
    """Seconds of as many verdicts with nothing beside them."""
    start = time.perf_counter()
    pool.judge_all(item(number) for number in range(count))
    return time.perf_counter() - start


def main() -> None:
    torch.set_num_threads(1)
    print(json.dumps(measure(repeats=5 if "--quick" in sys.argv else 15)), flush=True)


if __name__ == "__main__":
    main()
