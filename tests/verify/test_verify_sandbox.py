"""Untrusted programs: what they may do, what they may not, and what is left of them."""

import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bloomery.errors import SandboxError
from bloomery.verify.sandbox import Limits, Sandbox, attacks, kernel, sandbox

needs_bwrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
SHORT = Limits(cpu_seconds=0.5, memory_bytes=128 << 20, output_bytes=10_000, disk_bytes=1 << 20)


@pytest.fixture(scope="module")
def box():
    with Sandbox() as opened:
        yield opened


def run(box: Sandbox, source: str, given: bytes = b"", function: str | None = None):
    with box.program(source, function, SHORT) as case:
        return case(given)


@needs_bwrap
def test_a_program_reads_and_writes(box):
    with box.program("print(int(input()) * 2)", limits=SHORT) as case:
        assert [case(text).output for text in (b"21\n", b"4\n")] == [b"42\n", b"8\n"]
        failed = case(b"x\n")
    assert (failed.outcome, failed.output) == ("error", b"")
    assert failed.reason.splitlines()[1:2] == ['  File "program.py", line 1, in <module>']
    assert "ValueError: invalid literal" in failed.reason


@needs_bwrap
@pytest.mark.parametrize(
    ("source", "given", "output"),
    [
        ("def f(a, b):\n    return a, [b, {1: 2}]", b'[1, "x"]', b'[1, ["x", {"dict": [[1, 2]]}]]'),
        ("class Solution:\n    def f(self, a):\n        return a + 1", b"[1]", b"2"),
        ("from collections import Counter\ndef f(s):\n    return Counter(s)", b'["aab"]',
         b'{"dict": [["a", 2], ["b", 1]]}'),
        ("def f(x):\n    return {x, 1}", b"[2]", b'{"set": [1, 2]}'),
        ("def f(x):\n    return len(x)", b'"f((1, 2, 3))"', b"3"),
    ],
)  # fmt: skip
def test_a_function_is_called(box, source, given, output):
    assert run(box, source, given, "f").output == output


@needs_bwrap
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("class Liar(int):\n    __eq__ = lambda *_: True\ndef f():\n    return Liar(3)", "a Liar cannot be compared"),
        ("def g():\n    return 1", "no function 'f'"),
        ("def f():\n    x = []\n    x.append(x)\n    return x", "nested more than"),
        ("def f(:\n", "SyntaxError"),
        ("raise RuntimeError('out')", "RuntimeError: out"),
        ("def f():\n    raise SystemExit(3)", ""),
    ],
)
def test_a_call_that_gives_nothing_fails(box, source, reason):
    result = run(box, source, b"[]", "f")
    assert result.outcome == "error"
    assert reason in result.reason


@needs_bwrap
def test_a_reply_that_the_program_forged_is_none(box):
    """It ends before the frame is written, or writes into the frame's file itself."""
    assert run(box, "import os\nos.write(3, b'42')\nos._exit(0)", b"[]", "f").outcome == "error"
    assert run(box, "import os\ndef f():\n    os.write(3, b'1')\n    return 2", b"[]", "f").outcome == "error"


@needs_bwrap
def test_cases_and_programs_see_nothing_of_each_other(box):
    source = "import os\nprint(os.listdir('.'))\nopen('left', 'w').write('x')"
    with box.program(source, limits=SHORT) as case:
        assert [case(b"").output, case(b"").output] == [b"[]\n", b"[]\n"]
    assert run(box, source).output == b"[]\n"
    assert run(box, "import os\nprint(os.getpid(), os.getuid())").output == b"2 1000\n"


@needs_bwrap
def test_the_same_program_gives_the_same(box):
    source = "import os\nprint(hash('a'), sorted(os.environ), len({str(i) for i in range(9)}))"
    assert run(box, source) .output == run(box, source).output  # fmt: skip


@needs_bwrap
def test_what_compiling_may_cost(box):
    """Sources that break the compiler, and the sandbox after them."""
    for source in ("(" * 100_000, "x = " + "-" * 300_000 + "1", "\0", "x = '\ud800'"):
        assert run(box, source).outcome in ("error", "done")
        assert run(box, "print(1)").output == b"1\n"


@needs_bwrap
def test_every_attack_is_held():
    found = attacks.check()
    assert len(found) >= 25
    assert all(finding.held for finding in found)


@needs_bwrap
def test_an_attack_that_gets_through_is_reported(monkeypatch, tmp_path):
    """The same attacks where nothing is taken away: those that a filter or a mount must hold get through."""
    inside = Path(sandbox.__file__).parent
    monkeypatch.setattr(sandbox, "_HERE", _copy_without_filter(inside, tmp_path))
    with pytest.raises(SandboxError, match=r"attacks were not held: .*new processes"):
        attacks.check()


def _copy_without_filter(inside: Path, folder: Path) -> Path:
    folder.chmod(0o755)
    for name in ("inside.py", "kernel.py", "plain.py"):
        text = (inside / name).read_text().replace("    kernel.give_up_privileges()\n", "")
        (folder / name).write_text(text)
        (folder / name).chmod(0o644)
    return folder


@needs_bwrap
def test_nothing_is_left_behind():
    before = _processes()
    with Sandbox() as box:
        run(box, "import time\ntime.sleep(60)")
        run(box, "print(1)")
        assert _processes() - before
    deadline = time.monotonic() + 20
    while _processes() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _processes() - before


def _processes() -> set[str]:
    """Sandboxes that this process has started and those that others run."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and b"/sandbox/inside.py" in (entry / "cmdline").read_bytes():
                found.add(entry.name)
        except OSError:
            continue  # it has just ended
    return found


@needs_bwrap
def test_a_killed_parent_takes_its_sandbox_along(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys, time\nfrom bloomery.verify.sandbox import Sandbox\nbox = Sandbox()\n"
        "with box.program('print(1)') as case:\n    case(b'')\nprint(box._process.pid, flush=True)\ntime.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 20
    while _alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(child)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_without_bubblewrap_nothing_runs(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with (
        pytest.raises(SandboxError, match=r"bwrap is not installed.*apt-get install bubblewrap"),
        Sandbox() as box,
        box.program("print(1)"),
    ):
        pass


def test_a_bubblewrap_that_fails_is_explained(monkeypatch, tmp_path):
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'No permissions to create new namespace' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda _: str(fake))
    with (
        pytest.raises(SandboxError, match=r"No permissions to create new namespace; expected user namespaces"),
        Sandbox() as box,
        box.program("print(1)"),
    ):
        pass


def test_the_filter_names_each_call_once():
    for column in range(2):
        numbers = [pair[column] for pair in kernel.ALLOWED.values() if pair[column] >= 0]
        assert len(numbers) == len(set(numbers))
    forbidden = {"fork", "vfork", "execve", "kill", "socket", "ptrace", "mount", "unshare", "bpf", "memfd_create"}
    assert not forbidden & set(kernel.ALLOWED)
    assert os.path.basename(kernel.__file__) == "kernel.py"


def filtered(number: int, arch: int, argument: int) -> int:
    """What the system-call filter says, by the rules of the Berkeley packet filter."""
    code, at, held = kernel._filter(), 0, 0
    while True:
        operation, met, missed, constant = struct.unpack_from("=HBBI", code, 8 * at)
        at += 1
        if operation == kernel._RETURN:
            return constant
        if operation == kernel._LOAD:
            held = {0: number, 4: arch, 16: argument}[constant]
        else:
            tests = {kernel._EQUAL: held == constant, kernel._AT_LEAST: held >= constant}
            at += met if tests.get(operation, bool(held & constant)) else missed


def test_the_filter_allows_what_is_listed_and_nothing_else():
    listed = {numbers[kernel._COLUMN] for numbers in kernel.ALLOWED.values()} - {-1}
    refused, unknown = kernel._ERROR | 1, kernel._ERROR | 38
    for number in [*range(1000), 1 << 30, 1 << 31, (1 << 32) - 1]:
        for argument in (0, 17, 1 << 16):
            thread = number == kernel._CLONE and argument == 1 << 16
            own = number == kernel._PRLIMIT and argument == 0
            allowed = number in listed or thread or own
            expected = kernel._ALLOW if allowed else unknown if number == kernel._CLONE3 else refused
            assert filtered(number, kernel._AUDIT_ARCH, argument) == expected, (number, argument)
        assert filtered(number, kernel._AUDIT_ARCH ^ 1, 0) == kernel._KILL
