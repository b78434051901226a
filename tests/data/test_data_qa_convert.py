"""Multiple choice and open, there and back: what cannot be asked openly says why, and nothing is lost."""

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bloomery.data.document import Drops
from bloomery.data.qa import Item, shuffled, to_prompt
from bloomery.data.qa_convert import one_wording, to_choice, to_open
from bloomery.data.qa_filters import QAFilterConfig, drop_reason, refer_to_each_other
from bloomery.data.qa_source import QAConfig, Questions
from bloomery.data.read import Invalid

RULES = QAFilterConfig()


def choice(question: str, options: str = "1905|1915|1925", label: str = "A") -> Item:
    found = tuple(options.split("|"))
    gold = found[ord(label) - ord("A")]
    return Item("q", question, gold, form="choice", options=found, gold_label=label, answer_form="label")


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (choice("Which of the following years was it?"), "needs its options"),
        (choice("All of these are right except?"), "needs its options"),
        (choice("Which statement is not true?"), "needs its options"),
        (choice("Choose the year."), "needs its options"),
        (choice("Is statement II right?"), "needs its options"),
        (choice("Which answer fits?"), "needs its options"),
        (choice("When?", "1905|1915|none of the above", "C"), "gold names options"),
        (choice("When?", "1905|1915|Both A and B", "C"), "gold names options"),
        (choice("When?", "I only|II only|neither", "A"), "gold names options"),
        (choice("The year was ____ then?", "Paris|London|Rome"), "a blank that several answers could fill"),
        (choice("The capital of France is", "Paris|London|Rome"), "no question without its options"),
        (choice("Who?", "he was a king of all of the Franks in the year|x|y"), "open answer of more than 10 words"),
        (choice("Was it so?", "Yes|No|Nobody knows"), "true or false"),
        (choice("Who?", "paris|Paris.|Rome"), "another option reads like the gold"),
        (choice("Why?", "it is cold|it is warm|it is wet"), "the answer could be worded otherwise"),
    ],
)
def test_why_a_question_cannot_be_asked_openly(item: Item, reason: str):
    assert to_open(item, RULES) == reason


@pytest.mark.parametrize(
    ("item", "form"),
    [
        (choice("When was it?"), "math"),
        (choice("Find the year."), "math"),
        (choice("The year was ____ then?"), "math"),
        (choice("Some facts, all of the following.\n\nWho was it?", "Marie Curie|Max Planck|Lise Meitner"), "short"),
        (choice("מה בירת צרפת?", "$x^2$|$y$|$z$"), "math"),
    ],
)
def test_an_opened_question_keeps_its_id_and_its_options(item: Item, form: str):
    opened = to_open(item, RULES)
    assert isinstance(opened, Item)
    assert (opened.id, opened.parent_id, opened.options, opened.answer_form) == (item.id, item.id, item.options, form)
    assert opened.row_id == f"{item.id}:open"
    assert item.options[1] not in to_prompt(opened).text
    assert to_open(opened, RULES) is opened
    assert to_choice(opened) == item


def test_ambiguous_questions_can_be_marked_for_a_model_to_try():
    item = choice("Why?", "it is cold|it is warm|it is wet")
    marked = to_open(item, RULES, "mark")
    assert isinstance(marked, Item)
    assert marked.transforms[-1]["ambiguous"]
    assert to_choice(marked) == item
    assert not one_wording(item)


def test_an_open_item_becomes_a_choice_among_distractors_and_open_again():
    item = Item("q", "What is 6 times 7?", "42", answer_form="math")
    asked = to_choice(item, ["48", "36", "41"], seed=3)
    assert sorted(asked.options) == ["36", "41", "42", "48"]
    assert (asked.options[asked.gold_index], asked.id, asked.parent_id) == ("42", "q", "q")
    assert drop_reason(asked, RULES) is None
    assert to_open(asked, RULES) == item
    assert to_choice(asked) is asked
    with pytest.raises(ValueError, match="q: 0 distractors; expected 1 to 9, all different from the gold"):
        to_choice(item)
    with pytest.raises(ValueError, match="all different"):
        to_choice(item, ["42"])


def test_options_that_speak_of_each_other_keep_their_order():
    assert refer_to_each_other(("1905", "All of the above"))
    assert refer_to_each_other(("x", "y", "A and B"))
    assert refer_to_each_other(("x", "option A"))
    assert not refer_to_each_other(("salt and pepper", "all of Europe", "Berlin"))
    rows = [("row", {"question": "When?", "options": ["x", "y", "none of the above"], "answer": "B"})] * 5
    documents = Questions(rows, QAConfig(), {}, "quiz", Invalid()).documents("prompts")
    assert all(document.metadata["options"][-1] == "none of the above" for document in documents)


TEXT = st.text(st.sampled_from(string.ascii_letters + " éßЖשםعربی漢字,.-'"), min_size=1, max_size=30).map(str.strip)
GOLDS = st.lists(st.one_of(st.integers(-999, 999).map(str), TEXT.filter(bool)), min_size=2, max_size=10, unique=True)


@settings(max_examples=50, deadline=None)
@given(question=TEXT, options=GOLDS, place=st.integers(0, 9), seed=st.integers(0, 9))
def test_no_item_is_lost_on_the_way(question: str, options: list[str], place: int, seed: int):
    """Whatever the item: it is kept, or dropped for a reason; opened, or it stays a choice for a reason; and back it is
    what it was. Its row holds all of it."""
    label = "ABCDEFGHIJ"[place % len(options)]
    item = choice(f"{question}?", "|".join(options), label)
    assert item.options == tuple(options)
    if drop_reason(item, RULES) is not None:
        return
    mixed = shuffled(item, seed)
    assert sorted(mixed.options) == sorted(options)
    assert mixed.options[mixed.gold_index] == item.gold_text
    document = to_prompt(mixed)
    assert Item.from_row({"source": ""}, document.metadata) == mixed
    opened = to_open(mixed, RULES, "mark")
    assert opened if isinstance(opened, str) else to_choice(opened) == mixed


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(TEXT, GOLDS), max_size=5))
def test_every_row_is_accounted_for(questions: list[tuple[str, list[str]]]):
    rows = [(f"row {i}", {"question": q, "options": o, "answer": 0}) for i, (q, o) in enumerate(questions)]
    for form in ("choice", "open"):
        invalid = Invalid("drop", Drops())
        kept = list(Questions(rows, QAConfig(forms=[form], max_damaged=1), {}, "s", invalid).documents("prompts"))
        assert len(kept) + invalid.drops.total == len(rows)
