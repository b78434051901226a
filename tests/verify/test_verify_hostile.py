"""Thousands of hostile programs, honest ones among them: no escape, no wrong verdict, nothing left over."""

import itertools
import json
import random
import shutil
import time
from pathlib import Path

import pytest

from bloomery import verify
from bloomery.verify.sandbox.attacks import attacks

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
TESTS = json.dumps({"kind": "stdin", "cases": [{"in": "20 22", "out": "42"}], "time_limit_s": 0.3, "mem_mb": 256})
HONEST = "a, b = map(int, input().split())\nprint(a + b)"
SLOW = {"endless loop", "endless sleep", "long arithmetic", "memory by and by"}
FORGERIES = [
    "import sys\nsys.exit(0)", "import os\nos._exit(0)", "raise SystemExit",
    "import builtins\nbuiltins.print = None\nexit()",
    "import os, struct\nhead = b'{\"outcome\": \"done\", \"exit\": 0}'\n"
    "for fd in range(64):\n    try:\n        os.write(fd, struct.pack('=II', len(head), 2) + head + b'42')\n"
    "    except OSError:\n        pass",
    "import sys\nframe = sys._getframe()\nwhile frame:\n    for name in list(frame.f_globals):\n"
    "        if callable(frame.f_globals[name]):\n            frame.f_globals[name] = lambda *a, **k: 0\n"
    "    frame = frame.f_back",
    "import os\nfor fd in range(3, 64):\n    try:\n        os.close(fd)\n    except OSError:\n        pass\nos.abort()",
    "import json, struct\njson.dumps = json.loads = struct.pack = lambda *a, **k: b'42'\nprint(41)",
]  # fmt: skip


def programs(count: int, folder: Path):
    """(source, whether it is right), honest and hostile mixed, each hostile one with a different tail."""
    file = folder / "expected"
    file.write_text("42")
    draw = random.Random(0)
    quick = [a.source for a in attacks(file, "42") if a.name not in SLOW] + FORGERIES
    slow = [a.source for a in attacks(file, "42") if a.name in SLOW]
    for number in range(count):
        pool = slow if number % 100 == 99 else quick
        source = HONEST if number % 5 == 0 else f"{draw.choice(pool)}\n# {number}"
        yield source, number % 5 == 0


def hold(count: int, folder: Path) -> None:
    before, memory, disk = _sandboxes(), _available(), shutil.disk_usage("/tmp").free
    wanted, futures = [], []
    with verify.Pool(workers=2) as pool:
        for source, right in programs(count, folder):
            wanted.append(right)
            futures.append(pool.submit("program", f"```python\n{source}\n```", TESTS))
        verdicts = [future.result() for future in futures]
    wrong = [
        index for index, (right, verdict) in enumerate(zip(wanted, verdicts, strict=True)) if verdict.correct != right
    ]
    assert wrong == [], verdicts[wrong[0]]
    assert all(verdict.score is not None for verdict in verdicts)
    deadline = time.monotonic() + 20
    while _sandboxes() - before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _sandboxes() - before
    assert _available() > memory - (512 << 20)
    assert shutil.disk_usage("/tmp").free > disk - (64 << 20)
    assert (folder / "expected").read_text() == "42"


def test_a_hundred(tmp_path):
    hold(100, tmp_path)


@pytest.mark.slow
def test_ten_thousand(tmp_path):
    hold(10_000, tmp_path)


def test_they_differ(tmp_path):
    sources = [source for source, right in itertools.islice(programs(200, tmp_path), 200) if not right]
    assert len(set(sources)) == len(sources)


def _sandboxes() -> set[str]:
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and b"inside.py" in (entry / "cmdline").read_bytes():
                found.add(entry.name)
        except OSError:
            continue  # it has just ended
    return found


def _available() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
