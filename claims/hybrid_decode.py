"""A hybrid decodes at least three times as fast as a Transformer of its size, once the context is long.

arXiv 2504.03624 (Nemotron-H) reports throughput at 65,536 tokens in, 1,024 out: 2.2 times that of its own matched
Transformer. Here both sides are the pair of `bench/decode.py`, 19 M parameters, random weights, float32, one thread,
measured in turns in one process. The control measures the Transformer against a second one of its own kind.
"""

import math
import statistics
import time
from dataclasses import fields
from pathlib import Path

import torch

from bench.decode import GRID, HYBRID, LONG, TRANSFORMER, Decoding, speedup, steps_per_turn, turns
from bloomery.claim import Cells, Claim, Expectation, Finding, JSONValue
from bloomery.evaluate.statistics import Difference
from bloomery.model.decoder import Decoder
from bloomery.model.roofline import crossover, largest_batch, predicted_ratio
from bloomery.model.state import DecodeState
from bloomery.model.step import Step

PAIR, CONTROL = "hybrid-vs-transformer", "transformer-vs-transformer"
SEEDS, SMOKE_SEEDS = (0, 1, 2, 3, 4), (900,)
PLACES = ((1, 1), *GRID)  # one token of context: what a step costs without its cache
TURNS = 9
PROMPT, NEW = 16384, 256
CACHE_BYTES = 512 * 2**20
SMOKE_DIVISOR = 16  # of tokens and bytes; the machinery is what a smoke run checks

LONG_PLACES = [place for place in GRID if math.prod(place) >= LONG]
EXPECTED = (
    *(
        Expectation(f"hybrid decodes faster, {batch} × {tokens:,} cached tokens", "above", 3.0, "2.2× with the prompt")
        for batch, tokens in LONG_PLACES
    ),
    Expectation(
        "no such gain at 1 × 512", "below", 1.5, "–",
        "Control: weights are nearly all there is to read. Bytes alone would give 1.05; the Transformer has 32 layers "
        "to call, the hybrid 26, and on development seeds the ratio was 0.9 to 1.25, by the kernels in use.",
    ),
    Expectation("Transformer against its like, log ratio", "within", 0.05, "–", "Control: all places and turns."),
    Expectation("cache bytes beyond the formula", "within", 0.0, "–", "Both models, after prompt and new tokens."),
    Expectation("more tokens/s from 512 MiB of cache, 16,384 each", "above", 3.0, "–"),
    Expectation("prompt of 16,384 read faster", "above", 1.0, "≈ 1.8× fewer operations at 65,536"),
    Expectation("16,384 in, 256 out, faster", "above", 1.0, "2.2× for 65,536 in, 1,024 out"),
)  # fmt: skip


def measure(arm: str, seed: int, smoke: bool) -> dict[str, JSONValue]:
    """Seconds per step of both sides at every place, in turns; the pair also reads a prompt and fills a budget."""
    torch.manual_seed(seed)
    divisor = SMOKE_DIVISOR if smoke else 1
    models = Decoder(HYBRID if arm == PAIR else TRANSFORMER).eval(), Decoder(TRANSFORMER).eval()
    found = {name(place): _turns(models, (place[0], place[0]), max(place[1] // divisor, 1), smoke) for place in PLACES}
    result = {f"ratio {at}": statistics.median(theirs / mine for mine, theirs in pairs) for at, pairs in found.items()}
    result["turns"] = found
    if arm == PAIR:
        result["whole"] = [_whole(model, PROMPT // divisor, NEW // divisor) for model in models]
        result["budget"] = _budget(models, PROMPT // divisor, CACHE_BYTES // divisor, smoke)
    return result


def name(place: tuple[int, int]) -> str:
    """`4x16384` for 4 sequences of 16,384 tokens."""
    return f"{place[0]}x{place[1]}"


def _turns(
    models: tuple[Decoder, Decoder], batches: tuple[int, int], tokens: int, smoke: bool
) -> list[tuple[float, float]]:
    steps = 2 if smoke else steps_per_turn(max(batches), tokens)
    ours, peer = (Decoding(model, batch, tokens, steps) for model, batch in zip(models, batches, strict=True))
    return turns(ours, peer, 2 if smoke else TURNS)


def _whole(model: Decoder, prompt: int, new: int) -> dict[str, float]:
    """CPU seconds of a prompt and of the tokens after it, and the bytes held at the end."""
    state = DecodeState.allocate(model.config, 1, prompt + new)
    ids = torch.randint(model.config.vocab_size, (1, prompt))
    start = time.process_time()
    with torch.no_grad():
        tokens = model.lm_head(model(ids, state=state, only_last=True)[:, -1]).argmax(-1, keepdim=True)
    read = time.process_time()
    step = Step(model)
    for _ in range(new - 1):
        tokens = step(tokens, state).argmax(-1, keepdim=True)
    return {
        "prefill_seconds": read - start,
        "seconds": time.process_time() - start,
        "cache_bytes": _held(state),
        "formula_bytes": model.config.cache_bytes(1, prompt + new, torch.float32),
    }


def _held(state: DecodeState) -> int:
    """Bytes of the memory behind a state's buffers."""
    caches = [cache for cache in state.layers if cache is not None]
    return sum(getattr(cache, field.name).untyped_storage().nbytes() for cache in caches for field in fields(cache))


def _budget(models: tuple[Decoder, Decoder], tokens: int, cache_bytes: int, smoke: bool) -> dict[str, JSONValue]:
    """The largest batch of each side in the same memory, and seconds per sequence and step."""
    ours, peer = (largest_batch(model.config, tokens, cache_bytes) for model in models)
    pairs = _turns(models, (ours, peer), tokens, smoke)
    return {"batches": [ours, peer], "turns": [(mine / ours, theirs / peer) for mine, theirs in pairs]}


def judge(cells: Cells) -> list[Finding]:
    """Two-level bootstrap over seeds and turns for steps; over seeds for what is measured once."""
    pair = [result for (arm, _), result in sorted(cells.items()) if arm == PAIR]
    control = [result for (arm, _), result in sorted(cells.items()) if arm == CONTROL]
    measured = [(_speedup(pair, place), _beside(pair, place)) for place in (*LONG_PLACES, (1, 512))]
    like = speedup([pairs for at in result["turns"].values() for pairs in at] for result in control)
    excess = [float(one["cache_bytes"] - one["formula_bytes"]) for result in pair for one in result["whole"]]
    batches = pair[0]["budget"]["batches"]
    measured += [
        (Difference(*map(math.log, (like.effect, like.low, like.high)), like.n), ""),
        (Difference(statistics.mean(excess), min(excess), max(excess), len(excess)), ""),
        (speedup(result["budget"]["turns"] for result in pair), f"{batches[0]} sequences against {batches[1]}."),
        (speedup([_whole_pair(result, "prefill_seconds")] for result in pair), ""),
        (speedup([_whole_pair(result, "seconds")] for result in pair), ""),
    ]
    return [expected.judged(found, note) for expected, (found, note) in zip(EXPECTED, measured, strict=True)]


def _speedup(results: list[dict[str, JSONValue]], place: tuple[int, int]) -> Difference:
    return speedup(result["turns"][name(place)] for result in results)


def _whole_pair(result: dict[str, JSONValue], key: str) -> tuple[float, float]:
    ours, peer = result["whole"]
    return ours[key], peer[key]


def _beside(results: list[dict[str, JSONValue]], place: tuple[int, int]) -> str:
    """What stands beside a ratio: the prediction, and the ratio without what a step costs at one token of context."""
    seconds = [
        [statistics.median(pair[side] for result in results for pair in result["turns"][name(at)]) for side in (0, 1)]
        for at in (place, (1, 1))
    ]
    (ours, peer), (ours_least, peer_least) = seconds
    predicted = predicted_ratio(HYBRID, TRANSFORMER, *place)
    more = (peer - peer_least) / (ours - ours_least) if ours > ours_least else math.nan
    return (
        f"{ours * 1e3:.1f} ms a step against {peer * 1e3:.1f}. The bytes predict {predicted:.2f}, measured ÷ predicted "
        f"is {peer / ours / predicted:.2f}. Less a step with one token of context ({ours_least * 1e3:.1f} and "
        f"{peer_least * 1e3:.1f} ms; {ours_least / len(HYBRID.pattern) * 1e3:.2f} and "
        f"{peer_least / len(TRANSFORMER.pattern) * 1e3:.2f} a layer): {more:.2f}."
    )


def draw(cells: Cells, file: Path) -> None:
    """Ratio over cached tokens, measured with its interval and predicted, and the control."""
    from matplotlib.figure import Figure  # an extra: only the picture needs it

    picture = Figure(figsize=(7, 4.2), layout="constrained")
    axes = picture.subplots()
    results = {arm: [one for (of, _), one in sorted(cells.items()) if of == arm] for arm in (PAIR, CONTROL)}
    tokens = [batch * length for batch, length in GRID]
    for arm, colour in ((PAIR, "tab:green"), (CONTROL, "tab:grey")):
        found = [_speedup(results[arm], place) for place in GRID]
        reach = [[one.effect - one.low for one in found], [one.high - one.effect for one in found]]
        axes.errorbar(tokens, [one.effect for one in found], yerr=reach, fmt="o", color=colour, capsize=3, label=arm)
    predicted = [predicted_ratio(HYBRID, TRANSFORMER, *place) for place in GRID]
    axes.plot(tokens, predicted, "_", markersize=16, color="tab:orange", label="predicted from bytes")
    axes.axhline(3, linestyle=":", color="black", linewidth=1)
    axes.axvline(crossover(HYBRID, TRANSFORMER, 1), linestyle="--", color="tab:orange", linewidth=1, label="crossover")
    axes.set(xscale="log", xlabel="cached tokens (batch × context)", ylabel="times faster a step")
    axes.legend()
    picture.savefig(file)


CLAIM = Claim(
    name="hybrid-decode",
    paper="arXiv 2504.03624",
    title=(__doc__ or "").splitlines()[0],
    arms=(PAIR, CONTROL),
    seeds=SEEDS,
    smoke_seeds=SMOKE_SEEDS,
    measure=measure,
    expected=EXPECTED,
    judge=judge,
    figure=draw,
    workers=1,
    limits="""
The models have random weights: nothing here speaks of quality. Contexts are filled with random numbers, not read, but
for the prompt of 16,384 tokens. One CPU thread and float32: on a GPU the ratio of bytes is the same, the ratio of
what a kernel costs is not. The paper's number holds the reading of the prompt, other engines' batches and bf16 caches.
The Transformer has no rotary positions, which makes it a little faster than one that is trained would be.
""",
)
