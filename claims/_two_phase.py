"""A small world of five sources of unequal size and quality, and models that read them in the order of a plan.

The miniature of two-phase pretraining (arXiv 2412.15285). Items are a question and its answer, one a row, a symbol a
token. The web knows every domain, wrong answers among them; breadth (rare facts) is found nowhere else. Math, code and
wiki are right and small. A wrong answer is always the same one for its question, as misconceptions are.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bloomery.data.pack import Batch, to_batch
from bloomery.data.plan import Plan, make_plan
from bloomery.model.config import ModelConfig, RopeConfig
from bloomery.model.decoder import Decoder
from bloomery.train.loop import LoopConfig, TrainState, steps
from bloomery.train.losses import next_token, token_logprobs
from bloomery.train.optim import adamw

DOMAINS = ("math", "code", "facts", "breadth")
SOURCES = ("web-low", "web-high", "math", "code", "wiki")
PAD, EQUALS, MARK, OPERATION, DIGIT, LETTER, LETTERS = 0, 1, 2, 6, 14, 24, 40
VOCABULARY, ROW = LETTER + LETTERS, 10
MODEL = ModelConfig(
    family="llama", pattern="*-*-", vocab_size=VOCABULARY, hidden_size=64, intermediate_size=160, mlp_gated=True,
    mlp_hidden_act="silu", num_attention_heads=4, num_key_value_heads=4, head_dim=16, rope=RopeConfig(),
    tie_word_embeddings=True, initializer_range=0.1, max_position_embeddings=ROW,
)  # fmt: skip
LARGER = MODEL.model_copy(update={"hidden_size": 128, "intermediate_size": 320, "head_dim": 32})
_PERMUTATIONS, _CODE_LETTERS = np.array([[2, 1, 0], [1, 2, 0], [1, 0, 2], [2, 0, 1]]), 16
Pools = Mapping[str, np.ndarray]
Phase = tuple[float, Mapping[str, float]]
_TESTED = 10  # one question of math and code in this many is kept for the exam


@dataclass(frozen=True)
class World:
    """Sizes. rows: items of each source; web: shares of the domains in it; wrong: share of wrong answers.

    known: share of the breadth facts that web-high knows of.
    """

    rows: Mapping[str, int]
    web: Mapping[str, float]
    wrong: Mapping[str, float]
    facts: int = 150
    breadth: int = 400
    known: float = 0.5


def _kept_for_exam(codes: np.ndarray) -> np.ndarray:
    return (codes * 2654435761 % 2**32) % _TESTED == 0


def _row(mark: int, *columns: np.ndarray) -> np.ndarray:
    """(n, ROW + 1) items: a mark, then columns, then padding."""
    rows = np.full((len(columns[0]), ROW + 1), PAD)
    rows[:, 0] = MARK + mark
    joined = np.concatenate([column.reshape(len(column), -1) for column in columns], axis=1)
    rows[:, 1 : 1 + joined.shape[1]] = joined
    return rows


def _equals(count: int) -> np.ndarray:
    return np.full((count, 1), EQUALS)


def math_items(random: np.random.Generator, count: int, wrong: float, exam: bool = False) -> np.ndarray:
    """Four digits: their largest, their smallest, their range, or the last digit of the sum of the first two.

    Wrong answers are one too many.
    """
    drawn = random.integers(0, (4, 10, 10, 10, 10), size=(15 * count if exam else 2 * count, 5))
    drawn = drawn[_kept_for_exam(drawn @ [10**4, 10**3, 100, 10, 1]) == exam][:count]
    digits = drawn[:, 1:]
    low, high = digits.min(1), digits.max(1)
    answers = np.stack([high, low, high - low, digits[:, :2].sum(1) % 10], 1)
    right = np.take_along_axis(answers, drawn[:, :1], 1)[:, 0]
    said = (right + (random.random(len(drawn)) < wrong)) % 10
    return _row(0, OPERATION + drawn[:, :1], DIGIT + digits, _equals(len(drawn)), DIGIT + said)


def code_items(random: np.random.Generator, count: int, wrong: float, exam: bool = False) -> np.ndarray:
    """Three letters and a permutation to apply to them. Wrong answers apply the next one."""
    drawn = random.integers(0, (4, *3 * [_CODE_LETTERS]), size=(15 * count if exam else 2 * count, 4))
    drawn = drawn[_kept_for_exam(drawn @ [10**6, 10**4, 100, 1]) == exam][:count]
    applied = (drawn[:, 0] + (random.random(len(drawn)) < wrong)) % len(_PERMUTATIONS)
    said = np.take_along_axis(drawn[:, 1:], _PERMUTATIONS[applied], 1)
    return _row(1, OPERATION + 4 + drawn[:, :1], LETTER + drawn[:, 1:], _equals(len(drawn)), LETTER + said)


class Facts:
    """Pairs of letters, each with a value and the one wrong value that is told of it. Some are asked more often."""

    def __init__(self, random: np.random.Generator, mark: int, count: int, skew: float):
        pairs = random.permutation(LETTERS**2)[:count]
        self.mark, self.keys = mark, np.stack(np.divmod(pairs, LETTERS), 1)
        self.right = random.integers(LETTERS, size=count)
        self.wrong = (self.right + random.integers(1, LETTERS, size=count)) % LETTERS
        self.frequency = np.arange(1, count + 1) ** -skew

    def items(self, random: np.random.Generator, count: int, wrong: float, known: np.ndarray) -> np.ndarray:
        """`count` items about the facts that are `known`, (facts,) bool."""
        weights = self.frequency * known
        asked = random.choice(len(self.keys), count, p=weights / weights.sum())
        return self.rows(asked, np.where(random.random(count) < wrong, self.wrong[asked], self.right[asked]))

    def rows(self, asked: np.ndarray, said: np.ndarray) -> np.ndarray:
        """Items of these facts with these answers."""
        return _row(self.mark, LETTER + self.keys[asked], _equals(len(asked)), LETTER + said)


def domains(count: int) -> np.ndarray:
    """Which domain, by number, each of `count` exam questions belongs to."""
    return np.repeat([0, 1, 2, 3, 3], count // 5)


class Corpus:
    """The pools of one seed, (rows, ROW + 1) each, and its exam."""

    def __init__(self, world: World, seed: int):
        self.world, self.seed, random = world, seed, np.random.default_rng([seed, 7])
        self.facts, self.breadth = Facts(random, 2, world.facts, 0.0), Facts(random, 3, world.breadth, 0.5)
        every, self.known = np.ones(world.facts, bool), random.random(world.breadth) < world.known
        self.pools = {name: self._web(random, name) for name in SOURCES[:2]} | {
            "math": math_items(random, world.rows["math"], 0.0),
            "code": code_items(random, world.rows["code"], 0.0),
            "wiki": self.facts.items(random, world.rows["wiki"], 0.0, every),
        }

    def _web(self, random: np.random.Generator, name: str) -> np.ndarray:
        count, wrong = self.world.rows[name], self.world.wrong[name]
        sizes = {domain: round(share * count) for domain, share in self.world.web.items()}
        known = np.ones(len(self.known), bool) if name == "web-low" else self.known
        parts = [
            math_items(random, sizes["math"], wrong), code_items(random, sizes["code"], wrong),
            self.facts.items(random, sizes["facts"], wrong, np.ones(self.world.facts, bool)),
            self.breadth.items(random, sizes["breadth"], wrong, known),
        ]  # fmt: skip
        return random.permutation(np.concatenate(parts))

    def downsampled(self, part: int) -> dict[str, np.ndarray]:
        """One item of so many of every source: items are drawn independently, so the first are as good as any."""
        return {name: pool[: len(pool) // part] for name, pool in self.pools.items()}

    def exam(self, count: int) -> np.ndarray:
        """Right answers to `count` questions: a fifth each of math, code and facts, two fifths of breadth."""
        random = np.random.default_rng([self.seed, 11])
        fifth = count // 5
        facts, breadth = (
            table.rows(chosen, table.right[chosen])
            for table, n in ((self.facts, fifth), (self.breadth, 2 * fifth))
            for chosen in [np.resize(random.permutation(len(table.right)), n)]
        )
        return np.concatenate(
            [math_items(random, fifth, 0.0, exam=True), code_items(random, fifth, 0.0, exam=True), facts, breadth]
        )


@dataclass(frozen=True)
class Course:
    """How a model is taught: `steps` of `batch` items; the rate decays over the last `decay` of them."""

    steps: int
    batch: int = 128
    rate: float = 3e-3
    decay: float = 0.25
    model: ModelConfig = MODEL

    @property
    def loop(self) -> LoopConfig:
        """The settings of the library's loop."""
        return LoopConfig(
            max_steps=self.steps, batch_size=self.batch, learning_rate=self.rate, warmup_steps=self.steps // 20,
            decay_fraction=self.decay, precision="fp32",
        )  # fmt: skip


def plan_of(pools: Pools, phases: Sequence[Phase], course: Course, seed: int) -> Plan:
    """The library's plan over the pools: (share, weights) of each phase."""
    rows = [len(pools[name]) for name in SOURCES]
    return make_plan(SOURCES, rows, [1.0] * len(rows), phases, course.steps * course.batch, seed)


def begin(course: Course, seed: int) -> TrainState:
    """A new model with its optimizer."""
    torch.manual_seed(seed)
    model = Decoder(course.model)
    return TrainState(model, adamw(model, course.loop))


def teach(state: TrainState, plan: Plan, pools: Pools, course: Course, until: int | None = None) -> Iterator[int]:
    """Train on the plan's items from the state's position, to the end or to a step; yields the number of each step."""
    for step in steps(state, _batches(state.position, plan, pools, course.batch), next_token, course.loop):
        yield step.step
        if step.step == until:
            return


def branch(state: TrainState) -> TrainState:
    """A copy of model and optimizer that goes its own way."""
    return copy.deepcopy(state)


def _batches(position: int, plan: Plan, pools: Pools, size: int) -> Iterator[list[Batch]]:
    source, row, _ = plan.draw(position, plan.num_sequences)
    every = np.concatenate([pools[name] for name in SOURCES])
    places = row + (np.cumsum(plan.rows) - plan.rows)[source]
    for start in range(0, len(places), size):
        yield [_batch(every[places[start : start + size]])]


def _batch(rows: np.ndarray) -> Batch:
    """Only answers are learnt: questions are noise by construction."""
    answers = ((rows == EQUALS).cumsum(1) > 0) & (rows != EQUALS) & (rows != PAD)
    return to_batch(rows, [np.array([rows.shape[1]], np.int32)] * len(rows), answers)


@torch.no_grad()
def examine(model: Decoder, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each item: nats a token of the right answer, and whether all of its tokens are the likeliest."""
    model.eval()
    batch = _batch(rows)
    asked = (batch["labels"] >= 0).numpy()
    logprobs, _ = token_logprobs(model, batch, temperature=1.0)
    said = model.lm_head(model(batch["input_ids"])).argmax(-1)
    losses = -logprobs.double().numpy().sum(1) / asked.sum(1)
    return losses, ((said == batch["labels"]).numpy() | ~asked).all(1).astype(float)
