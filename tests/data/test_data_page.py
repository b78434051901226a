"""The settings shown in docs/data.md are real ones."""

import re
from pathlib import Path

import pytest

from bloomery import config as configs
from bloomery.data.blend import BlendConfig
from bloomery.data.blend import check as check_blend
from bloomery.data.prepare import PrepareConfig
from bloomery.data.prepare import check as check_prepare
from bloomery.data.tokenizer import TokenizerConfig

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"```yaml\n# stage: (\w+)\n(.*?)```", PAGE, re.DOTALL))


@pytest.mark.parametrize(
    ("stage", "cls"), [("prepare", PrepareConfig), ("tokenizer", TokenizerConfig), ("blend", BlendConfig)]
)
def test_settings_on_the_page_are_accepted(stage, cls):
    config = configs.build(cls, configs.parse_yaml(BLOCKS[stage]))
    check = {"prepare": check_prepare, "blend": check_blend}.get(stage)
    assert check is None or check(config)


def test_every_type_of_source_is_on_the_page():
    shown = {source["type"] for source in configs.parse_yaml(BLOCKS["prepare"])["sources"]}
    assert shown == {"text", "jsonl", "parquet", "hf", "stdlib", "procedural"}


def test_settings_for_math_problems_are_accepted():
    [block] = re.findall(r"```yaml\n# stage: prepare, for RL\n(.*?)```", PAGE, re.DOTALL)
    config = configs.build(PrepareConfig, configs.parse_yaml(block))
    assert check_prepare(config)
    assert config.decontaminate.ngram == 9


def test_settings_for_questions_are_accepted():
    [block] = re.findall(r"```yaml\n# stage: prepare, questions\n(.*?)```", PAGE, re.DOTALL)
    config = configs.build(PrepareConfig, configs.parse_yaml(block))
    assert check_prepare(config)
    assert [source.qa.layout for source in config.sources] == ["mmlu", "arc", "gsm8k", "columns"]


def test_settings_for_a_crawl_and_a_cluster_are_accepted():
    [block] = re.findall(r"```yaml\n# stage: prepare, of a crawl\n(.*?)```", PAGE, re.DOTALL)
    [cluster] = re.findall(r"```yaml\n(executor: .*?)```", PAGE, re.DOTALL)
    config = configs.build(PrepareConfig, configs.parse_yaml(block) | configs.parse_yaml(cluster))
    assert check_prepare(config)
    assert config.tiered == ["crawl"]
    assert config.sources[2].filters.max_ellipsis_lines is None
    assert config.executor.slurm.partition == "cpu"
