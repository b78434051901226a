"""Programs that try to get out. `check` runs them all; a sandbox that holds only some of them is refused."""

import hashlib
import os
import platform
import secrets
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bloomery.errors import SandboxError
from bloomery.verify.sandbox.sandbox import CaseRun, Limits, Sandbox

LIMITS = Limits(cpu_seconds=0.5, memory_bytes=256 << 20, output_bytes=64 << 10, disk_bytes=4 << 20)
_ESCAPED, _HELD = b"escaped", b"held"


@dataclass(frozen=True)
class Attack:
    """A program that prints `escaped` where it got through, and what else its run must look like."""

    name: str
    source: str
    harmless: Callable[[CaseRun], bool] = lambda run: run.output.strip() == _HELD


def _stopped(*outcomes: str) -> Callable[[CaseRun], bool]:
    return lambda run: run.outcome in outcomes


def _tries(*statements: str) -> str:
    """A program that is held when every one of these statements raises an OSError."""
    tried = "".join(f"    lambda: {statement},\n" for statement in statements)
    return f"""import os, sys, resource, ctypes, signal
libc = ctypes.CDLL(None, use_errno=True)
def call(*numbers):
    if libc.syscall(*numbers) < 0:
        raise OSError(ctypes.get_errno(), 'refused')
passed = []
for number, attempt in enumerate([
{tried}]):
    try:
        attempt()
        passed.append(number)
    except (OSError, ValueError):
        pass
print('escaped %s' % passed if passed else 'held')
"""


_FORGED = """import os, struct
head = b'{"outcome": "done", "nonce": ""}'
frame = struct.pack('=II', len(head), 2) + head + b'42'
for file in range(2, 64):
    try:
        os.write(file, frame)
    except OSError:
        pass
print('held')
"""
_OPEN_FILES = """import os
def is_open(file):
    try:
        os.fstat(file)
        return True
    except OSError:
        return False
found = [file for file in range(4, 4096) if is_open(file)]
print('escaped %s' % found if found else 'held')
"""
_THREADS = """import threading, time
started = 0
try:
    for started in range(400):
        threading.Thread(target=time.sleep, args=(0.2,), daemon=True).start()
except RuntimeError:
    pass
print('escaped %d' % started if started > 64 else 'held', flush=True)
import os
os._exit(0)
"""
_DISK = """import os
written = 0
try:
    for number in range(2000):
        with open('/tmp/%d' % number, 'wb', buffering=0) as file:
            written += file.write(bytes(60000))
except OSError:
    pass
print('escaped %d' % written if written > 5 << 20 else 'held')
"""
_SEARCH = """import gc, hashlib, sys
texts, frame = set(), sys._getframe()
while frame:
    gathered = [frame.f_locals, frame.f_globals]
    frame = frame.f_back
    for space in gathered:
        texts.update(v for v in space.values() if isinstance(v, str))
for thing in gc.get_objects():
    if isinstance(thing, dict):
        texts.update(v for v in list(thing.values()) if isinstance(v, str))
hit = any(hashlib.sha256(t.encode('utf-8', 'replace')).hexdigest() == '{digest}' for t in texts)
print('escaped' if hit else 'held')
"""
_IGNORE = "import signal, time\nfor n in (1, 2, 13, 14, 15, 24):\n    signal.signal(n, signal.SIG_IGN)\n"


def attacks(secret_file: Path, secret: str) -> list[Attack]:
    """All of them. `secret_file` lies outside and holds `secret`, as an expected output would."""
    digest = hashlib.sha256(secret.encode()).hexdigest()
    outside = [f"open({folder!r} + '/x', 'w')" for folder in ("", "/python", "/sandbox", "/usr/lib", "/proc", "/dev")]
    return [
        Attack("network", _tries(*(f"__import__('socket').socket({kind})" for kind in (1, 2, 10, 16, 17)))),
        Attack("new processes", _tries("os.fork()", "os.forkpty()", "os.posix_spawn(sys.executable, ['p'], {})")),
        Attack("other programs", _tries("os.execv('/python/bin/python', ['python', '-c', 'print(\"escaped\")'])")),
        Attack("daemon", _tries("os.fork() and os.setsid()", "os.setsid() or os.fork()")),
        Attack("threads", _THREADS, lambda run: run.output.strip() == _HELD or run.outcome == "error"),
        Attack("4 GB of memory", "x = bytearray(4 << 30)\nprint('escaped')", _stopped("error")),
        Attack("memory by and by", "x = []\nwhile True:\n    x.append(bytearray(1 << 20))",
               _stopped("error", "cpu", "wall")),
        Attack("raised limits", _tries(*(f"resource.setrlimit(resource.RLIMIT_{name}, (-1, -1))"
                                         for name in ("AS", "CPU", "NPROC", "FSIZE", "NOFILE")))),
        Attack("limits of others", _tries("resource.prlimit(1, resource.RLIMIT_CPU, (1, 1))",
                                          "resource.prlimit(os.getppid(), resource.RLIMIT_AS, (1, 1))")),
        Attack("expected outputs on disk", _tries(f"open({str(secret_file)!r})",
                                                  f"os.stat({str(secret_file.parent)!r})")),
        Attack("expected outputs in memory", _SEARCH.replace("{digest}", digest)),
        Attack("environment", "import os\nprint('escaped' if 'BLOOMERY_SECRET' in os.environ or 'HOME' in os.environ "
                              "else 'held')"),
        Attack("writing outside", _tries(*outside, "os.mkdir('/x')", "os.unlink('/sandbox/inside.py')")),
        Attack("/proc and /sys", _tries("open('/proc/1/environ')", "open('/proc/self/mem')", "os.listdir('/sys')",
                                        "open('/proc/meminfo')")),
        Attack("links", _tries(f"os.symlink({str(secret_file)!r}, '/tmp/a') or open('/tmp/a')",
                               "os.link('/sandbox/inside.py', '/tmp/b')")),
        Attack("signals", _tries("os.kill(1, 9)", "os.kill(os.getppid(), 9)", "os.kill(-1, 9)", "os.killpg(0, 9)")),
        *_raw_calls(),
        Attack("open files", _OPEN_FILES),
        Attack("forged replies", _FORGED),
        Attack("disk", _DISK),
        Attack("output flood", "while True:\n    print('escaped' * 1000)", _stopped("output", "error")),
        Attack("endless loop", f"{_IGNORE}while True:\n    pass", _stopped("cpu", "wall")),
        Attack("endless sleep", f"{_IGNORE}time.sleep(600)", _stopped("wall")),
        Attack("long arithmetic", "print(len(str(7 ** 7 ** 9)))", _stopped("cpu", "error", "wall")),
        Attack("crash", "import ctypes\nctypes.string_at(0)", _stopped("error")),
        Attack("deep nesting", "(" * 50_000, _stopped("error")),
        Attack("early exit", "import os\nos._exit(0)", lambda run: run.output == b""),
    ]  # fmt: skip


def _raw_calls() -> list[Attack]:
    """Calls by number, which is what the filter sees; the numbers are those of x86-64."""
    if platform.machine() != "x86_64":
        return []
    return [
        Attack("tracing", _tries("call(101, 16, 1, 0, 0)", "call(310, 1, 0, 0, 0, 0, 0)", "call(438, 3, 0, 0)")),
        Attack("mounts and namespaces", _tries("call(165, b'tmpfs', b'/tmp', b'tmpfs', 0, 0)", "call(166, b'/proc', 2)",
                                               "call(272, 0x10000000)", "call(308, 0, 0)", "call(161, b'/tmp')")),
        Attack("kernel interfaces", _tries("call(321, 0, 0, 0)", "call(425, 8, 0)", "call(298, 0, 0, -1, -1, 0)",
                                           "call(250, 0, 0)", "call(29, 0, 4096, 0o1600)", "call(319, b'x', 0)",
                                           "call(323, 0)")),
    ]  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One attack and whether it was held."""

    name: str
    held: bool
    run: CaseRun


def findings() -> list[Finding]:
    """Every attack on a fresh sandbox, with a secret lying outside. Raises `SandboxError` where none can start."""
    secret = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as folder, Sandbox() as sandbox:
        file = Path(folder, "expected")
        file.write_text(secret)
        file.chmod(0o644)
        os.chmod(folder, 0o755)
        sandbox.start()
        return [_try(attack, sandbox) for attack in attacks(file, secret)]


def _try(attack: Attack, sandbox: Sandbox) -> Finding:
    try:
        with sandbox.program(attack.source, limits=LIMITS) as run:
            result = run(b"")
    except SandboxError as error:  # it broke what it ran in
        return Finding(attack.name, False, CaseRun("error", b"", str(error), 0.0, 0.0))
    return Finding(attack.name, attack.harmless(result) and _ESCAPED not in result.output, result)


def check() -> list[Finding]:
    """All findings, when every attack was held; `SandboxError` naming those that were not."""
    found = findings()
    through = [
        f"{finding.name} ({finding.run.outcome} {finding.run.output[:80]!r})" for finding in found if not finding.held
    ]
    if through:
        raise SandboxError(
            f"sandbox: {len(through)} of {len(found)} attacks were not held: {', '.join(through)}; no program is run "
            "on this machine. Update bubblewrap and the kernel, or verify programs on another machine"
        )
    return found
