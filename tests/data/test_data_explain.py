"""What a blend will read, right to the token: the published Ultra blend against integers computed independently."""

import json
from fractions import Fraction
from pathlib import Path

import pytest

from bloomery import blends, cli, recipe
from bloomery import config as configs
from bloomery.data.blend_config import BlendConfig
from bloomery.data.explain import explain_config
from bloomery.errors import ConfigError

FIXTURE = Path(__file__).parent / "ultra.yaml"
SEQ_LEN, TOKENS = 8192, 20_000_000_000_000
CHART = """
syn-crawl-high 22.4 23.6, syn-crawl-medium 10.3 6.2, crawl-high 6.5 6.5, crawl-medium-high 5.7 5.7, crawl-medium 4.3 0,
code 14.0 14.0, math 6.4 6.4, multilingual 5.0 5.0, sft-stem 9.2 9.2, sft-code 3.9 3.9, sft-general 1.6 3.9,
finepdfs 4.9 0, finepdfs-medium 0 2.1, finepdfs-high 0 7.6, nemotron-cc-code 2.1 2.1, academic 1.6 1.6,
crawl-plus 1.4 1.4, wiki 0.6 0.6, legal 0 0.1
"""


def rounded(quotas):
    """Largest remainder with exact fractions: the whole parts, and one more for the largest rests."""
    counts = [int(quota) for quota in quotas]
    order = sorted(range(len(quotas)), key=lambda i: (counts[i] - quotas[i], i))
    for index in order[: int(sum(quotas)) - sum(counts)]:
        counts[index] += 1
    return counts


def test_the_ultra_blend_is_right_to_the_token():
    rows = [line.split() for line in CHART.replace("\n", " ").split(",")]
    lengths = rounded([Fraction(TOKENS // SEQ_LEN) * Fraction(share) for share in ("0.75", "0.25")])
    found = blends.explain(FIXTURE)["blend"].as_json()
    assert [phase["tokens"] for phase in found["phases"]] == [length * SEQ_LEN for length in lengths]
    for phase, length in enumerate(lengths):
        shares = [Fraction(row[phase + 1]) for row in rows]
        assert sum(shares) == Fraction("99.9")
        expected = [count * SEQ_LEN for count in rounded([share * length / sum(shares) for share in shares])]
        assert [found["sources"][row[0]]["phases"][phase]["tokens"] for row in rows] == expected
    assert found["tokens"] == sum(source["tokens"] for source in found["sources"].values()) == TOKENS
    assert recipe.check(recipe.load(FIXTURE)[1])["blend"]["phases"] == 2


def config(**settings):
    sources = {
        "web": {"path": "d", "source": "web", "unique_tokens": 1_000_000, "quality": 0.0},
        "math": {"path": "d", "source": "math", "unique_tokens": 50_000, "quality": 2.0, "max_epochs": 4},
    }
    base = {"sources": sources, "tokenizer": "t", "seq_len": 100, "tokens": 1_000_000}
    return configs.build(BlendConfig, {**base, **settings})


TWO = [{"share": 0.6, "weights": {"web": 9, "math": 1}}, {"share": 0.4, "weights": {"web": 8, "math": 2}}]


def test_tokens_and_epochs_of_each_phase_and_of_all():
    found = explain_config(config(phases=TWO)).as_json()
    assert found["sources"]["math"] == {
        "unique_tokens": 50_000, "max_epochs": 4.0, "sequences": 1400, "tokens": 140_000, "epochs": 2.8,
        "phases": [
            {"sequences": 600, "tokens": 60_000, "epochs": 1.2}, {"sequences": 800, "tokens": 80_000, "epochs": 1.6},
        ],
    }  # fmt: skip
    assert found["few"] == []
    assert not found["over"]


def test_a_rule_keeps_to_what_earlier_phases_have_left_of_a_cap():
    rule = {"type": "water-filling", "alpha": 0.5, "beta": 2.0}
    found = explain_config(config(phases=[TWO[0], {"share": 0.4, "rule": rule}])).as_json()["sources"]
    assert found["math"]["epochs"] == pytest.approx(4, abs=0.01)
    unimax = [{"share": 1, "rule": {"type": "unimax"}}]
    assert explain_config(config(phases=unimax)).as_json()["sources"]["math"]["tokens"] == 200_000


@pytest.mark.parametrize("shrunk", [0.5, 1 / 15, 0.01])
def test_downsampling_keeps_the_epochs(shrunk):
    """Of 20 M tokens, so that rounding to sequences is below the 1 % allowed at a hundredth too."""
    sources = {name: {"path": "d", "source": name, "unique_tokens": n}
               for name, n in (("a", 9_000_000), ("b", 700_000), ("c", 250_000))}  # fmt: skip
    phases = [{"share": 0.6, "weights": {"a": 7, "b": 2, "c": 1}}, {"share": 0.4, "weights": {"a": 4, "b": 3, "c": 3}}]
    whole = config(sources=sources, phases=phases, tokens=20_000_000)
    proxy = config(sources=sources, phases=phases, tokens=20_000_000, downsample=shrunk)
    assert proxy.num_sequences == round(whole.num_sequences * shrunk)
    pairs = zip(*(explain_config(one).as_json()["sources"].values() for one in (whole, proxy)), strict=True)
    for one, other in pairs:
        assert other["epochs"] == pytest.approx(one["epochs"], rel=0.01)


def call(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["bloomery", "blend", "explain", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code, capsys.readouterr()


def test_a_cap_that_is_passed_is_shown_and_refused(monkeypatch, capsys, tmp_path):
    file = tmp_path / "blend.yaml"
    file.write_text(configs.dump(config(phases=TWO, tokens=2_000_000)))
    code, said = call(monkeypatch, capsys, file)
    assert code == 2
    assert "sources.math: the plan goes through it 5.60 times, more than max_epochs 4" in said.err
    assert "280,000" in said.out
    code, said = call(monkeypatch, capsys, file, "tokens=1000000", "--json")
    assert code == 0
    assert json.loads(said.out)["blend"]["sources"]["math"]["epochs"] == 2.8


def test_the_picture_is_an_svg(tmp_path):
    pytest.importorskip("matplotlib")
    blends.draw({"blend": explain_config(config(phases=TWO))}, tmp_path / "blend.svg")
    assert "phase 2" in (tmp_path / "blend.svg").read_text() or (tmp_path / "blend.svg").stat().st_size > 5000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights_total": 1, "phases": TWO}, r"phases\.0\.weights: they add up to 10, expected weights_total 1"),
        ({"phases": [{**TWO[0], "floors": {"math": 0.2}}]}, r"weights\.math: its share 0\.1 is below its floor 0\.2"),
        ({"phases": [{**TWO[0], "ramp": 0.1}]}, r"phases\.0\.ramp: no phase before it"),
        ({"phases": [{"share": 1, "weights": {"web": 1, "maths": 1}}]}, r"weights\.maths: no such source; known: web"),
        ({"phases": [{"share": 1}]}, "weights, rule: give exactly one of the two"),
        ({"phases": [{"share": 1, "rule": {"type": "natural", "alpha": 1}}]}, "alpha: without effect under natural"),
        ({"phases": [{"share": 1, "rule": {"type": "temperature"}}]}, "alpha: needed by temperature"),
        ({"phases": [{"share": 1, "rule": {"type": "natural"}, "floors": {"math": 0.1}}]}, "floors: have no effect"),
        ({"phases": TWO, "after_sequences": 3}, "after_sequences: has no effect without after"),
        ({"phases": TWO, "unit": "documents"}, "unit: shares of documents become tokens once they are counted"),
        ({"phases": [{"share": 1, "weights": {"web": -1}}]}, r"weights\.web: found -1\.0"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        explain_config(config(**settings))
