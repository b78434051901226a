"""The page of a claim: verdicts, picture, what it does not show, and how it was measured."""

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from bloomery import artifact
from bloomery.claim.claim import Claim, Finding
from bloomery.progress import say

_PAGE = """# {title}

Paper: {paper}. Claim `{name}`, judged by rules written down in `claims/{stem}.py` before the seeds below were run.

| claim | shown if the interval lies | effect | 95 % interval | verdict | published |
|---|---|---|---|---|---|
{findings}
{notes}{picture}
## What it does not show
{limits}

## The numbers
Mean over seeds ± their standard deviation.

{means}

## How it was measured
`bloomery claim {name}` · {minutes} minutes of cells, {workers} at once, one thread each · {hardware} · commit {commit}
· seeds {seeds}; sizes and learning rates were chosen on other seeds.
"""


def write(
    folder: Path, claim: Claim, findings: Sequence[Finding], described: Sequence[Mapping[str, Any]],
    records: Mapping[tuple[str, int], Mapping[str, Any]],
) -> None:  # fmt: skip
    """NAME.json, NAME.md and, where it can be drawn, NAME.svg in `folder`."""
    results = {cell: record["result"] for cell, record in records.items()}
    drawn = _draw(claim, results, folder / f"{claim.name}.svg")
    artifact.write_json(folder / f"{claim.name}.json", described)
    shared = described[0]
    text = _PAGE.format(
        title=claim.title, paper=claim.paper, name=claim.name, stem=claim.name.replace("-", "_"),
        findings="\n".join(map(_finding_row, findings)), limits=claim.limits.strip(), means=_means(claim, results),
        notes="".join(f"\n{finding.claim}: {finding.note}\n" for finding in findings if finding.note),
        picture=f"\n![{claim.title}]({claim.name}.svg)\n" if drawn else "", workers=claim.workers,
        minutes=shared["minutes"], hardware=shared["hardware"], commit=shared["commit"] or "unknown",
        seeds=", ".join(map(str, shared["seeds"])),
    )  # fmt: skip
    artifact.write_text(folder / f"{claim.name}.md", text)


def _draw(claim: Claim, results: dict[tuple[str, int], Any], file: Path) -> bool:
    if claim.figure is None:
        return False
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        claim.figure(results, file)
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        say(f"claim {claim.name}: no picture without matplotlib: pip install 'bloomery[claims]', then run it again")
    return file.exists()


def _finding_row(finding: Finding) -> str:
    low, high = finding.ci
    return (
        f"| {finding.claim} | {finding.direction} | {finding.effect:.4g} | {low:.4g} to {high:.4g} "
        f"| **{finding.verdict}** | {finding.published} |"
    )


def _means(claim: Claim, results: Mapping[tuple[str, int], Mapping[str, Any]]) -> str:
    """A row for each number a cell of the first arm reports, a column for each arm; – where it has no such number."""
    first = next(iter(results.values()))
    names = [name for name, value in first.items() if isinstance(value, int | float) and not isinstance(value, bool)]
    head = ["| |" + "".join(f" {arm} |" for arm in claim.arms), "|---" * (len(claim.arms) + 1) + "|"]
    rows = []
    for name in names:
        columns = [
            [result[name] for (arm, _), result in results.items() if arm == wanted and name in result]
            for wanted in claim.arms
        ]
        rows.append(f"| {name} |" + "".join(f" {_spread(values)} |" for values in columns))
    return "\n".join(head + rows)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    if all(isinstance(value, int) for value in values) and len(set(values)) == 1:
        return f"{values[0]:,}"
    deviation = stdev(values) if len(values) > 1 else 0.0
    return f"{mean(values):.4g}" + (f" ± {deviation:.2g}" if deviation else "")


def hardware() -> str:
    """The processor and how many cores of it there are."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    return f"{model}, {os.cpu_count()} cores"
