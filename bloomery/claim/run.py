"""A claim from its cells to its page."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bloomery import artifact
from bloomery.claim import cells, page, source
from bloomery.claim.claim import Claim, Finding
from bloomery.progress import say

DOCS = Path("docs", "claims")
_KEYS = (
    "claim", "paper", "direction", "effect", "ci", "seeds", "verdict", "published", "minutes", "hardware", "commit",
)  # fmt: skip


def run(claim: Claim, root: Path, out: Path | None = None, smoke: bool = False) -> list[dict[str, Any]]:
    """Measure what is not measured yet, judge, and write the page; returns the findings as the page's JSON holds them.

    out: where the cells are kept, `runs/claims/NAME` unless given. Cells belong to one state of the claim's source:
    after a change they are measured anew, beside the old ones. A smoke run starts afresh and writes its page there too.
    """
    folder = out or root / "runs" / "claims" / claim.name
    place = folder / ("smoke" if smoke else source.digest(claim, root))
    if smoke:
        shutil.rmtree(place, ignore_errors=True)
    elif not place.exists() and any(file.parent.name != "smoke" for file in folder.glob("*/*.json")):
        say(f"claim {claim.name}: its source has changed since cells were measured; measuring anew in {place}")
    records = cells.measure_all(claim, root, place, smoke)
    findings = claim.findings({cell: record["result"] for cell, record in records.items()})
    described = describe(claim, findings, list(records.values()))
    page.write(place if smoke else root / DOCS, claim, findings, described, records)
    return described


def describe(claim: Claim, findings: list[Finding], records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The findings as JSON values, each with the seeds, minutes, hardware and commit behind it."""
    shared = {
        "paper": claim.paper,
        "seeds": sorted({record["seed"] for record in records}),
        "minutes": round(sum(record["seconds"] for record in records) / 60, 1),
        "hardware": page.hardware(),
        "commit": ", ".join(sorted({record["commit"] for record in records})),
    }
    return [{key: value for key in _KEYS for value in [(asdict(f) | shared)[key]]} for f in findings]


def listing(root: Path) -> list[dict[str, Any]]:
    """Every claim of the checkout with the findings of its last full run, `[]` where there was none."""
    listed = []
    for name in source.names(root):
        file = root / DOCS / f"{name}.json"
        findings = artifact.read_json(file) if file.exists() else []
        listed.append({"name": name, "title": source.title(name, root), "findings": findings})
    return listed
