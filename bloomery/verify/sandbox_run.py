"""One program file in the sandbox, as a person would try it."""

from pathlib import Path
from typing import IO, Any

from bloomery.errors import ArtifactError
from bloomery.verify.program import score
from bloomery.verify.sandbox import Sandbox


def run_file(program: Path, tests: Path | None, stdin: IO[bytes]) -> dict[str, Any]:
    """Against `tests` (JSON as `verify.program` reads it) the verdict; otherwise one run on what `stdin` holds."""
    source = _text(program)
    if tests is not None:
        verdict = score(_text(tests), source)
        return {"status": verdict.status, "reason": verdict.reason}
    given = b"" if stdin.isatty() else stdin.read()
    with Sandbox() as sandbox, sandbox.program(source) as run:
        result = run(given)
    return {
        "status": result.outcome, "output": result.output.decode(errors="replace"), "reason": result.reason,
        "cpu_seconds": round(result.cpu_seconds, 3),
    }  # fmt: skip


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{file}: cannot be read as text: {error}; expected a file in UTF-8") from None
