"""The claim on FP8: its emulated bf16, its mean loss, and its verdicts on numbers made up for the purpose."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent
PRODUCTS = """
import json, torch
from claims.fp8 import MODEL, batch_mean, round_to_bf16
from bloomery.model.decoder import Decoder
model = Decoder(MODEL)
linear = model.layers[0].mixer.in_proj
x, dy = torch.randn(2, 5, 64), torch.randn(2, 5, linear.out_features)
r = lambda t: t.bfloat16().double()
round_to_bf16(model)
given = x.clone().requires_grad_()
y = linear(given)
y.backward(dy)
exact = [r(x) @ r(linear.weight).T, r(dy) @ r(linear.weight), r(dy).flatten(0, 1).T @ r(x).flatten(0, 1)]
errors = [((a - b).norm() / b.norm()).item() for a, b in zip((y, given.grad, linear.weight.grad), exact)]
coarse = ((y - x @ linear.weight.T).norm() / y.norm()).item()
print(json.dumps([errors, coarse]))
"""
VERDICTS = """
import json, random, sys
from claims.fp8 import ARMS, judge
shift = json.loads(sys.argv[1])
cells = {}
for seed in range(5):
    for arm in ARMS:
        draw = random.Random(seed)
        level = (1 + 0.001 * seed) * (1 + shift.get(arm, 0.0))
        rows = [level * draw.uniform(1.9, 2.1) for _ in range(30)]
        mean = sum(rows) / len(rows)
        quarters = {f"validation loss, quarter {q}": mean for q in (1, 2, 3, 4)}
        cells[arm, seed] = {"rows": rows, "steps": rows, "validation loss, last tenth": mean, **quarters}
print(json.dumps([[f.verdict, f.effect, f.note] for f in judge(cells)]))
"""


def run(script: str, *arguments: str):
    """In a process of its own, started at the root, as claims are."""
    command = [sys.executable, "-c", script, *arguments]
    return json.loads(subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout)


def test_the_baseline_rounds_operands_and_nothing_else():
    errors, coarse = run(PRODUCTS)
    assert max(errors) < 1e-6
    assert coarse > 1e-3


@pytest.mark.parametrize(
    ("shift", "verdicts"),
    [
        ({"no-scaling": 0.1, "e5m2": 0.02}, ["shown", "shown", "shown", "shown"]),
        ({"fp8": 0.1, "no-scaling": 0.2, "e5m2": 0.05}, ["not shown", "not shown", "shown", "not shown"]),
    ],
)
def test_verdicts(shift, verdicts):
    found = run(VERDICTS, json.dumps(shift))
    assert [verdict for verdict, _, _ in found] == verdicts
    effects = [effect for _, effect, _ in found]
    recipe = shift.get("fp8", 0.0)
    expected = [recipe, recipe, shift["no-scaling"] - recipe, shift["e5m2"] - recipe]
    assert effects == pytest.approx(expected, abs=1e-9)
    by_quarter = ", ".join([f"{100 * recipe:+.2f}"] * 4)
    assert f"fp8 {by_quarter};" in found[0][2]
