"""What the README and the quickstart tell people to type is real."""

import re
import shlex
from pathlib import Path

import pytest

from bloomery import cli, recipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "docs" / "quickstart.md"]


def commands() -> list[str]:
    blocks = [block for page in PAGES for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)]
    return [line.split("#")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def test_there_are_two_first_commands():
    assert [line for line in commands() if line.startswith("make")][:2] == ["make demo", "make test"]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test", "check", "bench", "gpu-bench"} <= targets


@pytest.mark.parametrize("line", [line for line in commands() if line.startswith("bloomery")])
def test_commands_parse(line):
    _, verb, *words = shlex.split(line)
    known = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    assert verb in known | {group.name for group in cli.app.registered_groups}
    if verb in ("run", "check"):
        words = words[: words.index("--out")] if "--out" in words else words
        recipe.load(ROOT / words[0], words[1:])


def test_the_tree_is_the_tree():
    tree = re.search(r"## The tree\n```\n(.*?)```", PAGES[0].read_text(), re.DOTALL)[1]
    for line in tree.splitlines():
        indent = "bloomery/" if line.startswith("  ") else ""
        for name in re.findall(r"([a-z_]+(?:/|\.py))(?=\s)", line.split("   ")[0] + " "):
            assert (ROOT / indent / name).exists() or (ROOT / name).exists(), line


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_passes_check(file, tmp_path):
    _, steps = recipe.load(file, run=tmp_path)
    findings = recipe.check(steps)
    assert list(findings) == [step.name for step in steps]


def test_stage_help_names_every_setting(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["bloomery", "rl", "--help"])
    with pytest.raises(SystemExit) as exit_code:
        cli.main()
    assert exit_code.value.code == 0
    shown = capsys.readouterr().out
    assert "group_size: " in shown
    assert "loop.max_grad_norm: " in shown
