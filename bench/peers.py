"""A peer in an environment of its own: installed once, run as a process, asked line by line so that turns alternate."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

VENV = Path(__file__).parent.parent / ".bench-venv"
PYTHON = VENV / ("Scripts" if os.name == "nt" else "bin") / "python"
SAME_AS_OURS = ("torch", "transformers")
PEERS = ("trl==1.16.0", "transformers[serving]", "lm-eval[api]==0.4.13")


def install() -> Path:
    """The peers' interpreter, with the very versions of torch and transformers that we run on."""
    wanted = [f"{name}=={version(name).partition('+')[0]}" for name in SAME_AS_OURS] + list(PEERS)
    stamp = VENV / "installed.txt"
    if not stamp.is_file() or stamp.read_text() != "\n".join(wanted):
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
        subprocess.run([PYTHON, "-m", "pip", "install", "--quiet", *wanted], check=True, stdout=sys.stderr)
        stamp.write_text("\n".join(wanted))
    return PYTHON


class Peer:
    """A script in the peers' environment that answers each line on its standard input with one line of JSON."""

    def __init__(self, script: Path, arguments: Sequence[str]):
        self.command = [str(install()), str(script), *arguments]

    def __enter__(self) -> Self:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def ask(self) -> dict[str, Any]:
        """One turn; raises when the peer has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{' '.join(self.command)} ended with code {self.process.wait()}; its last words are above")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
