"""The parent's side: one bubblewrap, one warm interpreter in it, any number of programs one after the other."""

import json
import os
import secrets
import select
import shutil
import struct
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bloomery.errors import SandboxError
from bloomery.verify.sandbox import cgroup

Outcome = Literal["done", "error", "cpu", "wall", "output"]
INSTALL = "install bubblewrap (Debian and Ubuntu: apt-get install bubblewrap; Fedora: dnf install bubblewrap)"
_HERE = Path(__file__).parent
_INSIDE, _PYTHON = "/sandbox", "/python"
_PYTHON_LIBRARY = f"{_PYTHON}/lib/python{sys.version_info.major}.{sys.version_info.minor}"
_INSTALLED = "site-packages", "dist-packages"  # inside the standard library's folder; Debian has the second, or neither
_OPEN_FOLDERS = (_PYTHON, f"{_PYTHON}/bin", f"{_PYTHON}/{sys.platlibdir}", f"{_PYTHON}/lib", "/dev", "/tmp")
_FIRST_UID = 1_000_000_000
_START_SECONDS, _GRACE_SECONDS = 60.0, 20.0
_SIZES = struct.Struct("=II")


@dataclass(frozen=True)
class Limits:
    """What one test case may use."""

    cpu_seconds: float = 6.0
    memory_bytes: int = 512 << 20
    output_bytes: int = 1 << 20
    disk_bytes: int = 16 << 20

    @property
    def wall_seconds(self) -> float:
        """How long a case may go without doing anything. Verdicts on time are given by processor time, which a busy
        machine does not change."""
        return 5 * self.cpu_seconds + 1

    @property
    def patience_seconds(self) -> float:
        """How long the answer to a case can take, on any machine."""
        return 6 * self.wall_seconds + _GRACE_SECONDS


@dataclass(frozen=True)
class CaseRun:
    """What became of one case. `output` is what it wrote, or for a call what it returned, as JSON; empty unless
    `done`. `reason` is the end of its error output."""

    outcome: Outcome
    output: bytes
    reason: str
    cpu_seconds: float
    wall_seconds: float


_CRASHED = CaseRun("error", b"", "the interpreter crashed while compiling the program", 0.0, 0.0)


class Sandbox:
    """Runs untrusted programs. One thread at a time; starts at the first program; `close` leaves no process behind.

    Raises `SandboxError` where programs cannot be isolated: there is no weaker fall-back.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._group: cgroup.Group | None = None

    @contextmanager
    def program(
        self, source: str, function: str | None = None, limits: Limits = Limits()
    ) -> Iterator[Callable[[bytes], CaseRun]]:
        """A function that runs `source` on one input, in namespaces that no other program has seen.

        Without `function` the input is standard input; with it, a JSON list of its arguments.
        """
        process = self._running()
        nonce = secrets.token_hex(16)
        request = {
            "nonce": nonce, "kind": "call" if function else "stdin", "function": function,
            "cpu_seconds": limits.cpu_seconds, "wall_seconds": limits.wall_seconds,
            "memory_bytes": limits.memory_bytes, "output_bytes": limits.output_bytes, "disk_bytes": limits.disk_bytes,
        }  # fmt: skip
        try:
            _send(process, request, source.encode("utf-8", "surrogatepass"))
            yield lambda given: self._case(process, given, nonce, bool(function), limits)
            if self._process is not None:
                _send(process, {"end": True})
                self._end(process)
        except BaseException:
            self.close()  # whatever is in the pipes belongs to nobody
            raise

    def start(self) -> None:
        """Have it ready; otherwise the first program starts it."""
        self._running()

    def close(self) -> None:
        """Ends everything inside, at once."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()  # the processes inside die with it
            with process:
                pass
        if self._group is not None:
            self._group.remove()
            self._group = None

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._group = cgroup.Group.create()
            self._process = _start(self._group)
        return self._process

    def _case(
        self, process: "subprocess.Popen[bytes]", given: bytes, nonce: str, call: bool, limits: Limits
    ) -> CaseRun:
        if self._process is None:
            return _CRASHED
        _send(process, {}, given)
        header, body = _receive(process, limits.patience_seconds)
        if header.get("idle"):  # the interpreter died of this source; what it was sent lies unread in the pipe
            self.close()
            return _CRASHED
        if header.get("nonce") != nonce or header["outcome"] == "failed":
            raise SandboxError(f"sandbox: a case could not be run: {header}; run `bloomery sandbox check`")
        outcome, output = header["outcome"], body
        if outcome == "done" and call:
            output = _framed(body, nonce.encode())
            outcome = "done" if output else "error"
        if outcome == "done" and header["cpu_seconds"] > limits.cpu_seconds:
            outcome = "cpu"
        kept = output if outcome == "done" else b""
        return CaseRun(outcome, kept, header["reason"], header["cpu_seconds"], header["wall_seconds"])

    def _end(self, process: "subprocess.Popen[bytes]") -> None:
        header, _ = _receive(process, _GRACE_SECONDS)
        if not header.get("idle"):
            raise SandboxError(f"sandbox: expected the end of a program, found {header}; run `bloomery sandbox check`")


def _framed(body: bytes, nonce: bytes) -> bytes:
    """What stands between two nonces; empty when the frame is missing, cut or doubled."""
    inner = body[len(nonce) : -len(nonce)]
    whole = len(body) > 2 * len(nonce) and body.startswith(nonce) and body.endswith(nonce)
    return inner if whole and nonce not in inner else b""


def command() -> list[str]:
    """bubblewrap around the interpreter: its own libraries read-only, nothing else of this machine."""
    program = shutil.which("bwrap")
    if program is None:
        raise SandboxError(f"sandbox: bwrap is not installed, and programs never run without it; {INSTALL}")
    root = os.geteuid() == 0
    uid = _FIRST_UID + os.getpid() if root else os.geteuid()  # one user a worker: none can signal another
    binds = {folder: folder for folder in ("/usr/lib", "/usr/lib64", "/lib", "/lib64")} | _interpreter()
    binds |= {str(_HERE): _INSIDE}
    installed = (name for name in _INSTALLED if Path(sysconfig.get_path("stdlib"), name).is_dir())
    hidden = [f"{_PYTHON_LIBRARY}/{name}" for name in installed]
    devices = [part for name in ("null", "zero", "urandom") for part in ("--dev-bind", f"/dev/{name}", f"/dev/{name}")]
    privileges = ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"] if root else []
    environment = {
        "PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8", "TZ": "UTC", "OMP_NUM_THREADS": "1",
        "LD_LIBRARY_PATH": f"{_PYTHON}/lib",
    }  # fmt: skip
    return [
        program, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try",
        *([] if root else ["--unshare-user"]), *privileges, "--die-with-parent", "--new-session", "--clearenv",
        *(part for name, value in environment.items() for part in ("--setenv", name, value)),
        *(part for folder in _OPEN_FOLDERS for part in ("--perms", "0755", "--dir", folder)),
        *(part for there, here in binds.items() if Path(there).exists() for part in ("--ro-bind", there, here)),
        *devices, *(part for folder in hidden for part in ("--tmpfs", folder)), "--proc", "/proc",
        *(part for folder in [*hidden, "/"] for part in ("--remount-ro", folder)), "--chdir", "/", "--",
        f"{_PYTHON}/bin/python", "-I", "-S", "-B", f"{_INSIDE}/inside.py", str(uid),
    ]  # fmt: skip


def _interpreter() -> dict[str, str]:
    """The interpreter, its standard library and its shared library, brought to a place that anyone may enter."""
    executable = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    shared = Path(sysconfig.get_config_var("LIBDIR") or "", sysconfig.get_config_var("INSTSONAME") or "")
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return {
        executable: f"{_PYTHON}/bin/python",
        sysconfig.get_path("platstdlib"): f"{_PYTHON}/{sys.platlibdir}/{version}",
        sysconfig.get_path("stdlib"): _PYTHON_LIBRARY,
        **({str(shared): f"{_PYTHON}/lib/{shared.name}"} if shared.suffix != ".a" and shared.is_file() else {}),
    }


def _start(group: "cgroup.Group | None") -> "subprocess.Popen[bytes]":
    arguments = command() if group is None else group.joining(command())
    process = subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, env={},
        start_new_session=True,  # Ctrl-C is for the parent
    )  # fmt: skip
    try:
        ready, _ = _receive(process, _START_SECONDS)
    except SandboxError:
        process.kill()
        said = process.communicate()[1].decode(errors="replace").strip()[-500:]
        raise SandboxError(
            f"sandbox: bubblewrap could not start: {said or 'no message'}; expected user namespaces to be allowed "
            "(sysctl kernel.unprivileged_userns_clone=1, or in a container --security-opt seccomp=unconfined)"
        ) from None
    if not ready["ready"]:
        process.kill()
        process.communicate()
        raise SandboxError(
            f"sandbox: programs cannot be given namespaces of their own: {ready['reason']}; expected nested user "
            "namespaces to be allowed (sysctl user.max_user_namespaces above 0)"
        )
    return process


def _send(process: "subprocess.Popen[bytes]", header: dict[str, Any], body: bytes = b"") -> None:
    assert process.stdin is not None
    head = json.dumps(header).encode()
    rest = memoryview(_SIZES.pack(len(head), len(body)) + head + body)
    try:
        while rest:
            rest = rest[process.stdin.write(rest) :]
    except BrokenPipeError:
        raise SandboxError("sandbox: it ended unexpectedly; run `bloomery sandbox check`") from None


def _receive(process: "subprocess.Popen[bytes]", seconds: float) -> tuple[dict[str, Any], bytes]:
    deadline = time.monotonic() + seconds
    head, body = _SIZES.unpack(_read(process, _SIZES.size, deadline))
    header: dict[str, Any] = json.loads(_read(process, head, deadline))
    return header, _read(process, body, deadline)


def _read(process: "subprocess.Popen[bytes]", size: int, deadline: float) -> bytes:
    assert process.stdout is not None
    parts = bytearray()
    while len(parts) < size:
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
        part = process.stdout.read(size - len(parts)) if ready else b""
        if not part:
            raise SandboxError("sandbox: no answer within its time" if not ready else "sandbox: it ended unexpectedly")
        parts += part
    return bytes(parts)
