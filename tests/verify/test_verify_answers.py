"""Labels, short free-form answers and the combined reward: right, wrong, malformed and hostile, in many scripts."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bloomery import verify
from bloomery.errors import ArtifactError, ConfigError
from bloomery.verify import Reward, Verdict, form_of
from bloomery.verify.audit import Item, canaries
from bloomery.verify.dates import Date, read_date
from bloomery.verify.normalize import normalize
from bloomery.verify.quantities import read_quantity

FOUR = json.dumps({"label": "B", "options": 4})


def verdict(verifier: str, text: str, gold: str) -> Verdict:
    outcome = verify.VERIFIERS[verifier](rf"so \boxed{{{text}}}", gold, False)
    assert isinstance(outcome, Verdict)
    return outcome


@pytest.mark.parametrize("gold", ["B", "B) fig", FOUR])
@pytest.mark.parametrize("text", ["B", "(B)", "B.", "[B]:", "$B$", "**B**", "b", "\\text{B}", "Ｂ", "\u200fB\u200e"])
def test_a_label_is_a_single_letter(text: str, gold: str):
    assert verdict("label", text, gold).correct


@pytest.mark.parametrize("gold", ["B", "B) fig", FOUR])
@pytest.mark.parametrize(
    "text", ["A", "A or B", "AB", "ABCD", "A, B, C, D", "B or A", "B) or A)", "not B", "Banana",
    "the answer is B", "-",
             "BB", "8", "В", "ب", "E", ")"],
)  # fmt: skip
def test_anything_else_is_no_label(text: str, gold: str):
    """The Cyrillic В is not the Latin B."""
    assert not verdict("label", text, gold).correct


def test_the_label_alone_is_graded():
    assert verdict("label", "B) nut", "B) fig").correct
    assert verdict("label", "B. Vitamin C", "B) Vitamin C").correct
    assert not verdict("label", "A) fig", "B) fig").correct
    assert not verdict("label", "B) fig", "B").correct, "only a label is asked for"
    assert verify.judge("label", "B", "B").status == "no_answer", "the box is asked for"
    assert verdict("label", "F", FOUR).reason == "F is no option: the labels are A to D"


@pytest.mark.parametrize(
    ("gold", "message"),
    [
        (json.dumps({"label": "E", "options": 4}), "has the answer E, and its labels are A to D"), ("",
        "expected a label"),
        (json.dumps({"label": "B"}), "expected a label"), ('{"label": "B", "options": 1}', "expected a label"),
        ("AB", "expected a label"), ('{"label', "expected a label"), ("[1]", "expected a label"),
    ],
)  # fmt: skip
def test_a_gold_that_is_no_label_is_refused(gold: str, message: str):
    with pytest.raises(ArtifactError, match=message):
        verdict("label", "B", gold)


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("the Eiffel Tower.", "Eiffel tower"), ("An  apple", "apple"), ('"Ann"', "ANN"), ("Straße", "STRASSE"),
        ("l’été", "l'été"), ("l'e\u0301te\u0301", "L'ÉTÉ"), ("left–right", "left-right"), ("«Мир»", "мир"),
        ("twelve angry men", "12 Angry Men"), ("Twenty", "20"), ("３", "three"), ("٢١", "21"), ("H₂O", "H2O"),
        ("3 kg", "3 kilograms"), ("3kg", "3 kg"), ("three kilogram", "3 kg"), ("$5", "5 dollars"),
        ("5 US dollars", "$5.00"),
        ("40%", "40 percent"), ("40\\%", "40 per cent"), ("2.5 million people", "2,500,000 people"), ("0.5", "1/2"),
        ("3½ cups", "3.5 cups"), ("1,000", "1000"), ("-5 °C", "-5 degrees celsius"), ("\\frac{1}{2}",
        "0.5"), ("$5$", "5"),
        ("the 12 men", "12 men"), ("5\\text{ cm}", "5 centimetres"), ("3.0000001", "3.0000002"),
        ("60 km/h", "60 kph"),
        ("1969-07-20", "July 20, 1969"), ("20 July 1969", "July 20th, 1969"), ("Sunday, July 20, 1969",
        "20/07/1969"),
        ("the 20th of July 1969", "1969/7/20"), ("Sept. 1969", "September 1969"), ("4 March", "March 4th"),
        ("red, green and blue", "Red; green; blue"), ("red, green, and blue", "red, green & blue"),
        ("2, three", "two, 3"),
        ("الرياض", "الرياض"), ("\u202bالرياض\u202c", "الريـاض"), ("ﷲ", "الله"), ("أحمر، أخضر",
        "أحمر, أخضر"), ("שלום.", "שלום"),
        ("東京。", "東京"), ("ﬁre", "fire"), ("می‌روم", "میروم"),
    ],
)  # fmt: skip
def test_the_same_written_otherwise_is_right(text: str, gold: str):
    assert verdict("short", text, gold).correct
    assert verdict("short", gold, text).correct, "equality has no direction"


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("Anna", "Ann"), ("Ann or Bob", "Ann"), ("not Ann", "Ann"), ("Ann, Bob, Cy", "Bob"), ("Vitamin",
        "Vitamin A"),
        ("3", "3 kg"), ("3 kg", "3"), ("3 g", "3 kg"), ("3000 g", "3 kg"), ("3 to 4 kg", "3 kg"),
        ("5 or 6", "5"), ("$5", "€5"),
        (".5", "5"), ("-5", "5"), ("10²", "102"), ("3½", "31/2"), ("0.4", "40%"), ("1000001", "1000000"),
        ("3.1", "3.2"),
        ("1,5", "15"), ("5 million", "5"), ("1/0", "0"), ("July 1969", "July 20, 1969"), ("03/04/1969",
        "3 April 1969"),
        ("30 February 1969", "2 March 1969"), ("20 July 1970", "20 July 1969"), ("1969", "July 1969"),
        ("blue, green, red", "red, green, blue"), ("red, green", "red, green, blue"), ("red, red, blue",
        "red, blue"),
        ("red green blue", "red, green, blue"), ("cafe", "café"), ("الرياض جدة", "الرياض"), ("ضايرلا", "الرياض"),
        ("Москва", "Mockba"), ("twenty-one apples", "21 apples"),
    ],
)  # fmt: skip
def test_anything_else_is_wrong(text: str, gold: str):
    assert verdict("short", text, gold).status == "wrong"
    assert verdict("short", gold, text).status == "wrong"


def test_golds_with_alternatives_and_lists_in_any_order():
    city = json.dumps({"gold": "Mumbai", "alt_golds": ["Bombay", "12 islands"]})
    assert all(verdict("short", text, city).correct for text in ("mumbai", "Bombay.", "twelve islands"))
    assert not verdict("short", "Mumbai, Bombay", city).correct
    colours = json.dumps({"gold": "red, green, 3 kg", "unordered": True})
    assert verdict("short", "three kilograms, red and green", colours).correct
    assert not verdict("short", "red, red, 3 kg", colours).correct


def test_an_answer_that_almost_is_right_is_told_and_not_paid():
    assert verdict("short", "Charlemange", "Charlemagne") == Verdict(
        0.0, "wrong", "near miss: Charlemange is not Charlemagne"
    )
    assert verdict("short", "Раris", "Paris").reason == "letters of several scripts in 'Раris'"
    assert verdict("short", "Rome", "Paris").reason == "Rome is not Paris"
    assert verdict("short", "Ann", "Ana").reason == "Ann is not Ana", "short words are no slips"


@pytest.mark.parametrize(
    "gold",
    ["", " . ", '{"gold": ""}', '{"gold": "a", "alt_golds": [""]}', '{"gold": "a", "b": 1}', '{"gold', '{"gold": 3}'],
)  # fmt: skip
def test_a_gold_that_says_nothing_is_refused(gold: str):
    with pytest.raises(ArtifactError, match="'short' has the answer .* none of them empty"):
        verdict("short", "a", gold)


HOSTILE = ["", " ", ",", "A B C D E F G H I J", "A, B, C, D", "Which of them is red?\nA) fig\nB) nut",
"nut " * 2500,
           "nut, " * 2500, "\0", "\u202e", "{" * 900 + "}" * 900, "9" * 900, "1e999", "fig or nut",
           "all of the above"]  # fmt: skip


@pytest.mark.parametrize("gold", ["nut", "3 kg", "July 1969", "red, nut", "B"])
@pytest.mark.parametrize("verifier", ["short", "label"])
def test_saying_everything_or_nothing_is_never_paid(verifier: str, gold: str):
    gold = gold if verifier == "short" else "B"
    assert not any(verdict(verifier, text, gold).correct for text in HOSTILE)
    assert not any(verify.judge(verifier, text, gold).correct for text in HOSTILE)


@settings(deadline=None)
@given(st.text(max_size=30), st.sampled_from(["nut", "3 kg", "4 March 1969", "red and blue"]))
def test_no_text_around_a_right_answer_is_paid_by_luck(text: str, gold: str):
    said = normalize(f"{text}q{gold}")
    assert said == normalize(gold) or not verdict("short", f"{text}q{gold}", gold).correct


def test_readings():
    quantity = read_quantity("minus 3") or read_quantity("-3.50 EUR")
    assert (float(quantity.value), quantity.unit) == (-3.5, "euro")
    assert read_quantity("3 very long unit names") is None
    assert read_date("20/07/1969") == Date(1969, 7, 20) == read_date("07/20/1969")
    assert read_date("03/04/1969") is None
    assert read_date("03/03/1969") == Date(1969, 3, 3)
    assert read_date("29 February 1900") is None
    assert read_date("29 February") == Date(None, 2, 29)


@pytest.mark.parametrize(
    ("completion", "right", "form"),
    [
        ("<think>a</think>\\boxed{B}", True, True), ("<think>a</think>\\boxed{B} as I said", True, True),
        ("<think>a</think>\\boxed{A}", False, True), ("a</think>\\boxed{B}\\boxed{B}", True, False),
        ("<think></think>\\boxed{B}", True, False), ("<think>\\boxed{B}</think>\\boxed{B}", True, False),
        ("<think>a</think>B", False, False), ("\\boxed{B}", False, False),
    ],
)  # fmt: skip
def test_rewards_of_accuracy_and_format(completion: str, right: bool, form: bool):
    accuracy, kept = verify.judge("label", completion, "B", require_think=True), form_of(completion, require_think=True)
    assert (accuracy.correct, kept.correct) == (right, form)
    assert Reward().of(accuracy, kept).score == float(right and form)
    assert Reward(combine="accuracy").of(accuracy, kept) == accuracy
    assert Reward(combine="sum", format_weight=0.25).of(accuracy, kept).score == 0.75 * right + 0.25 * form
    assert Reward(combine="product", format_weight=0.25).of(accuracy, kept).score == right * (1.0 if form else 0.75)


def test_a_right_answer_in_a_wrong_form_says_which_was_wrong():
    accuracy, form = Verdict.of("correct"), Verdict.of("multi_box", "2 boxes, expected 1")
    assert Reward().of(accuracy, form) == Verdict(0.0, "multi_box", "right, but its form: 2 boxes, expected 1")
    unjudged = Verdict.of("infra_error", "the worker died")
    assert Reward(combine="sum", format_weight=0.5).of(unjudged, form) == unjudged, "missing, never a zero"
    with pytest.raises(ValueError, match="format_weight: missing; combine: sum needs it"):
        Reward(combine="sum")
    with pytest.raises(ValueError, match="format_weight: without effect under combine: and"):
        Reward(format_weight=0.5)


def test_answer_forms_name_their_verifiers():
    assert [verify.for_form(form) for form in ("label", "short", "math")] == ["label", "short", "answer"]
    with pytest.raises(ConfigError, match="answer form 'essay': unknown; choose label, short, math"):
        verify.for_form("essay")


@pytest.mark.parametrize(
    ("verifier", "gold"), [("label", FOUR), ("label", "B"), ("short", '{"gold": "12 men"}'), ("short", "red, green")]
)
def test_golds_verify_themselves(verifier: str, gold: str):
    assert verify.judge(verifier, verify.echo(verifier, gold), gold).correct
    for case in canaries(Item("1", "s", "Who of them?", gold, verifier)):
        assert verify.judge(verifier, case.completion, gold).correct == case.right, case.kind
