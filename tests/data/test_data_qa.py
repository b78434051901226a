"""Questions as items and prompts: every reason for leaving one out is provoked, and every layout is read."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bloomery import config as configs
from bloomery.data import prepare
from bloomery.data.dataset import read_rows
from bloomery.data.decontaminate import Decontaminator
from bloomery.data.prepare import PrepareConfig
from bloomery.data.prompts import kind_of_question
from bloomery.data.qa import Item, render, shuffled, to_benchmark, to_prompt
from bloomery.data.qa_convert import to_open
from bloomery.data.qa_filters import QAFilterConfig, drop_reason, mixed_scripts, num_words
from bloomery.data.qa_read import LAYOUTS, Raw, Tags, Unusable, to_item
from bloomery.data.qa_source import QAConfig, Questions
from bloomery.data.read import Invalid
from bloomery.errors import ArtifactError, ConfigError

RULES = QAFilterConfig()


def choice(question: str = "Which planet is largest?", options: str = "Mars|Jupiter|Venus", label: str | None = "B",
           gold: str = "") -> Item:  # fmt: skip
    found = tuple(options.split("|"))
    text = gold or (found[ord(label) - ord("A")] if label else "")
    return Item("q1", question, text, form="choice", options=found, gold_label=label, answer_form="label")


def openly(question: str = "What is 2 + 2?", gold: str = "4") -> Item:
    return Item("q2", question, gold)


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (choice(), None),
        (openly(), None),
        (choice(question=""), "empty question"),
        (openly(gold=""), "no gold answer"),
        (choice(question="why? " * 5_000), "question longer than 20000 characters"),
        (choice(options="Mars|Jupiter|Mars"), "duplicate options"),
        (choice(options="Mars|Jupiter|Mars "), "duplicate options"),
        (choice(options="Mars|Jupiter|"), "an empty option"),
        (choice(label=None, gold="Pluto"), "gold is not among the options"),
        (choice(label="D", gold="Pluto"), "gold is not among the options"),
        (choice(label="A", gold="Venus"), "gold is not among the options"),
        (choice(label=None, gold="A, C"), "several right answers"),
        (choice(label=None, gold="AB"), "several right answers"),
        (choice(question="Select all that apply."), "several right answers"),
        (openly(gold="a b c d e f g h i j k"), "open answer of more than 10 words"),
        (openly(gold=r"$\frac{a b c d e f}{g h i j k l}$ cm"), None),
        (openly("Is it so?", "True"), "true or false"),
        (openly("What is it\x00?"), "invalid characters"),
        (openly("What is it\ufffd?"), "invalid characters"),
        (openly("What is é\ud800?"), "invalid characters"),
        (openly("What is \u202eegnaro\u202c?"), "characters that reorder what is shown"),
        (choice(options="Mars|Juрiter|Venus"), "a word of mixed scripts"),  # the p is Cyrillic
        (choice(question="Какая планета самая большая?", options="Марс|Юпитер|Венера"), None),
        (choice(question="איזה כוכב לכת הוא הגדול ביותר?", options="מאדים|צדק|נוגה"), None),
        (openly("ما هو أكبر كوكب؟", "المشتري"), None),
        (openly("What is Δx in μm, by DNAの?", "3"), None),
    ],
)
def test_every_reason(item: Item, reason: str | None):
    assert drop_reason(item, RULES) == reason


def test_few_and_many_options():
    assert drop_reason(choice(options="Jupiter", label="A"), RULES) == "fewer than two options"
    assert drop_reason(choice(), QAFilterConfig(min_options=4)) == "fewer than 4 options"
    many = "|".join(map(str, range(11)))
    assert drop_reason(choice(options=many), RULES) == "too many options"


def test_letters_that_look_like_others():
    assert mixed_scripts("the word аpple") == "аpple"  # a Cyrillic а
    assert mixed_scripts("Αpple is Greek at first") == "Αpple"
    assert mixed_scripts("Δx of 5 μm; πr; naïve; Straße; Москва and London") is None


def test_words_of_an_answer():
    assert num_words("two  words") == 2
    assert num_words(r"\frac{a + b}{c} metres") == 2
    assert num_words("ten\u00a0km") == 2


def test_the_prompt_lists_options_and_keeps_the_answer():
    item = choice("Which planet is largest?\nOf ours.")
    assert render(item, {"choice": "Choose."}) == (
        "Choose.\n\nWhich planet is largest?\nOf ours.\n\nA. Mars\nB. Jupiter\nC. Venus"
    )
    assert render(openly(), {}) == "What is 2 + 2?"
    assert json.loads(item.answer) == {"label": "B", "options": 3}
    assert Item("i", "?", "Paris", alt_golds=("City of Paris",)).answer == (
        '{"gold": "Paris", "alt_golds": ["City of Paris"]}'
    )


def test_labels_are_no_prior_and_the_order_is_recorded():
    items = [Item(f"q{i}", "?", "b", form="choice", options=tuple("abcd"), gold_label="B") for i in range(400)]
    mixed = [shuffled(item, seed=0) for item in items]
    assert all(70 <= count <= 130 for count in Counter(item.gold_label for item in mixed).values())
    for item in mixed[:9]:
        assert item.options[item.gold_index] == "b"
        assert [tuple("abcd")[place] for place in item.transforms[-1]["shuffled"]] == list(item.options)
    assert shuffled(items[0], 0) == mixed[0]
    assert any(shuffled(item, 0, epoch=1) != shuffled(item, 0) for item in items[:5])


ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "mmlu": ("mmlu", {"question": "Largest?", "subject": "astronomy", "choices": ["Mars", "Jupiter"], "answer": 1}),
    "mmlu, lettered": ("mmlu", {"question": "Largest?", "A": "Mars", "B": "Jupiter", "answer": "B"}),
    "agieval": ("agieval", {
        "passage": None, "question": "Largest?", "options": ["(A)Mars", "(B)Jupiter"], "label": "B", "answer": None,
    }),
    "arc, hub": ("arc", {
        "id": "x", "question": "Largest?", "choices": {"text": ["Mars", "Jupiter"], "label": ["1", "2"]},
        "answerKey": "2",
    }),
    "arc, file": ("arc", {
        "id": "x", "answerKey": "B", "question": {
            "stem": "Largest?", "choices": [{"text": "Mars", "label": "A"}, {"text": "Jupiter", "label": "B"}],
        },
    }),
    "by text": ("columns", {"question": "Largest?", "options": ["Mars", "Jupiter"], "answer": "Jupiter"}),
    "by label and text": ("columns", {"question": "Largest?", "options": ["Mars", "Jupiter"], "answer": "B) Jupiter"}),
    "options by name": ("columns", {"question": "Largest?", "options": {"A": "Mars", "B": "Jupiter"}, "answer": "(b)"}),
}  # fmt: skip


def read(row: dict[str, Any], layout: str, columns: dict[str, str] | None = None, **more: Any) -> Item:
    config = configs.build(QAConfig, {"layout": layout, "shuffle": False, **more})
    questions = Questions([("row 1", row)], config, columns or {}, "quiz", Invalid("error"))
    [document] = questions.documents("prompts")
    return Item.from_row({"source": document.source}, document.metadata)


@pytest.mark.parametrize("name", ROWS)
def test_layouts(name: str):
    layout, row = ROWS[name]
    item = read(row, layout)
    assert (item.question, item.options, item.gold_label) == ("Largest?", ("Mars", "Jupiter"), "B")
    assert (item.form, item.answer_form, item.source, item.domain) == ("choice", "label", "quiz", "quiz")


def test_open_layouts_and_tags():
    item = read({"question": "How many?", "answer": "So 2.\n#### 1,200"}, "gsm8k", domain="math", license="MIT")
    assert (item.gold_text, item.answer_form, item.domain, item.license) == ("1200", "math", "math", "MIT")
    row = {"q": "Capital of France?", "a": ["Paris"], "topic": "geography", "also": ["City of Paris"], "id": 7}
    names = {"question": "q", "answer": "a", "subject": "topic", "alt_golds": "also"}
    item = read(row, "columns", names, domains={"geography": "gpr"})
    assert (item.id, item.gold_text, item.subject, item.domain) == ("7", "Paris", "geography", "gpr")
    assert (item.alt_golds, item.answer_form) == (("City of Paris",), "short")
    passage = read({"passage": "Some facts.", "question": "So?", "options": None, "answer": "x"}, "agieval")
    assert passage.question == "Some facts.\n\nSo?"


def test_invisible_marks_go_and_ids_follow_the_content():
    first = read({"question": "Who\u200f?", "options": ["a\u200b", "b"], "answer": "b"}, "columns")
    second = read({"question": "Who?", "options": ["b", "a"], "answer": "b"}, "columns")
    assert first.options == ("a", "b")
    assert first.id == second.id != read({"question": "Who?", "options": ["b", "a"], "answer": "a"}, "columns").id


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (Raw(None, None, "1"), "no text in question"),
        (Raw("?", "a or b", "1"), "options are no list of texts"),
        (Raw("?", [None, "b"], "b"), "options are no list of texts"),
        (Raw("?", ["a", "b"], None), "no gold answer"),
        (Raw("?", None, True), "no gold answer"),
        (Raw("?", None, "1", alt_golds=[1]), "alternative answers are no list of texts"),
    ],
)
def test_what_cannot_be_read_says_so(raw: Raw, reason: str):
    with pytest.raises(Unusable, match=reason):
        to_item(raw, Tags("s"), {}, {})


def test_missing_columns_and_wrong_kinds_are_explained():
    with pytest.raises(ArtifactError, match=r"row 1: no column 'question'; found q, a; name it with columns: \{quest"):
        read({"q": "?", "a": "1"}, "columns")
    with pytest.raises(ArtifactError, match="row 1: duplicate options; repair it"):
        read({"question": "?", "options": ["a", "a"], "answer": "a"}, "columns")
    with pytest.raises(ConfigError, match="questions give prompts, or documents to compare with, not messages"):
        Questions([], QAConfig(), {}, "quiz", Invalid()).documents("messages")
    assert set(LAYOUTS) == {"columns", "mmlu", "agieval", "arc", "gsm8k"}


def test_a_damaged_source_is_refused_unless_that_is_allowed():
    rows = [(f"row {i}", {"question": "?", "options": ["a", "b"], "answer": "ab"[i % 2]}) for i in range(97)]
    rows += [(f"row {i}", {"question": "", "options": ["a", "b"], "answer": "a"}) for i in range(97, 100)]

    def documents(**settings: Any) -> int:
        return len(list(Questions(rows, QAConfig(**settings), {}, "quiz", Invalid()).documents("prompts")))

    with pytest.raises(ArtifactError, match=r"quiz: 3 of 100 rows are damaged.*max_damaged.*3 empty question"):
        documents()
    assert documents(max_damaged=0.03) == 97


def stage(tmp_path: Path, name: str = "out", **settings: Any) -> prepare.Manifest:
    return prepare.run(configs.build(PrepareConfig, {"kind": "prompts", **settings}), tmp_path / name)


def test_from_parquet_to_prompts_in_both_forms_with_a_contaminated_item(tmp_path: Path):
    """The stage as users run it; the third item has an evaluation item's options in another order."""
    rows = [
        {"question": "Which planet is largest?", "choices": ["Mars", "Jupiter", "Venus"], "answer": 1},
        {"question": "How many moons has Mars?", "choices": ["1", "2", "3"], "answer": 1},
        {"question": "Why does ice float?", "answer": 0, "choices": [
            "Ice is less dense than water", "Ice is denser than water", "Water pulls on it", "Air is in it"]},
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "quiz.parquet")
    held_out = {"question": "Frozen water stays on top because", "options": rows[2]["choices"][::-1], "answer": "D"}
    (tmp_path / "exam.jsonl").write_text(json.dumps(held_out) + "\n")
    exam = {"type": "jsonl", "name": "exam", "path": str(tmp_path / "exam.jsonl"), "qa": {}}
    quiz = {"type": "parquet", "name": "quiz", "path": str(tmp_path / "quiz.parquet")}
    settings = {"layout": "mmlu", "forms": ["choice", "open"], "domain": "astronomy", "shuffle": False}
    manifest = stage(
        tmp_path, sources=[quiz | {"qa": settings}],
        decontaminate={"benchmarks": [exam]},
    )  # fmt: skip
    assert manifest.summary["sources"]["quiz"]["dropped"] == {
        "in benchmark exam": 1, "not asked openly: the answer could be worded otherwise": 1,
    }  # fmt: skip
    found = list(read_rows(tmp_path / "out", "prompts"))
    kinds = [kind_of_question(json.loads(row["metadata"]), row["source"], row["verifier"]) for row in found]
    assert kinds == [("astronomy", "choice", 3), ("astronomy", "open", 0)] * 2
    assert [row["verifier"] for row in found] == ["label", "short", "label", "answer"]
    assert found[1]["id"] == f"{found[0]['id']}:open"
    assert json.loads(found[1]["metadata"])["parent_id"] == found[0]["id"]
    assert json.loads(found[0]["metadata"])["decontam"] == {"ngram": 9, "hit": None}
    [hit] = json.loads((tmp_path / "out" / "contamination.json").read_text())
    assert hit["words"].startswith("the same options: ")


def test_short_questions_are_known_by_their_options_in_any_order():
    exam = [Item("e", "Largest planet?", "Mars", options=("Mars", "Jupiter", "Venus"))]
    known = Decontaminator(9)
    known.add("exam", map(to_benchmark, exam))
    again = shuffled(choice("Largest planet?"), seed=1)
    assert again.options != exam[0].options
    assert [hit is not None for hit in known.find_all([to_prompt(again), to_prompt(choice("Smallest?"))])] == [
        True,
        False,
    ]
    opened = to_open(again, RULES)
    assert isinstance(opened, Item)
    assert known.find(to_prompt(opened)) is not None


@pytest.mark.parametrize(
    ("held_out", "found"),
    [
        ("He said that a heavy stone falls as fast as a light one in a vacuum", True),  # in the question
        ("Nobody knows it, but both of them reach the ground at once there too", True),  # in an option
        ("Which of these? (A) It is the stone (B) It is the feather (C) Neither", True),  # only as the prompt shows it
        ("A heavy stone falls as fast as a feather if it is not windy", False),
    ],
)
def test_contamination_is_looked_for_with_and_without_the_template(tmp_path: Path, held_out: str, found: bool):
    row = {
        "question": "Why is it that a heavy stone falls as fast as a light one on the moon?",
        "options": ["It is the stone", "It is the feather", "both of them reach the ground at once there"], "answer": 2,
    }  # fmt: skip
    other = {"question": "2 + 2?", "options": ["4", "5"], "answer": "4"}
    (tmp_path / "quiz.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(other) + "\n")
    (tmp_path / "exam.jsonl").write_text(json.dumps({"text": held_out}) + "\n")
    quiz = {"type": "jsonl", "name": "quiz", "path": str(tmp_path / "quiz.jsonl"), "qa": {"shuffle": False}}
    exam = {"type": "jsonl", "name": "exam", "path": str(tmp_path / "exam.jsonl")}
    manifest = stage(tmp_path, sources=[quiz], decontaminate={"benchmarks": [exam]})
    assert manifest.summary["sources"]["quiz"]["dropped"] == ({"in benchmark exam": 1} if found else {})


def test_near_duplicates_below_the_share_that_nine_words_in_a_row_imply(tmp_path: Path):
    words = [letter * 3 for letter in "abcdefghijklmnop"]
    changed = [word if place % 8 != 7 else "x" for place, word in enumerate(words)]
    for name, text in (("quiz", " ".join(changed)), ("exam", " ".join(words))):
        (tmp_path / f"{name}.jsonl").write_text(
            json.dumps({"question": text, "answer": "x"})
            + "\n"
            + json.dumps({"question": f"{name} is?", "answer": "y"})
        )
    quiz, exam = (
        {"type": "jsonl", "name": name, "path": str(tmp_path / f"{name}.jsonl"), "qa": {"instructions": {}}}
        for name in ("quiz", "exam")
    )
    near = {"threshold": 0.4, "ngram": 3, "bands": 32, "rows": 2}
    for name, settings, dropped in (("a", {}, {}), ("b", {"near": near}, {"in benchmark exam": 1})):
        manifest = stage(tmp_path, name, sources=[quiz], decontaminate={"benchmarks": [exam], **settings})
        assert manifest.summary["sources"]["quiz"]["dropped"] == dropped
