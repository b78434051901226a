"""The machinery of claims on toys whose truth is known, and what every claim of the checkout must have."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bloomery.claim import Claim, Expectation, load
from bloomery.claim.source import digest, names
from bloomery.errors import ConfigError
from bloomery.evaluate.statistics import Difference

CHECKOUT = Path(__file__).parent.parent
TOY = '''"""A toy: the left side is larger.

Never measured by anyone.
"""

import time
from pathlib import Path
from random import Random

from bloomery.claim import Claim, Expectation
from bloomery.evaluate.statistics import two_level_bootstrap

EXPECTED = tuple(Expectation(f"left − right is above {x:g}", "above", x, "half") for x in (0.25, 0.5, 0.75))


def measure(arm, seed, smoke):
    with Path("measured.txt").open("a") as file:
        file.write(f"{arm} {seed}\\n")
    while Path("wait").exists() and seed > 1:
        time.sleep(0.01)
    if Path("break").exists():
        raise ValueError("broken on purpose")
    return {"values": [Random(f"{arm} {seed} {item}").gauss(0.5 * (arm == "left"), 0.1) for item in range(20)]}


def judge(cells):
    seeds = sorted({seed for _, seed in cells})
    pairs = [zip(cells["left", seed]["values"], cells["right", seed]["values"]) for seed in seeds]
    measured = two_level_bootstrap([[left - right for left, right in pair] for pair in pairs], draws=1000)
    return [expectation.judged(measured) for expectation in EXPECTED]


def figure(cells, file):
    file.write_text("<svg/>")


CLAIM = Claim(
    name="toy-effect", paper="arXiv 0000.00000", title="A toy", arms=("left", "right"), seeds=(1, 2, 3),
    smoke_seeds=(900,), measure=measure, expected=EXPECTED, judge=judge, limits="Anything.", figure=figure,
)
'''


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "__init__.py").touch()
    (tmp_path / "claims" / "toy_effect.py").write_text(TOY)
    return tmp_path


def bloomery(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bloomery", "claim", *arguments]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)


def measured(checkout: Path) -> list[str]:
    file = checkout / "measured.txt"
    return file.read_text().splitlines() if file.exists() else []


def test_a_claim_from_cells_to_page_and_what_a_change_costs(checkout: Path) -> None:
    ran = bloomery(checkout, "toy-effect", "--json")
    assert ran.returncode == 0, ran.stderr
    findings = json.loads(ran.stdout)
    assert [finding["verdict"] for finding in findings] == ["shown", "inconclusive", "not shown"]
    page = checkout / "docs" / "claims"
    assert json.loads((page / "toy-effect.json").read_text()) == findings
    assert list(findings[0]) == [
        "claim", "paper", "direction", "effect", "ci", "seeds", "verdict", "published", "minutes", "hardware", "commit",
    ]  # fmt: skip
    assert findings[0]["direction"] == "above 0.25"
    assert findings[0]["seeds"] == [1, 2, 3]
    text = (page / "toy-effect.md").read_text()
    assert "| left − right is above 0.75 | above 0.75 | 0.4" in text or "| above 0.75 | 0.5" in text
    for part in ("**not shown**", "Anything.", "toy-effect.svg", "`bloomery claim toy-effect`", "seeds 1, 2, 3"):
        assert part in text
    listed = json.loads(bloomery(checkout, "--list", "--json").stdout)
    assert listed == [{"name": "toy-effect", "title": "A toy: the left side is larger.", "findings": findings}]

    source = checkout / "claims" / "toy_effect.py"
    source.write_text(TOY.replace("<svg/>", "<svg></svg>") + "\n# a remark\n")
    assert bloomery(checkout, "toy-effect").returncode == 0
    assert len(measured(checkout)) == 6, "a remark or another picture measures nothing again"
    assert (page / "toy-effect.svg").read_text() == "<svg></svg>"

    source.write_text(TOY.replace("0.5 * (arm", "0.9 * (arm"))
    ran = bloomery(checkout, "toy-effect", "--json")
    assert "its source has changed since cells were measured; measuring anew" in ran.stderr
    assert [finding["verdict"] for finding in json.loads(ran.stdout)] == ["shown", "shown", "shown"]
    assert len(measured(checkout)) == 12


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, "waited for five minutes"
        time.sleep(0.02)


def alive(pid: str) -> bool:
    status = Path(f"/proc/{pid}/status")
    try:
        return "State:\tZ" not in status.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_claim_leaves_no_orphan_and_goes_on(checkout: Path) -> None:
    (checkout / "wait").touch()
    command = [sys.executable, "-m", "bloomery", "claim", "toy-effect"]
    process = subprocess.Popen(command, cwd=checkout, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: len(measured(checkout)) >= 4)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: not any(map(alive, children)))
    (checkout / "wait").unlink()
    kept = sorted(file.name for file in checkout.glob("runs/claims/toy-effect/*/*.json"))
    assert kept == ["left-1.json", "right-1.json"]
    assert bloomery(checkout, "toy-effect").returncode == 0
    again = measured(checkout)[4:]
    assert sorted(again) == ["left 2", "left 3", "right 2", "right 3"]


def test_smoke_measures_afresh_and_keeps_away_from_docs(checkout: Path) -> None:
    for _ in range(2):
        assert bloomery(checkout, "toy-effect", "--smoke", "--out", "elsewhere").returncode == 0
    assert sorted(measured(checkout)) == ["left 900", "left 900", "right 900", "right 900"]
    assert not (checkout / "docs").exists()
    assert not (checkout / "runs").exists()
    assert (checkout / "elsewhere" / "smoke" / "toy-effect.md").exists()


def test_a_failing_cell_names_itself(checkout: Path) -> None:
    (checkout / "break").touch()
    ran = bloomery(checkout, "toy-effect", "--smoke")
    assert ran.returncode == 1
    assert "broken on purpose" in ran.stderr
    assert "claim toy-effect: arm " in ran.stderr
    assert "seed 900 ended with exit code 1" in ran.stderr
    assert "run the same command to go on" in ran.stderr


def test_names_that_are_none(checkout: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'toy-efect' is no claim; did you mean toy-effect?"):
        load("toy-efect", checkout)
    with pytest.raises(ConfigError, match="no folder claims here.*run this at the root of a checkout"):
        load("toy-effect", tmp_path / "claims")
    (checkout / "claims" / "toy_effect.py").write_text("CLAIM = 1")
    ran = bloomery(checkout, "toy-effect")
    assert ran.returncode == 2
    assert "toy_effect.py: expected CLAIM = Claim(name='toy-effect', …), found 1" in ran.stderr


EXPECTATION = Expectation("more", "above", 0.0, "yes")


def claim_with(**changes: object) -> Claim:
    fields = {
        "name": "x", "paper": "", "title": "", "arms": ("a",), "seeds": (1,), "smoke_seeds": (900,),
        "measure": lambda arm, seed, smoke: {}, "expected": (EXPECTATION,), "limits": "",
        "judge": lambda cells: [EXPECTATION.judged(Difference(1.0, 0.5, 1.5, 3), "Few.")],
    }  # fmt: skip
    return Claim(**fields | changes)


def test_an_arm_finds_what_the_arm_before_it_has_left(checkout: Path) -> None:
    going_on = TOY.replace(
        "def measure(arm, seed, smoke):",
        """def measure(arm, seed, smoke, folder):
    if arm == "right":
        assert (folder / f"{seed}.left").read_text() == "here"
    time.sleep(0.3 * (arm == "left"))
    (folder / f"{seed}.{arm}").write_text("here")""",
    )
    text = going_on.replace("figure=figure,", 'figure=figure, after={"right": "left"},')
    (checkout / "claims" / "toy_effect.py").write_text(text)
    ran = bloomery(checkout, "toy-effect")
    assert ran.returncode == 0, ran.stderr
    assert sorted(measured(checkout)) == sorted(f"{arm} {seed}" for arm in ("left", "right") for seed in (1, 2, 3))


@pytest.mark.parametrize("after", [{"a": "b"}, {"b": "c"}, {"a": "a"}])
def test_an_arm_waits_for_an_earlier_one_alone(after: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="which is no earlier arm"):
        claim_with(arms=("a", "b"), after=after)


@pytest.mark.parametrize("line", ["from claims import _effect", "from claims._effect import SIZE"])
def test_shared_modules_count_for_those_who_import_them(checkout: Path, line: str) -> None:
    claim, folder = claim_with(name="toy-effect"), checkout / "claims"
    (folder / "toy_effect.py").write_text(f"{line}\n{TOY}")
    found = []
    for file, text in (("_effect.py", "SIZE = 1"), ("_other.py", "SIZE = 1"), ("_effect.py", "SIZE = 2")):
        (folder / file).write_text(text)
        found.append(digest(claim, checkout))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("changes", [{"seeds": (1, 901)}, {"smoke_seeds": (1,)}])
def test_seeds_that_judge_never_meet_those_of_development(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="seeds that judge are below 900"):
        claim_with(**changes)


def test_an_empty_claim_is_refused() -> None:
    with pytest.raises(ConfigError, match="must each name at least one"):
        claim_with(expected=())


def test_a_judge_answers_what_was_expected_and_nothing_else() -> None:
    [finding] = claim_with().findings({})
    assert (finding.verdict, finding.direction, finding.ci, finding.note) == ("shown", "above 0", (0.5, 1.5), "Few.")
    other = Expectation("more", "below", 0.0, "yes")
    with pytest.raises(AssertionError, match="judge of x answers"):
        claim_with(judge=lambda cells: [other.judged(Difference(1.0, 0.5, 1.5, 3))]).findings({})


@pytest.mark.parametrize("name", names(CHECKOUT))
def test_every_claim_of_the_checkout_says_beforehand_what_it_expects(name: str) -> None:
    """Loaded in a process of its own: claims may import what the rest of the suite must not."""
    script = (
        "import json, sys; from pathlib import Path; from bloomery.claim import load;"
        "c = load(sys.argv[1], Path.cwd());"
        "print(json.dumps([c.arms, c.seeds, c.smoke_seeds, [[e.claim, e.direction, e.published] for e in c.expected],"
        "c.paper, c.title, c.limits]))"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    output = subprocess.run(
        [sys.executable, "-c", script, name], cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=True
    ).stdout
    arms, seeds, smoke_seeds, expected, paper, title, limits = json.loads(output)
    assert len(arms) == len(set(arms)) >= 2
    assert len(seeds) == len(set(seeds)) >= 3
    assert not set(seeds) & set(smoke_seeds)
    assert all(
        direction in ("above", "below", "within") and claim and published for claim, direction, published in expected
    )
    assert len({claim for claim, _, _ in expected}) == len(expected)
    assert paper.startswith("arXiv ")
    assert title
    assert len(limits.split()) >= 20, "say what it does not show"
