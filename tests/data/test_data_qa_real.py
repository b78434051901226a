"""Published evaluation sets and GSM8K's training questions through the stage: counts by reason, hits, golds."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from bloomery import config as configs
from bloomery.data import prepare
from bloomery.data.dataset import read_rows
from bloomery.data.prepare import PrepareConfig
from bloomery.errors import ArtifactError
from bloomery.verify import Pool, echo

DATA = Path(os.environ.get("BLOOMERY_DATA", Path(__file__).parents[3] / "shared" / "data"))
needs_data = pytest.mark.skipif(
    not (DATA / "multidomain" / "mmlu_stem.jsonl").is_file(), reason=f"no real data under {DATA}; set BLOOMERY_DATA"
)
EXAMS = {
    "mmlu_stem": ("multidomain/mmlu_stem", "mmlu", 3018), "logiqa": ("multidomain/agieval_logiqa-en", "agieval", 651),
    "lsat_lr": ("multidomain/agieval_lsat-lr", "agieval", 510),
    "sat_en": ("multidomain/agieval_sat-en", "agieval", 206),
    "gsm8k_test": ("math/gsm8k_test", "gsm8k", 1319),
}  # fmt: skip
RIGHT = 0.995


def source(name: str, file: str, layout: str, **qa: Any) -> dict[str, Any]:
    return {"type": "jsonl", "name": name, "path": str(DATA / f"{file}.jsonl"), "qa": {"layout": layout, **qa}}


def through(tmp_path: Path, **settings: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    config = configs.build(PrepareConfig, {"kind": "prompts", "deduplicate": False, **settings})
    manifest = prepare.run(config, tmp_path / "out")
    return manifest.summary["sources"], list(read_rows(tmp_path / "out", "prompts"))


def share_right(rows: list[dict[str, Any]]) -> float:
    """How many golds their own verifier accepts."""
    with Pool(workers=1) as pool:
        asked = [(row["verifier"], echo(row["verifier"], row["answer"]), row["answer"]) for row in rows]
        verdicts = pool.judge_all(asked)
    return sum(verdict.correct for verdict in verdicts) / len(verdicts)


@needs_data
@pytest.mark.slow
def test_training_questions_without_what_the_exams_hold(tmp_path: Path):
    exams = [source(name, file, layout) for name, (file, layout, _) in EXAMS.items()]
    found, rows = through(
        tmp_path, sources=[source("gsm8k", "math/gsm8k_train", "gsm8k", domain="math")],
        decontaminate={"benchmarks": exams},
    )  # fmt: skip
    assert found["gsm8k"]["kept"] == len(rows) == 7444
    assert found["gsm8k"]["dropped"] == {"in benchmark gsm8k_test": 28, "in benchmark mmlu_stem": 1}
    hits = json.loads((tmp_path / "out" / prepare.CONTAMINATION).read_text())
    assert sum(not hit["masked"] for hit in hits) == 29
    assert share_right(rows) >= RIGHT


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("form", ["choice", "open"])
def test_every_exam_row_is_kept_or_dropped_for_a_reason(tmp_path: Path, form: str):
    """To see what the filters do: these sets are for evaluation and never trained on."""
    chosen = {
        name: exam for name, exam in EXAMS.items() if name != "gsm8k_test" and (form == "choice" or name != "lsat_lr")
    }
    sources = [source(name, file, layout, forms=[form]) for name, (file, layout, _) in chosen.items()]
    found, rows = through(tmp_path, sources=sources)
    for name, (_, _, count) in chosen.items():
        assert found[name]["kept"] + sum(found[name]["dropped"].values()) == count
    assert share_right(rows) >= RIGHT


@needs_data
@pytest.mark.slow
def test_an_exam_does_not_pass_its_own_check(tmp_path: Path):
    """Asked as a choice, openly, or shuffled: its items are found whatever the template."""
    file, layout, _ = EXAMS["mmlu_stem"]
    other = source("gsm8k", "math/gsm8k_test", "gsm8k") | {"max_documents": 1}
    exam = source("mmlu_stem", file, layout)
    both = source("copy", file, layout, forms=["choice", "open"], seed=5)
    with pytest.raises(ArtifactError, match="nothing is left"):
        through(tmp_path, sources=[both, other], decontaminate={"benchmarks": [exam]})
