"""Linux calls that Python's library lacks, and the filter of those a program may make.

Runs inside the sandbox, on the standard library alone. Numbers: the kernel's tables for x86-64 and arm64.
"""

import ctypes
import os
import platform
import signal
import struct

_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_COLUMN, _AUDIT_ARCH = _MACHINES.get(platform.machine(), (0, 0))
_libc = ctypes.PyDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
"""Mount, cgroup, UTS, IPC, user, PID and network: everything a process can have for itself."""

_CLONE, _CAPSET = (56, 220)[_COLUMN], (126, 91)[_COLUMN]
_READ_ONLY, _NO_SUID, _NO_DEVICES, _NO_EXEC, _DETACH = 1, 2, 4, 8, 2
_SET_DUMPABLE, _SET_SECCOMP, _FILTER_MODE, _SET_NO_NEW_PRIVS = 4, 22, 2, 38
_CAPABILITY_VERSION = 0x20080522

ALLOWED = {
    "read": (0, 63), "write": (1, 64), "open": (2, -1), "close": (3, 57), "stat": (4, -1), "fstat": (5, 80),
    "lstat": (6, -1), "poll": (7, -1), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215),
    "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "ioctl": (16, 29), "pread64": (17, 67), "pwrite64": (18, 68), "readv": (19, 65), "writev": (20, 66),
    "access": (21, -1), "pipe": (22, -1), "select": (23, -1), "sched_yield": (24, 124), "mremap": (25, 216),
    "madvise": (28, 233), "dup": (32, 23), "dup2": (33, -1), "nanosleep": (35, 101), "getitimer": (36, 102),
    "alarm": (37, -1), "setitimer": (38, 103), "getpid": (39, 172), "exit": (60, 93), "uname": (63, 160),
    "fcntl": (72, 25), "fsync": (74, 82), "ftruncate": (77, 46), "getcwd": (79, 17), "chdir": (80, 49),
    "rename": (82, -1), "mkdir": (83, -1), "rmdir": (84, -1), "unlink": (87, -1), "readlink": (89, -1),
    "gettimeofday": (96, 169), "getrlimit": (97, 163), "getrusage": (98, 165), "sysinfo": (99, 179),
    "times": (100, 153), "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175), "getegid": (108, 177),
    "getppid": (110, 173), "sigaltstack": (131, 132), "gettid": (186, 178), "time": (201, -1), "futex": (202, 98),
    "sched_getaffinity": (204, 123), "getdents64": (217, 61), "set_tid_address": (218, 96),
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "exit_group": (231, 94),
    "tgkill": (234, 131), "openat": (257, 56), "mkdirat": (258, 34), "newfstatat": (262, 79), "unlinkat": (263, 35),
    "renameat": (264, 38), "readlinkat": (267, 78), "faccessat": (269, 48), "pselect6": (270, 72), "ppoll": (271, 73),
    "set_robust_list": (273, 99), "dup3": (292, 24), "pipe2": (293, 59), "getcpu": (309, 168),
    "getrandom": (318, 278), "membarrier": (324, 283), "statx": (332, 291), "rseq": (334, 293),
    "close_range": (436, 436), "faccessat2": (439, 439),
}  # fmt: skip
"""What Python needs to compute, read and write. No processes, programs, sockets, mounts, tracing or shared memory."""

_PRLIMIT = (302, 261)[_COLUMN]
_CLONE3 = 435
_CLONE_THREAD = 0x00010000
_EPERM, _ENOSYS = 1, 38
_ALLOW, _ERROR, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER_AT, _ARCH_AT, _FIRST_ARGUMENT_AT = 0, 4, 16


def supported() -> bool:
    """Whether the numbers above are this machine's."""
    return _AUDIT_ARCH != 0


def clone(namespaces: int) -> int:
    """`os.fork` into new namespaces: 0 in the child. `namespaces` are CLONE_NEW* bits."""
    python = ctypes.pythonapi
    python.PyOS_BeforeFork()
    pid = _libc.syscall(_CLONE, *(ctypes.c_long(value) for value in (namespaces | signal.SIGCHLD, 0, 0, 0, 0)))
    if pid == 0:
        python.PyOS_AfterFork_Child()
    else:
        python.PyOS_AfterFork_Parent()
    return _checked(pid, "clone")


def mount_empty(target: str, size_bytes: int, inodes: int, writable: bool) -> None:
    """A tmpfs of at most `size_bytes` and `inodes` files over `target`."""
    flags = _NO_SUID | _NO_DEVICES | _NO_EXEC | (0 if writable else _READ_ONLY)
    options = f"size={size_bytes},nr_inodes={inodes},mode=0700".encode()
    _checked(_libc.mount(b"tmpfs", target.encode(), b"tmpfs", ctypes.c_ulong(flags), options), f"mount {target}")


def unmount(target: str) -> None:
    """Takes the newest mount off `target`."""
    _checked(_libc.umount2(target.encode(), _DETACH), f"umount {target}")


def hide_memory(hidden: bool) -> None:
    """Whether other processes of this user are kept from tracing and reading this one."""
    _checked(_libc.prctl(_SET_DUMPABLE, int(not hidden), 0, 0, 0), "prctl dumpable")


def give_up_privileges() -> None:
    """Drops every capability for good and installs the filter. There is no way back."""
    _checked(_libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl no_new_privs")
    _checked(_libc.syscall(_CAPSET, _CAPABILITY_HEADER, _NO_CAPABILITIES), "capset")
    _checked(_libc.prctl(_SET_SECCOMP, _FILTER_MODE, _FILTER_POINTER, 0, 0), "prctl seccomp")


def _filter() -> bytes:
    """Berkeley packet filter: allowed numbers pass; threads, and a process's own limits, by their first argument.

    A binary search: the kernel runs a filter once for every number there is when it is installed, for every case.
    """
    actions: dict[int, _Code] = {pair[_COLUMN]: _PASS for pair in ALLOWED.values() if pair[_COLUMN] >= 0}
    actions |= {_CLONE: _IF_THREAD, _PRLIMIT: _IF_OWN, _CLONE3: _UNKNOWN}
    ranges: list[tuple[int, _Code]] = []
    for number in sorted({0, *actions, *(number + 1 for number in actions)}):
        action = actions.get(number, _REFUSE)
        if not ranges or ranges[-1][1] is not action:
            ranges.append((number, action))
    code = [(_LOAD, 0, 0, _ARCH_AT), (_EQUAL, 1, 0, _AUDIT_ARCH), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _NUMBER_AT)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code + _search(ranges))


def _search(ranges: "list[tuple[int, _Code]]") -> "_Code":
    """What to do with a number: as the last of `ranges`, (first number, action), that begins at it or before."""
    if len(ranges) == 1:
        return ranges[0][1]
    middle = len(ranges) // 2
    below = _search(ranges[:middle])
    return [(_AT_LEAST, len(below), 0, ranges[middle][0]), *below, *_search(ranges[middle:])]


_Code = list[tuple[int, int, int, int]]
_PASS: _Code = [(_RETURN, 0, 0, _ALLOW)]
_REFUSE: _Code = [(_RETURN, 0, 0, _ERROR | _EPERM)]
_UNKNOWN: _Code = [(_RETURN, 0, 0, _ERROR | _ENOSYS)]  # makes the C library fall back from clone3 to clone
_IF_THREAD: _Code = [(_LOAD, 0, 0, _FIRST_ARGUMENT_AT), (_ANY_BIT, 0, 1, _CLONE_THREAD), *_PASS, *_REFUSE]
_IF_OWN: _Code = [(_LOAD, 0, 0, _FIRST_ARGUMENT_AT), (_EQUAL, 0, 1, 0), *_PASS, *_REFUSE]
_CAPABILITY_HEADER = ctypes.create_string_buffer(struct.pack("=Ii", _CAPABILITY_VERSION, 0))
_NO_CAPABILITIES = ctypes.create_string_buffer(24)
_FILTER = ctypes.create_string_buffer(_filter())
_FILTER_POINTER = ctypes.create_string_buffer(struct.pack("@HP", len(_FILTER) // 8, ctypes.addressof(_FILTER)))


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result
