"""Run every comparison in this folder and write `docs/benchmarks.json` and `docs/benchmarks.md`.

`python -m bench` takes all of them, `python -m bench train generate` some; each prints one JSON line per figure.
"""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"


def main(names: list[str]) -> None:
    chosen = names or sorted(file.stem for file in HERE.glob("*.py") if "def main(" in file.read_text() and file.stem[0] != "_")
    figures = {figure["name"]: figure for figure in _previous()}
    for name in chosen:
        load = os.getloadavg()[0]
        for figure in _measure(name):
            figure |= {"date": time.strftime("%Y-%m-%d"), "machine": _machine(), "load_before": round(load, 2)}
            figures[figure["name"]] = figure
    _write([figures[name] for name in sorted(figures)])


def _measure(name: str) -> list[dict[str, object]]:
    output = subprocess.run([sys.executable, "-m", f"bench.{name}"], stdout=subprocess.PIPE, text=True, check=True).stdout
    print(output, end="", flush=True)
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def _previous() -> list[dict[str, object]]:
    file = DOCS / "benchmarks.json"
    return json.loads(file.read_text()) if file.exists() else []


def _machine() -> str:
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    return f"{model or platform.processor()}, {os.cpu_count()} cores"


def _write(figures: list[dict[str, object]]) -> None:
    (DOCS / "benchmarks.json").write_text(json.dumps(figures, indent=2) + "\n")
    rows = "".join(
        f"| `{f['name']}` | {f['ours']:,.4g} | {f['peer']:,.4g} | {f['unit']} | **{f['ratio']:.2f}×** | {f['spread']} | {f['date']} | {f['load_before']} |\n"
        for f in figures
    )  # fmt: skip
    (DOCS / "benchmarks.md").write_text(
        "# Benchmarks\n\nBoth sides run in one process or one session on the same machine, alternating, one thread pinned where it "
        "matters; the figure is the median. A ratio above 1 means bloomery is better. `make bench` measures them again.\n\n"
        f"Machine: {figures[-1]['machine'] if figures else ''}\n\n"
        "| figure | ours | peer | unit | ratio | spread | date | load before |\n|---|---|---|---|---|---|---|---|\n" + rows
    )


if __name__ == "__main__":
    main(sys.argv[1:])
