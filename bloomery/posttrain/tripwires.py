"""What stops a run before it learns from it: each with what was found, what was expected and what to look at."""

from collections import deque
from collections.abc import Iterable, Mapping, MutableMapping
from concurrent.futures import Future
from typing import Any

from bloomery.data.prompts import Prompt
from bloomery.errors import BloomeryError, DivergenceError
from bloomery.posttrain.rl_config import Tripwires
from bloomery.posttrain.rollouts import Judge, Rollouts, Sample
from bloomery.verify import Verdict, echo
from bloomery.verify.canaries import has_echo

_AVERAGED = ("degenerate", "truncated", "entropy")


def check_rollouts(rollouts: Rollouts, limits: Tripwires, weight_version: int) -> None:
    """Everything that one step's completions must be. Raises `DivergenceError` or `BloomeryError`."""
    require_weights(rollouts.samples, weight_version)
    require_judged(rollouts, limits.max_unjudged)
    require_different(rollouts, limits.max_repeated)


def require_weights(samples: Iterable[Sample], weight_version: int) -> None:
    """All completions are of the weights that the generator was given last."""
    found = {sample.completion.weight_version for sample in samples} - {weight_version}
    if found:
        raise DivergenceError(
            f"weight version: completions of version {', '.join(map(str, sorted(found)))}, the generator was given "
            f"version {weight_version}: they are not from the policy being trained. The generator did not take the new "
            "weights, or kept old requests; nothing was trained on them"
        )
    ended = sum(sample.completion.finish_reason == "abort" for sample in samples)
    if ended:
        raise DivergenceError(f"{ended} completions were cut by a change of weights in the middle; none is trained on")


def require_judged(rollouts: Rollouts, max_unjudged: float) -> None:
    """Stop when more than this share of samples could not be judged: a broken verifier must not steer training."""
    unjudged = [s for s in rollouts.samples if s.verdict.score is None]
    if len(unjudged) > max_unjudged * len(rollouts.samples):
        raise BloomeryError(
            f"the verifier could not judge {len(unjudged)} of {len(rollouts.samples)} completions (at most "
            f"{max_unjudged:.0%} allowed); the first reason: {unjudged[0].verdict.reason}. "
            "Nothing was trained on them; repair the verifier and run the same command to continue"
        )


def require_different(rollouts: Rollouts, max_repeated: float) -> None:
    """Stop where a step asks the same again and again: its groups would be one group under many names."""
    share = rollouts.repeated
    if share > max_repeated:
        prompts = len(rollouts.groups)
        raise DivergenceError(
            f"{share:.0%} of the step's {prompts} prompts stand in it before (at most {max_repeated:.0%} allowed): too "
            "few different prompts are left. Give more prompts, lower num_prompts, or raise drop_solved"
        )


class Canaries:
    """Gold answers judged beside the completions: a verifier that breaks in the middle of a run is seen at once."""

    def __init__(self, pool: Judge, prompts: Iterable[Prompt], count: int, require_think: bool):
        thought = "</think>" if require_think else ""
        self._pool = pool
        self._asked: list[tuple[Prompt, str, Future[Verdict]]] = []
        taken: dict[str, int] = {}
        for prompt in prompts:
            if taken.setdefault(prompt.verifier, 0) < count and has_echo(prompt.verifier, prompt.answer):
                taken[prompt.verifier] += 1
                for text in (thought + echo(prompt.verifier, prompt.answer), ""):
                    self._asked.append((prompt, text, pool.submit(prompt.verifier, text, prompt.answer)))

    def check(self) -> None:
        """Raises `BloomeryError` where a gold answer is not right, or an empty one is."""
        for prompt, text, future in self._asked:
            verdict = future.result()
            if verdict.status == "timeout":  # a busy machine is no broken verifier: once more, with less beside it
                verdict = self._pool.submit(prompt.verifier, text, prompt.answer).result()
            if verdict.score is not None and verdict.correct != bool(text):
                raise BloomeryError(
                    f"verifier {prompt.verifier!r} judges {text[:80]!r}, {'the gold' if text else 'an empty'} answer "
                    f"of prompt {prompt.id}, as {verdict.status} ({verdict.reason}): its rewards mean nothing. Nothing "
                    "was trained on them; repair the verifier and run the same command to continue"
                )


class Watch:
    """Means over the last steps, kept in `progress` so that a resumed run stops where the uncut one does."""

    def __init__(self, limits: Tripwires):
        self.limits = limits

    def see(self, metrics: Mapping[str, float], progress: MutableMapping[str, Any]) -> None:
        """One more step. Raises `DivergenceError` where the mean of a full window is outside its limit."""
        means = {}
        for name in _AVERAGED:
            if name in metrics:
                window = deque(progress.get(f"last_{name}", ()), maxlen=self.limits.window)
                window.append(metrics[name])
                progress[f"last_{name}"] = list(window)
                if len(window) == self.limits.window:
                    means[name] = sum(window) / len(window)
        self._require("degenerate", means, "of the groups have equal rewards",
                      "choose easier or harder prompts, a larger group_size, or max_gen_batches above 1")  # fmt: skip
        self._require("truncated", means, "of the completions are cut off",
                      "raise max_new_tokens, or look whether the model has stopped ending its answers")  # fmt: skip
        if "entropy" in means and means["entropy"] < self.limits.min_entropy:
            raise DivergenceError(
                f"entropy: {means['entropy']:.3g} nats per token over the last {self.limits.window} steps (at least "
                f"{self.limits.min_entropy:g} expected): the policy has collapsed and no longer explores. Lower "
                "learning_rate or updates_per_batch, raise temperature, or end earlier; the last checkpoint is whole"
            )

    def _require(self, name: str, means: Mapping[str, float], what: str, advice: str) -> None:
        most = getattr(self.limits, f"max_{name}")
        if name in means and means[name] > most:
            raise DivergenceError(
                f"{name}: {means[name]:.0%} {what} over the last {self.limits.window} steps (at most {most:.0%} "
                f"allowed): almost nothing is learnt; {advice}"
            )
