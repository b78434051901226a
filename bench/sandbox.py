"""Verdicts on programs against one `bwrap python` a program, per second of processor time of all processes involved.

Programs are short functions with tests in JSON, right and wrong in turns; every program gets namespaces of its own on
both sides. `sandbox/programs`: one case a program. `sandbox/cases`: CASES cases of one program; the peer, as a plain
runner does, starts an interpreter for each. Our side is the whole verdict (tests read, program run, value compared), in
one process; the peer's time has no comparison.
`python -m bench.sandbox [--quick]` prints one JSON line per figure: per core-second; ratio > 1: we are faster.
"""

import ctypes
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from bench.figure import figure
from bloomery.verify import program

CASES = 50
_SET_CHILD_SUBREAPER = 36
RIGHT = "def f(n):\n    total = 0\n    for i in range(n):\n        total += i * {k}\n    return total\n"
PEER = (
    "bwrap", "--unshare-all", "--die-with-parent", "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev", "--tmpfs",
    "/tmp", os.path.realpath(sys.executable), "-I", "-S", "-c",
)  # fmt: skip
Run = Callable[[], object]


def record(constant: int, cases: int) -> str:
    """Tests of the function with that constant."""
    made = [{"args": [n], "ret": constant * n * (n - 1) // 2} for n in range(10, 10 + cases)]
    return json.dumps({"kind": "call", "fn_name": "f", "cases": made, "time_limit_s": 2})


def ours(programs: int, cases: int) -> Run:
    """`programs` verdicts, every other one right."""
    numbers = itertools.count()

    def run() -> None:
        for _ in range(programs):
            number = next(numbers)
            wrong = cases == 1 and number % 2
            verdict = program.score(record(number, cases), RIGHT.format(k=number + wrong))
            assert verdict.status == ("wrong" if wrong else "correct"), verdict

    return run


def peer(starts: int) -> Run:
    """`starts` interpreters under bubblewrap."""

    def run() -> None:
        for number in range(starts):
            subprocess.run([*PEER, RIGHT.format(k=number) + "print(f(10))"], check=True, stdout=subprocess.DEVNULL)
            _reap()

    return run


def core_seconds(run: Run) -> float:
    """Processor time of this process, of the children it has waited for, and of those that live on."""
    start = _spent()
    run()
    return _spent() - start


def _adopt() -> None:
    """bwrap leaves without waiting for the process it started: have such orphans handed to us, so that they count."""
    ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _reap() -> None:
    """Waits for what was adopted; our own sandbox, which lives on, is no zombie."""
    while any(_state(child) != "S" for child in _children(os.getpid())):
        os.waitpid(-1, os.WNOHANG)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "S"


def _spent() -> float:
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = resource.getrusage(resource.RUSAGE_SELF)
    return own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime + sum(map(_living, _children(os.getpid())))


def _living(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0  # it ended just now
    ticks = sum(int(fields[index]) for index in (11, 12, 13, 14))  # own, and those of children it has waited for
    return ticks / os.sysconf("SC_CLK_TCK") + sum(map(_living, _children(pid)))


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def measure(name: str, mine: Run, my_work: int, theirs: Run, their_work: int, repeats: int) -> dict[str, object]:
    """One figure from alternating runs, after a first one that starts things."""
    _adopt()
    rates: dict[str, list[float]] = {"ours": [], "peer": []}
    for repeat in range(repeats + 1):
        for side, run, work in (("ours", mine, my_work), ("peer", theirs, their_work)):
            seconds = core_seconds(run)
            if repeat:
                rates[side].append(work / seconds)
    bwrap = subprocess.run(["bwrap", "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]
    return figure(name, rates["ours"], rates["peer"], "per core-second", {"bubblewrap": bwrap})


def main() -> None:
    if shutil.which("bwrap") is None:
        sys.exit("bubblewrap is not installed: nothing to measure")
    repeats = 5 if "--quick" in sys.argv else 11
    print(json.dumps(measure("sandbox/programs", ours(40, 1), 40, peer(10), 10, repeats)), flush=True)
    print(json.dumps(measure("sandbox/cases", ours(2, CASES), 2 * CASES, peer(10), 10, repeats)), flush=True)


if __name__ == "__main__":
    main()
