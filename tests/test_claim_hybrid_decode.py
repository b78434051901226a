"""The verdicts of the decoding claim on cells whose answer is known."""

import math

import pytest

from bloomery.claim import load
from claims import hybrid_decode
from claims.hybrid_decode import CLAIM, CONTROL, PAIR, PLACES


def cells(long: float, short: float = 1.0, control: float = 1.0, extra_bytes: int = 0) -> dict:
    """Five seeds whose turns all say the same: `long` times as fast from 65,536 cached tokens, `short` before."""
    found = {}
    for seed in range(5):
        for arm in (PAIR, CONTROL):
            ratios = {at: (long if math.prod(at) >= 65536 else short) if arm == PAIR else control for at in PLACES}
            pairs = {hybrid_decode.name(at): [(0.01, 0.01 * ratio)] * 3 for at, ratio in ratios.items()}
            found[arm, seed] = {"turns": pairs}
        whole = {"prefill_seconds": 2.0, "seconds": 4.0, "cache_bytes": 100 + extra_bytes, "formula_bytes": 100}
        found[PAIR, seed]["whole"] = [whole, whole | {"prefill_seconds": 3.0, "seconds": 10.0}]
        found[PAIR, seed]["budget"] = {"batches": [15, 2], "turns": [(0.01, 0.07)] * 3}
    return found


def verdicts(**sizes) -> list[str]:
    return [finding.verdict for finding in CLAIM.findings(cells(**sizes))]


def test_all_shown():
    assert set(verdicts(long=4.0)) == {"shown"}


@pytest.mark.parametrize(
    ("sizes", "wrong"),
    [
        ({"long": 2.5}, [0, 1, 2]),
        ({"long": 4.0, "short": 2.0}, [3]),
        ({"long": 4.0, "control": 1.2}, [4]),
        ({"long": 4.0, "extra_bytes": 1}, [5]),
    ],
)
def test_each_expectation_can_fail(sizes, wrong):
    assert [place for place, found in enumerate(verdicts(**sizes)) if found == "not shown"] == wrong


def test_effects_and_what_stands_beside_them():
    found = CLAIM.findings(cells(long=4.0))
    effects = [4, 4, 4, 1, 0, 0, 7, 1.5, 2.5]
    assert [finding.effect for finding in found] == pytest.approx(effects, abs=1e-9)
    assert "The bytes predict 5.27, measured ÷ predicted is 0.76" in found[0].note
    assert "15 sequences against 2" in found[6].note


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    hybrid_decode.draw(cells(long=4.0), tmp_path / "curve.svg")
    assert (tmp_path / "curve.svg").read_text().lstrip().startswith("<?xml")


def test_the_claim_is_found_by_its_name(pytestconfig):
    assert load("hybrid-decode", pytestconfig.rootpath) is CLAIM
