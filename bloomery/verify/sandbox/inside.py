"""What runs in the sandbox: `python -I -S inside.py UID`, started by `Sandbox` under bubblewrap. Standard library only.

A warm process that runs no program itself. For each program it clones a supervisor into fresh namespaces, where the
supervisor is process 1. The supervisor alone talks to the parent; it compiles the program, and forks once a test case.
The case, and nothing else, executes untrusted code: without capabilities, behind the system-call filter, under limits,
with nothing open but its own input and output. Expected outputs never come here.

Messages, both ways: header and body lengths (two uint32), a JSON header, a body of bytes.
"""

import atexit
import gc
import json
import math
import os
import resource
import select
import signal
import struct
import sys
import time
import traceback
from types import CodeType

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import kernel
from plain import plain

WARM = (
    "array bisect cmath collections copy dataclasses datetime decimal enum fractions functools hashlib heapq itertools "
    "math operator re string typing"
)
"""Imported once for all programs. Not `threading` or `random`: what they do after a fork costs more than they."""
UID = int(sys.argv[1])
WORK = "/tmp"
COMPILE_SECONDS, STACK_BYTES, ERROR_CHARS = 10, 64 << 20, 2000
MAX_THREADS, MAX_FILES, MAX_OPEN, MAX_WAITS = 32, 1000, 64, 6
CASE_FAILED = 97  # the case could not be locked up: never the program's fault
HUNG_UP = 98
_SIZES = struct.Struct("=II")


def main() -> None:
    """Serve programs until the parent hangs up."""
    _become()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # with a handler, a case could interrupt its supervisor
    sys.setrecursionlimit(3000)
    _warm_up()
    try:
        if _wait_for(kernel.clone(kernel.NAMESPACES) or _try_out()):
            return None
    except OSError as error:
        return send({"ready": False, "reason": str(error)})
    send({"ready": True})
    while select.select([0], [], [])[0] and (pid := kernel.clone(kernel.NAMESPACES) or _supervise()):
        code = _wait_for(pid)
        if code == HUNG_UP:
            return None
        send({"idle": True, "supervisor": code})


def _warm_up() -> None:
    """Do here once what each fork would otherwise do for itself: imports, and first uses of compiler and codec."""
    for module in WARM.split():
        __import__(module)
    program, _ = _compile(
        b"def f(x):\n    return [x for x in range(3) if x] or 1 / x\ntry:\n    f(0)\nexcept OSError:\n    1"
    )
    assert program
    exec(program, {})  # noqa: S102 - our own
    json.loads(json.dumps(plain({"a": [1, 2.5, None, True]})))
    gc.collect()
    gc.freeze()  # no collection writes to pages that forks share


def _become() -> None:
    if os.getuid() != UID:
        os.setgroups([])
        os.setresgid(UID, UID, UID)
        os.setresuid(UID, UID, UID)


def _wait_for(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _try_out() -> int:
    """In a trial supervisor: can everything be set up that a program needs?"""
    try:
        _isolate(1 << 20)
    except OSError as error:
        send({"ready": False, "reason": str(error)})
        os._exit(1)
    os._exit(0)


def _supervise() -> int:
    """In the supervisor: never returns."""
    code = 1
    try:
        code = _serve_program()
    except OSError as error:
        send({"failed": str(error)})
    finally:
        os._exit(code)


def _serve_program() -> int:
    message = receive()
    if message is None:
        return HUNG_UP
    request, source = message
    _isolate(request["disk_bytes"])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (COMPILE_SECONDS, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    program, problem = _compile(source)
    while (message := receive()) is not None and "end" not in message[0]:
        header, output = _case(program, message[1], request) if program else (problem, b"")
        send({"nonce": request["nonce"], **header}, output)
    return 0


def _isolate(disk_bytes: int) -> None:
    """Map the user, hide /proc, and give the work folder a disk of its own. Takes a process in fresh namespaces."""
    kernel.hide_memory(False)  # a hidden process may not write its own maps
    for name, value in (("setgroups", "deny"), ("uid_map", f"1000 {UID} 1"), ("gid_map", f"1000 {UID} 1")):
        file = os.open(f"/proc/self/{name}", os.O_WRONLY)
        os.write(file, value.encode())
        os.close(file)
    kernel.hide_memory(True)
    kernel.mount_empty("/proc", 4096, 1, writable=False)
    _fresh_disk(disk_bytes)


def _fresh_disk(size: int) -> None:
    kernel.mount_empty(WORK, size, MAX_FILES, writable=True)
    os.chdir(WORK)


def _compile(source: bytes) -> tuple[CodeType | None, dict]:
    """(code, {}), or (None, what to answer to every case). Compiling executes nothing."""
    try:
        return compile(source, "program.py", "exec", dont_inherit=True), {}
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = f"{type(error).__name__}: {error}"[:ERROR_CHARS]
        return None, {"outcome": "error", "reason": reason, "cpu_seconds": 0.0, "wall_seconds": 0.0}


def _case(program: CodeType, given: bytes, request: dict) -> tuple[dict, bytes]:
    """Run one case in a process of its own: what became of it, and its output."""
    files = [os.memfd_create(name) for name in ("in", "out", "error", "result")]
    os.write(files[0], given)
    os.lseek(files[0], 0, os.SEEK_SET)
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _be_the_case(program, files, request)
    handle = os.pidfd_open(pid)
    in_time = _ends(pid, handle, request["wall_seconds"])
    if not in_time:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    wall = time.monotonic() - started
    output, error, result = (_content(file, request["output_bytes"] + 1) for file in files[1:])
    for file in (*files, handle):
        os.close(file)
    if os.listdir(WORK):
        kernel.unmount(WORK)
        _fresh_disk(request["disk_bytes"])
    header = {
        "outcome": _outcome(status, in_time, output, request), "exit": os.waitstatus_to_exitcode(status),
        "reason": error.decode(errors="replace")[-ERROR_CHARS:],
        "cpu_seconds": usage.ru_utime + usage.ru_stime, "wall_seconds": wall,
    }  # fmt: skip
    return header, result if request["kind"] == "call" else output


def _ends(pid: int, handle: int, seconds: float) -> bool:
    """Whether the case ends by itself. One that works is left to the limit on processor time, also on a busy machine;
    one that got nothing done for `seconds` is stopped."""
    worked = 0.0
    for _ in range(MAX_WAITS):
        if select.select([handle], [], [], seconds)[0]:
            return True
        so_far = time.clock_gettime((~pid << 3) | 2)  # the clock of the processor time of a process
        if so_far - worked < 0.01 * seconds:
            break
        worked = so_far
    return False


def _outcome(status: int, in_time: bool, output: bytes, request: dict) -> str:
    if not in_time:
        return "wall"
    if os.WIFSIGNALED(status):
        return "cpu" if os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL) else "error"
    if os.WEXITSTATUS(status) == CASE_FAILED:
        return "failed"
    if len(output) >= request["output_bytes"]:
        return "output"
    return "error" if os.WEXITSTATUS(status) else "done"


def _content(file: int, most: int) -> bytes:
    return os.pread(file, most, 0)


def _be_the_case(program: CodeType, files: list, request: dict) -> None:
    """In the case's process: lock it up, run the program, leave. Never returns."""
    code = CASE_FAILED
    try:
        _lock_up(files, request)
        code = 1
        code = _run(program, request)
    except MemoryError:
        os.write(2, b"MemoryError")
    finally:
        os._exit(code)


def _lock_up(files: list, request: dict) -> None:
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.closerange(len(files), MAX_OPEN)
    cpu = math.ceil(request["cpu_seconds"])
    limits = {
        resource.RLIMIT_CPU: cpu, resource.RLIMIT_AS: request["memory_bytes"], resource.RLIMIT_NOFILE: MAX_OPEN,
        resource.RLIMIT_STACK: min(STACK_BYTES, request["memory_bytes"]), resource.RLIMIT_NPROC: MAX_THREADS,
        resource.RLIMIT_FSIZE: request["output_bytes"],
    }  # fmt: skip
    for what, most in limits.items():
        resource.setrlimit(what, (most, most))
    kernel.give_up_privileges()


def _run(program: CodeType, request: dict) -> int:
    """The program as `__main__` on standard input, or a call of its function. The exit status."""
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(file, mode, closefd=False, encoding="utf-8", errors="surrogateescape")
        for file, mode in ((0, "r"), (1, "w"), (2, "w"))
    )
    for name in ("stdin", "stdout", "stderr"):
        setattr(sys, f"__{name}__", getattr(sys, name))
    sys.argv = ["program.py"]
    space = {"__name__": "__main__", "__builtins__": __builtins__}
    code = 0
    try:
        exec(program, space)  # noqa: S102 - this is the place that was made for it
        if request["kind"] == "call":
            _call(space, request)
    except SystemExit as ending:
        code = _exit_code(ending)
    except BaseException:  # noqa: BLE001 - a program may raise anything
        _report_error()
        code = 1
    return _leave(code)


def _report_error() -> None:
    """The program's own part of the traceback."""
    kind, error, trace = sys.exc_info()
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    traceback.print_exception(kind, error, trace, limit=-4)


def _exit_code(ending: SystemExit) -> int:
    if ending.code is None or isinstance(ending.code, int):
        return (ending.code or 0) & 0xFF
    sys.stderr.write(f"{ending.code}\n")
    return 1


def _leave(code: int) -> int:
    """What an interpreter does at its end: wait for threads, call exit functions, flush."""
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # no room left, or closed by the program
            code = code or 1
    return code


def _call(space: dict, request: dict) -> None:
    """Writes the returned value, framed by the nonce. Only exact plain types travel: nothing that can lie."""
    name, given = request["function"], json.loads(os.pread(0, os.fstat(0).st_size, 0))
    function = space.get(name)
    if function is None and isinstance(space.get("Solution"), type):
        function = space[name] = getattr(space["Solution"](), name, None)
    if not callable(function):
        raise NameError(f"no function {name!r} at top level or in a class Solution")
    value = eval(given, space) if type(given) is str else function(*given)  # noqa: S307 - locked up like the program
    answer = json.dumps(plain(value))
    with open(3, "wb", closefd=False) as file:
        file.write(f"{request['nonce']}{answer}{request['nonce']}".encode())


def send(header: dict, body: bytes = b"") -> None:
    """One message to the parent."""
    head = json.dumps(header).encode()
    rest = memoryview(_SIZES.pack(len(head), len(body)) + head + body)
    while rest:
        rest = rest[os.write(1, rest) :]


def receive() -> tuple[dict, bytes] | None:
    """The parent's next message, (header, body); `None` when it has hung up."""
    sizes = _read(_SIZES.size)
    if sizes is None:
        return None
    head, body = (_read(size) for size in _SIZES.unpack(sizes))
    return (json.loads(head), body) if head is not None and body is not None else None


def _read(size: int) -> bytes | None:
    parts, missing = [], size
    while missing:
        part = os.read(0, missing)
        if not part:
            return None
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


if __name__ == "__main__":
    main()
