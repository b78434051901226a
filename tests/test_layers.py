"""A package imports only from rows above it; siblings never import each other; some rows stay free of torch."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "bloomery"

ALLOWED = {
    "errors": set(),
    "config": {"errors"},
    "artifact": {"errors", "config", "progress"},
    "progress": set(),
}
ALLOWED["model"] = ALLOWED["data"] = ALLOWED["verify"] = {"errors", "config", "artifact", "progress"}
ALLOWED["parallel"] = ALLOWED["generate"] = ALLOWED["model"] | {"model"}
ALLOWED["train"] = ALLOWED["model"] | {"model", "data", "parallel"}
ALLOWED["compress"] = ALLOWED["synthesize"] = ALLOWED["posttrain"] = ALLOWED["evaluate"] = ALLOWED["train"] | {
    "verify", "generate", "train",
}  # fmt: skip
ALLOWED["report"] = ALLOWED["model"] | {"evaluate"}
ALLOWED["chat"] = ALLOWED["serve"] = ALLOWED["train"] | {"train", "generate"}
ALLOWED["recipe"] = ALLOWED["evaluate"] | {"compress", "synthesize", "posttrain", "evaluate", "report"}
ALLOWED["claim"] = ALLOWED["recipe"] | {"recipe"}
ALLOWED["plan"] = ALLOWED["claim"] | {"claim"}
ALLOWED["blends"] = ALLOWED["claim"] | {"claim"}
ALLOWED["diversity"] = ALLOWED["train"] | {"train", "synthesize"}
ALLOWED["cli"] = ALLOWED["plan"] | {"plan", "blends", "chat", "serve", "diversity"}
ALLOWED["__main__"] = {"cli"}
WITHOUT_TORCH = {
    "errors",
    "config",
    "artifact",
    "progress",
    "verify",
    "report",
    "recipe",
    "claim",
    "plan",
    "blends",
    "cli",
    "diversity",
}


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file}: relative import"
            names |= (
                {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "bloomery" else {node.module}
            )
    return names


def owner(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


FILES = [file for file in sorted(ROOT.rglob("*.py")) if file != ROOT / "__init__.py"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_up(file):
    here = owner(file)
    others = {name.split(".")[1] for name in imported(file) if name.startswith("bloomery.")} - {here}
    assert others <= ALLOWED[here], f"{file}: {here} must not import {sorted(others - ALLOWED[here])}"


@pytest.mark.parametrize("file", [file for file in FILES if owner(file) in WITHOUT_TORCH], ids=str)
def test_rows_without_torch(file):
    heavy = {name.split(".")[0] for name in imported(file)} & {"torch", "transformers"}
    assert not heavy, f"{file} imports {heavy}"


def test_table_has_no_two_way_edge():
    assert not [(a, b) for a, above in ALLOWED.items() for b in above if a in ALLOWED.get(b, set())]
