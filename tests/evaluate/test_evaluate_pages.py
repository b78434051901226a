"""The settings that the pages on evaluation and export show are settings; the metrics listed are those reported."""

import re
from pathlib import Path

import pytest

from bloomery.config import Config, build, parse_yaml
from bloomery.data.prompts import Prompt
from bloomery.evaluate import scoring
from bloomery.evaluate.evaluate import EvaluateConfig
from bloomery.evaluate.export import ExportConfig
from bloomery.generate import Completion
from bloomery.verify import judge

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(("page", "cls"), [("evaluate.md", EvaluateConfig), ("export.md", ExportConfig)])
def test_the_page_shows_usable_settings(page: str, cls: type[Config]) -> None:
    block = (DOCS / page).read_text().split("```yaml\n")[1].split("```")[0]
    assert build(cls, parse_yaml(block))


def test_every_metric_is_on_the_page() -> None:
    prompt, text = Prompt("p", "s", [], "7", "answer", (1,)), r"\boxed{7}"
    answer, wrong = (
        scoring.Answer(prompt, 0, Completion([1], None, "stop", 0, text), judge("answer", text, "7"))
        for prompt, text in ((prompt, text), (Prompt("p", "s", [], "7", "answer", (1,), options=4), ""))
    )
    reported = {re.sub(r"@\d+", "@k", row["metric"]) for row in scoring.report_rows([[wrong, answer]], 8)}
    assert reported == set(re.findall(r"^\| `([a-z_]+(?:@k)?)`", (DOCS / "evaluate.md").read_text(), re.MULTILINE))
