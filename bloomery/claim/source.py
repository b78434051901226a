"""Claims as files: finding them, importing them, and knowing when their source has changed."""

import ast
import difflib
import hashlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

from bloomery.claim.claim import Claim
from bloomery.errors import ConfigError

FOLDER = "claims"


def names(root: Path) -> list[str]:
    """Names of all claims below `root`, sorted. Raises `ConfigError` outside a checkout."""
    folder = root / FOLDER
    if not folder.is_dir():
        raise ConfigError(
            f"{root}: no folder {FOLDER} here; claims live in the source tree: run this at the root of a checkout"
        )
    return sorted(file.stem.replace("_", "-") for file in folder.glob("[!_]*.py"))


def load(name: str, root: Path) -> Claim:
    """The claim `name` of the checkout at `root`. Raises `ConfigError` when there is none of that name."""
    known = names(root)
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"known: {', '.join(known) or 'none'}"
        raise ConfigError(f"{name!r} is no claim; {hint}")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    module = importlib.import_module(f"{FOLDER}.{_stem(name)}")
    claim = getattr(module, "CLAIM", None)
    if not isinstance(claim, Claim) or claim.name != name:
        raise ConfigError(f"{_file(name, root)}: expected CLAIM = Claim(name={name!r}, …), found {claim!r}")
    return claim


def title(name: str, root: Path) -> str:
    """The first line of a claim's docstring, read without importing it."""
    return (ast.get_docstring(ast.parse(_file(name, root).read_text(encoding="utf-8"))) or "").partition("\n")[0]


def digest(claim: Claim, root: Path) -> str:
    """12 hexadecimal digits that change with a claim's code, or with that of modules in `claims` which it imports.

    Comments, layout and the function that draws the picture do not count: no number depends on them.
    """
    hasher = hashlib.blake2b(digest_size=6)
    waiting, seen = [_file(claim.name, root)], set[Path]()
    while waiting:
        file = waiting.pop()
        seen.add(file)
        tree = ast.parse(file.read_text(encoding="utf-8"))
        tree.body = [node for node in tree.body if not _draws(node, claim)]
        hasher.update(ast.dump(tree).encode())
        waiting += sorted({root / FOLDER / f"{name}.py" for name in _shared(tree)} - seen - {*waiting})
    return hasher.hexdigest()


def _draws(node: ast.stmt, claim: Claim) -> bool:
    return isinstance(node, ast.FunctionDef) and claim.figure is not None and node.name == claim.figure.__name__


def _shared(tree: ast.Module) -> Iterator[str]:
    """Modules of the folder that a module imports: `from claims import _x`, `from claims._x import …`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == FOLDER:
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"{FOLDER}."):
            yield node.module.split(".")[1]


def _file(name: str, root: Path) -> Path:
    return root / FOLDER / f"{_stem(name)}.py"


def _stem(name: str) -> str:
    return name.replace("-", "_")
