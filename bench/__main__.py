"""Run every comparison in this folder and write `docs/benchmarks.json` and `docs/benchmarks.md`.

`python -m bench` takes all of them, `python -m bench train generate` some; each prints one JSON line per figure.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from bloomery.claim.page import hardware

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"


def main(names: list[str]) -> None:
    chosen = names or sorted(
        file.stem for file in HERE.glob("*.py") if file.stem not in ("figure", "peers") and file.stem[0] != "_"
    )
    figures = {figure["name"]: figure for figure in _previous()}
    for name in chosen:
        load = os.getloadavg()[0]
        for figure in _measure(name):
            figure |= {"date": time.strftime("%Y-%m-%d"), "machine": hardware(), "load_before": round(load, 2)}
            figures[figure["name"]] = figure
    _write([figures[name] for name in sorted(figures)])


def _measure(name: str) -> list[dict[str, object]]:
    command = [sys.executable, "-m", f"bench.{name}"]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    print(output, end="", flush=True)
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def _previous() -> list[dict[str, object]]:
    file = DOCS / "benchmarks.json"
    return json.loads(file.read_text()) if file.exists() else []


INTRODUCTION = """# Benchmarks

Both sides run in one go on the same machine, alternating, one thread pinned where it matters; each figure is a median.
A ratio above 1 means bloomery is better. `make bench` measures them again; what a figure does is told at the top of its
file in `bench/`.

Machine: {machine}

| figure | ours | peer | unit | ratio | spread | date | load before |
|---|---|---|---|---|---|---|---|
"""


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _row(figure: dict[str, object]) -> str:
    name, ours, peer, ratio = (figure[key] for key in ("name", "ours", "peer", "ratio"))
    rest = " | ".join(str(figure[key]) for key in ("spread", "date", "load_before"))
    return f"| `{name}` | {_rounded(ours)} | {_rounded(peer)} | {figure['unit']} | **{ratio:.2f}×** | {rest} |\n"


def _write(figures: list[dict[str, object]]) -> None:
    (DOCS / "benchmarks.json").write_text(json.dumps(figures, indent=2) + "\n")
    rows = "".join(map(_row, figures))
    (DOCS / "benchmarks.md").write_text(INTRODUCTION.format(machine=figures[-1]["machine"] if figures else "") + rows)


if __name__ == "__main__":
    main(sys.argv[1:])
