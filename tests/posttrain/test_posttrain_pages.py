"""The settings that the pages on SFT and RL show are settings."""

from pathlib import Path

import pytest

from bloomery.config import Config, build, parse_yaml
from bloomery.posttrain.rl import RLConfig
from bloomery.posttrain.sft import SFTConfig

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(("page", "cls"), [("sft.md", SFTConfig), ("rl.md", RLConfig)])
def test_the_page_shows_usable_settings(page: str, cls: type[Config]) -> None:
    block = (DOCS / page).read_text().split("```yaml\n")[1].split("```")[0]
    assert build(cls, parse_yaml(block))
