"""MBPP's problems as test records, and mutants of their solutions."""

import ast
import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SWAPS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
    ast.Lt: ast.GtE, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.GtE: ast.Lt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


@dataclass(frozen=True)
class Mbpp:
    """One problem: `tests` as the verifier wants them, `source` its solution with what the tests set up."""

    task: int
    source: str
    tests: str
    assertions: tuple[str, ...]

    def script(self, source: str) -> str:
        """A program that prints `passed` when no assertion fails."""
        return "\n".join([source, *self.assertions, "print('passed')"])


def problems(file: Path) -> Iterator[Mbpp]:
    """All problems of the published file."""
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        source = f"{row['code']}\n{row['test_setup_code'] or ''}".replace("\r", "")
        cases, names = zip(*(_case(test, source) for test in row["test_list"]), strict=True)
        tests = {"kind": "call", "fn_name": names[0], "cases": list(cases)}
        yield Mbpp(row["task_id"], source, json.dumps(tests), tuple(row["test_list"]))


def _case(assertion: str, source: str) -> tuple[dict[str, str], str]:
    """The record of `assert f(x) == literal`; where the right side is no literal, the whole comparison must be true."""
    test = ast.parse(assertion.strip()).body[0].test
    name = next(
        node.func.id for node in ast.walk(test)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and f"def {node.func.id}" in source
    )  # fmt: skip
    try:
        assert isinstance(test, ast.Compare)
        assert isinstance(test.ops[0], ast.Eq)
        ast.literal_eval(test.comparators[0])
    except (AssertionError, ValueError):
        return {"call": f"bool({ast.unparse(test)})", "returns": "True"}, name
    return {"call": ast.unparse(test.left), "returns": ast.unparse(test.comparators[0])}, name


def mutants(source: str, most: int = 2) -> list[str]:
    """Up to `most` variants, each with one operator swapped or one number one larger."""
    tree = ast.parse(source)
    sites = [node for node in ast.walk(tree) if _change(copy.deepcopy(node))]
    chosen = sites[:: max(1, len(sites) // most)][:most]
    return [_mutant(tree, [*ast.walk(tree)].index(site)) for site in chosen]


def _mutant(tree: ast.Module, index: int) -> str:
    other = copy.deepcopy(tree)
    _change([*ast.walk(other)][index])
    return ast.unparse(other)


def _change(node: ast.AST) -> bool:
    if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in SWAPS:
        node.op = SWAPS[type(node.op)]()
        return True
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        node.ops[0] = SWAPS[type(node.ops[0])]()
        return True
    if isinstance(node, ast.Constant) and type(node.value) is int:
        node.value += 1
        return True
    return False
