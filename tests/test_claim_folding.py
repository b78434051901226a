"""The claim on folding: its tables, its verdicts on made-up predictions, and the planner's constants."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent
TABLES = """
import json
from collections import Counter
from claims.folding import _asked, SHAPES, out_of_memory, runs
rows = list(runs())
counts = Counter((row.table, row.method) for row in rows)
sizes = {name: [_asked(name, 4096).model.count_parameters(active) / 1e9 for active in (False, True)] for name in SHAPES}
largest = [list(row.mapping.sizes("dense").values()) for row in rows if row.table == 5][-1]
print(json.dumps([[list(key) + [number] for key, number in counts.items()], sizes, largest, sorted(out_of_memory())]))
"""
FITTED = """
import json
from bloomery.parallel.cost import CALIBRATION, ERROR
from claims.folding import _error, _mfu, runs
rows = [row for row in runs() if row.method in ("MCore", "Folding")]
print(json.dumps([_error([_mfu(row, CALIBRATION) for row in rows], rows), ERROR]))
"""
VERDICTS = """
import json, sys
from claims.folding import CLAIM, PLANNER, judge, runs
rows = [[r.table, r.model, r.method, r.gpus, r.mfu] for r in runs() if r.method in ("MCore", "Folding")]
verdicts = []
for wrong, turned, memory in json.loads(sys.argv[1]):
    cells = {}
    for arm in CLAIM.arms:
        factor = wrong if arm == PLANNER else 1.4
        guess = [row[4] * factor * (turned if row[2] == "Folding" else 1) for row in rows]
        cells[arm, 0] = {
            "rows": rows, "seen": guess, "unseen": guess, "measured rows above 80 GB": int(memory > 80),
            "most memory of a measured row, GB": memory, "out of memory": {"a": memory + 9, "b": memory + 20},
            "FSDP, sharded over data alone": {},
        }
    verdicts.append([found.verdict for found in judge(cells)])
print(json.dumps(verdicts))
"""


def run(script: str, *arguments: str):
    """In a process of its own, started at the root, as claims are."""
    command = [sys.executable, "-c", script, *arguments]
    return json.loads(subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout)


def test_the_tables_are_whole():
    counts, sizes, largest, lost = run(TABLES)
    found = {(table, method): number for table, method, number in counts}
    assert {key: found[key] for key in found if key[1] in ("MCore", "Folding")} == {
        (3, "MCore"): 4, (3, "Folding"): 4, (4, "MCore"): 16, (4, "Folding"): 16, (5, "MCore"): 4, (5, "Folding"): 4,
    }  # fmt: skip
    published = {"Mixtral-8x22B": (140.6, 39.2), "Qwen2-57B-A14B": (57.4, 14.2), "Llama3-8x70B": (465, 127)}
    for name, (total, active) in published.items():
        assert sizes[name] == pytest.approx([total, active], rel=5e-3)
    assert largest == [8, 2, 8, 8]
    assert lost == ["FSDP", "Folding on 128 GPUs", "TP+EP+DP"]


def test_the_planner_has_the_constants_of_the_fit():
    error, share = run(FITTED)
    published = (CHECKOUT / "docs" / "claims" / "folding.md").read_text()
    numbers = published.partition("## The numbers")[2].splitlines()
    row = next(line for line in numbers if line.startswith("| error in sample, % |"))
    assert error == pytest.approx(float(row.split("|")[2].split("±")[0]), abs=0.02)
    covered = next(line for line in numbers if line.startswith("| nine in ten unseen rows"))
    assert float(covered.split("|")[2].split("±")[0]) / 100 <= share < 0.2


def test_verdicts():
    right, too_fast, turned = run(VERDICTS, json.dumps([[1.02, 1.0, 75.0], [1.5, 1.0, 81.0], [1.0, 0.6, 65.0]]))
    assert right == ["shown"] * 8
    assert too_fast == ["not shown"] * 2 + ["shown"] * 2 + ["not shown"] * 3 + ["shown"]
    assert [turned[0], turned[1], turned[3], turned[7]] == ["not shown"] * 4
