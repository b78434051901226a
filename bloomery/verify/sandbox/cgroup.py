"""A control group for everything in one sandbox, where this machine lets us make one (version 1 or 2)."""

import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
MEMORY_BYTES, MAX_TASKS = 2 << 30, 128
_VERSION_1 = {"memory": {"memory.limit_in_bytes": MEMORY_BYTES}, "pids": {"pids.max": MAX_TASKS}}
_VERSION_2 = {"memory.max": MEMORY_BYTES, "memory.swap.max": 0, "pids.max": MAX_TASKS}


@dataclass(frozen=True)
class Group:
    """Folders of one group: one in version 2, one per controller in version 1."""

    folders: tuple[Path, ...]

    @classmethod
    def create(cls) -> "Group | None":
        """A limited group, or `None` where none may be made: the limits of each process hold all the same."""
        name = f"bloomery-{os.getpid()}-{secrets.token_hex(4)}"
        if (_ROOT / "cgroup.controllers").exists():
            wanted = {_ROOT / name: _VERSION_2}
        else:
            wanted = {_ROOT / controller / name: files for controller, files in _VERSION_1.items()}
        made: list[Path] = []
        try:
            for folder, files in wanted.items():
                folder.mkdir()
                made.append(folder)
                for file, value in files.items():
                    (folder / file).write_text(str(value))
        except OSError:
            cls(tuple(made)).remove()
            return None
        return cls(tuple(made))

    def joining(self, command: Sequence[str]) -> list[str]:
        """`command`, started inside the group from its first instruction."""
        joins = "; ".join(f"echo $$ > {folder}/cgroup.procs" for folder in self.folders)
        return ["/bin/sh", "-c", f'{joins}; exec "$@"', "sh", *command]

    def remove(self) -> None:
        """Takes the group away once its processes are gone."""
        for folder in self.folders:
            try:
                folder.rmdir()
            except OSError:
                continue  # a last process is still being reaped by the kernel; an empty group costs nothing
