"""Several domains in one run: what each of them shows, when one of them stops the run, and blends that hold.

Nemotron-CrossThink (arXiv 2504.13941) learns from mathematics and from multiple-choice and open questions together.
Advantages never cross prompts, but a domain can go wrong unseen behind the mean of all: saturate and leave its share to
the others, lose the form, choose the same label every time, or rule the gradient by long answers.
"""

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

from bloomery.data.prompt_blend import PromptBlend
from bloomery.data.prompts import Prompt
from bloomery.errors import ConfigError, DivergenceError
from bloomery.posttrain.batches import gradient_shares
from bloomery.posttrain.rl_config import RLConfig
from bloomery.posttrain.rollouts import Group, Rollouts, Sample
from bloomery.verify.choice import chosen
from bloomery.verify.reward import FORMLESS
from bloomery.verify.short import NEAR_MISS

_FEWEST_LABELS = 100
"""Labels of a window from which on their entropy is judged."""


def domain_metrics(rollouts: Rollouts) -> dict[str, float]:
    """The form over all samples and, of several domains, each domain's `metric/domain`; a mean over nothing is left
    out.

    `accuracy`, `format` and `reward` apart; `beyond_chance`: accuracy − 1/c over samples with c options;
    `near_miss`: wrong answers that almost are the gold; `degenerate`: share of the domain's groups without signal;
    `share` and `active_share`: the domain's share of all groups, and of those with signal: the blend as drawn and as
    learnt.
    """
    found = _overall(rollouts.samples)
    parts = by_domain(rollouts.groups)
    if len(parts) > 1:
        active = max(1, len(rollouts.mixed()))
        for name, groups in parts.items():
            own = _of_domain(Rollouts(groups), len(rollouts.groups), active)
            found |= {f"{metric}/{name}": value for metric, value in own.items()}
    return {name: value for name, value in found.items() if value is not None}


def by_domain(groups: Iterable[Group]) -> dict[str, list[Group]]:
    """The groups of each domain, domains by name."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(group[0].prompt.domain, []).append(group)
    return dict(sorted(found.items()))


def _overall(samples: Sequence[Sample]) -> dict[str, float | None]:
    formed = [s for s in samples if s.form is not None]
    return {
        "format": _mean(s.form.correct for s in formed if s.form is not None),
        "accuracy_malformed": _mean(s.verdict.correct for s in formed if s.form is not None and not s.form.correct),
    }


def _of_domain(own: Rollouts, groups: int, active: int) -> dict[str, float | None]:
    judged = [s for s in own.samples if s.verdict.score is not None]
    mixed = len(own.mixed())
    return {
        "accuracy": _mean(s.verdict.correct for s in judged),
        "reward": _mean(s.reward or 0.0 for s in judged),
        "format": _overall(own.samples)["format"],
        "beyond_chance": _mean(s.verdict.correct - 1 / s.prompt.options for s in judged if s.prompt.options),
        "near_miss": _mean(s.verdict.reason.startswith(NEAR_MISS) for s in judged if s.prompt.verifier == "short"),
        "degenerate": 1 - mixed / len(own.groups),
        "truncated": _mean(s.truncated for s in own.samples),
        "domain_tokens": _mean(s.tokens for s in own.samples),
        "share": len(own.groups) / groups,
        "active_share": mixed / active,
    }


def learnt_metrics(rollouts: Rollouts, config: RLConfig, max_new_tokens: int) -> dict[str, float]:
    """Of several domains, each one's share of the step's gradient (`gradient_share`) and of its groups (`learnt_share`:
    the blend after dynamic sampling)."""
    parts = by_domain(rollouts.groups)
    if len(parts) < 2:
        return {}
    shares = gradient_shares(
        rollouts, config.aggregation, max_new_tokens, config.baseline, config.advantage_scale, config.overlong,
        config.denominator == "active",
    )  # fmt: skip
    found = {f"gradient_share/{name}": share for name, share in shares.items()}
    return found | {f"learnt_share/{name}": len(own) / len(rollouts.groups) for name, own in parts.items()}


def _mean(values: Iterable[float]) -> float | None:
    data = list(values)
    return sum(data) / len(data) if data else None


class DomainWatch:
    """Sums over the last draws of each domain, kept in `progress` so that a resumed run stops where the uncut one
    does. A run with one domain has its tripwires already."""

    def __init__(self, config: RLConfig):
        self.limits, self.window = config.tripwires.domains, config.tripwires.window
        self.asks_form = config.reward is not None and config.reward.combine != "accuracy"
        self.require_think = config.require_think

    def see(self, rollouts: Rollouts, progress: MutableMapping[str, Any]) -> None:
        """One more draw. Raises `DivergenceError` where a domain's mean over a full window is outside its limit."""
        windows = progress.setdefault("last_domains", {})
        for name, groups in by_domain(rollouts.groups).items():
            last = deque(windows.get(name, ()), maxlen=self.window)
            last.append(self._counts(Rollouts(groups)))
            windows[name] = list(last)
            if len(last) == self.window and len(windows) > 1:
                self._check(name, last)

    def _counts(self, own: Rollouts) -> dict[str, Any]:
        """What is added up over the window."""
        formed = [s.form.correct for s in own.samples if s.form is not None]
        options = [s.prompt.options for s in own.samples if s.prompt.options]
        said = [(chosen(s.completion.text or "", self.require_think), s.prompt.options) for s in own.samples]
        labels = [label for label, count in said if label and label < chr(ord("A") + count)]
        return {
            "groups": len(own.groups), "flat": len(own.groups) - len(own.mixed()),
            "samples": len(own.samples), "truncated": int(own.truncated.sum()),
            "formed": len(formed), "form": sum(formed),
            "labels": dict(Counter(labels)), "options": dict(Counter(map(str, options))),
        }  # fmt: skip

    def _check(self, name: str, last: Sequence[Mapping[str, Any]]) -> None:
        limits = self.limits
        self._require(name, last, "flat", "groups", limits.max_degenerate, "of the groups have equal rewards",
                      "others learn its share of the blend; leave it out, or give it other prompts")  # fmt: skip
        self._require(name, last, "truncated", "samples", limits.max_truncated, "of the completions are cut off",
                      "raise max_new_tokens, or look whether the model ends its answers there")  # fmt: skip
        formed = sum(each["formed"] for each in last)
        kept = sum(each["form"] for each in last)
        if self.asks_form and formed and kept < limits.min_format * formed:
            raise DivergenceError(
                f"domain {name}: {kept / formed:.1%} of the completions have the form that the reward asks for, over "
                f"the last {self.window} draws (at least {limits.min_format:.0%} expected): hardly any can be paid. "
                "Teach the form first by SFT on a few hundred examples, or reward accuracy alone"
            )
        self._check_labels(name, last)

    def _require(
        self, name: str, last: Sequence[Mapping[str, Any]], part: str, whole: str, most: float, what: str, advice: str
    ) -> None:
        share = sum(each[part] for each in last) / sum(each[whole] for each in last)
        if share > most:
            raise DivergenceError(
                f"domain {name}: {share:.0%} {what} over the last {self.window} draws (at most {most:.0%} allowed): "
                f"{advice}"
            )

    def _check_labels(self, name: str, last: Sequence[Mapping[str, Any]]) -> None:
        labels = sum((Counter(each["labels"]) for each in last), Counter[str]())
        if labels.total() < _FEWEST_LABELS:
            return
        options = sum((Counter(each["options"]) for each in last), Counter[str]())
        ratio = entropy(labels) / entropy(_evenly(options))
        if ratio < self.limits.min_label_entropy:
            label, count = labels.most_common(1)[0]
            raise DivergenceError(
                f"domain {name}: {count / labels.total():.0%} of the labels chosen over the last {self.window} draws "
                f"are {label}; their entropy is {ratio:.2f} of an even choice (at least "
                f"{self.limits.min_label_entropy:g} expected): the policy answers by habit. Shuffle the options, so "
                "that no label is right more often than another, or lower learning_rate"
            )


def _evenly(options: Mapping[str, int]) -> dict[str, float]:
    """How often each label is chosen when every label of a question is as likely; options: number of options → samples
    with so many."""
    found: dict[str, float] = {}
    for count, samples in options.items():
        for place in range(int(count)):
            label = chr(ord("A") + place)
            found[label] = found.get(label, 0.0) + samples / int(count)
    return found


def entropy(counts: Mapping[str, float]) -> float:
    """Of the distribution that the counts are of, nats."""
    total = sum(counts.values())
    return sum(count / total * math.log(total / count) for count in counts.values() if count)


class Wanted:
    """The groups to learn from that a step still lacks: of any kind, or of each part of the blend its own number."""

    def __init__(self, num_prompts: int, blend: PromptBlend | None):
        self._num_prompts, self._blend = num_prompts, blend
        self._quotas: dict[str, int] = {}
        self.kept: list[Group] = []

    def add(self, drawn: Rollouts, worth: Sequence[Group]) -> None:
        """What is worth learning of one more draw. The first draw of a step has the counts of the blend."""
        if not self._quotas:
            self._quotas = dict(Counter(self._part(group[0].prompt) for group in drawn.groups))
        for group in worth:
            part = self._part(group[0].prompt)
            if self._quotas.get(part, 0):
                self._quotas[part] -= 1
                self.kept.append(group)

    @property
    def missing(self) -> dict[str, int]:
        """Part → groups that it lacks; before the first draw all of the only part."""
        return {part: count for part, count in (self._quotas or {"": self._num_prompts}).items() if count}

    @property
    def parts(self) -> list[str] | None:
        """The parts of the blend to draw from; `None`: all."""
        return None if self._blend is None or not self._quotas else list(self.missing)

    def _part(self, prompt: Prompt) -> str:
        return "" if self._blend is None else self._blend.group(prompt)


def require_forms(prompts: Iterable[Prompt], config: RLConfig) -> None:
    """Raises `ConfigError` for prompts whose answers have no form that the reward could ask for."""
    if config.reward is None or config.reward.combine == "accuracy":
        return
    for prompt in prompts:
        if prompt.verifier in FORMLESS:
            raise ConfigError(
                f"reward.combine: {config.reward.combine} asks for one box behind the thinking, and prompt {prompt.id} "
                f"is judged by {prompt.verifier}, whose answers stand in none; leave reward out, or choose accuracy"
            )
