"""Verdicts of the verifiers that need no worker process, on right, wrong, malformed and hostile completions."""

import time
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bloomery import verify
from bloomery.errors import ArtifactError, ConfigError
from bloomery.verify import Deferred, Verdict
from bloomery.verify.answer import answer, too_costly
from bloomery.verify.extract import boxes
from bloomery.verify.numbers import read_number
from bloomery.verify.tex import brace_arguments


def status(verifier: str, completion: str, gold: str, **options: bool) -> str:
    outcome = verify.VERIFIERS[verifier](completion, gold, options.get("require_think", False))
    assert isinstance(outcome, Verdict), "this case should not need a worker"
    return outcome.status


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("21", "21"), ("021", "21"), ("21.0", "21"), ("+21", "21"), ("21.", "21"), (" 21 ", "21"), ("(21)", "21"),
        ("-7", "-7"), ("−7", "-7"), ("1,081", "1081"), ("1{,}081", "1081"), ("1081", "1,081"), ("1\\!081", "1081"),
        ("0.5", "1/2"), ("\\frac{1}{2}", "0.5"), ("\\dfrac12", "0.5"), ("\\frac{-1}{2}", "-0.5"), ("-\\frac12", "-1/2"),
        ("2/4", "1/2"), ("3\\frac{1}{2}", "3.5"), ("0.333333", "1/3"), ("0.3333333333", "\\frac{1}{3}"),
        ("\\$5.00", "5"), ("$5", "5"), ("-\\$5", "-5"), ("50\\%", "50"), ("50", "50\\%"), ("x=5", "5"),
        ("5\\text{ cm}", "5"), ("5", "5\\text{ cm}"), ("5\\text{ inches}", "5\\text{ inch}"), ("90^\\circ", "90"),
        ("1.5\\times10^{3}", "1500"), ("1e3", "1000"), ("２１", "21"), ("50000000000000001", "50000000000000001"),
    ],
)  # fmt: skip
def test_equal_numbers_are_correct(text: str, gold: str):
    assert status("answer", rf"so \boxed{{{text}}}", gold) == "correct"


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("22", "21"), ("-21", "21"), ("50000000000000000", "50000000000000001"), ("0.5", "50\\%"), ("0.333", "1/3"),
        ("0.5000001", "1/2"), ("3.1400001", "3.14"), ("1,08", "108"), ("10,81", "1081"), ("1/0", "0"),
        ("23\\cdot 47", "1081"), ("23*47", "1081"), ("\\gcd(12,18)", "6"), ("20+1", "21"), ("25-4", "21"),
        ("(3)(7)", "21"),
        ("\\sqrt{441}", "21"), ("21^1", "21"), ("12, 1", "12"), ("\\{21\\}", "21"), ("twenty-one", "21"),
        ("21 or 22", "21"),
        ("5\\text{ or }6", "5"), ("5\\text{ million}", "5"), ("5\\text{ cm}", "5\\text{ kg}"), ("x==5", "5"),
        ("5\0", "5"), ("1e999999999", "5"), ("9" * 5000, "5"), ("{" * 40 + "5" + "}" * 40, "5"),
    ],
)  # fmt: skip
def test_anything_else_is_wrong_for_a_gold_number(text: str, gold: str):
    assert status("answer", rf"\boxed{{{text}}}", gold) == "wrong"


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("", "no_answer"), ("21", "no_answer"), ("\\boxed{21", "no_answer"), ("\\boxed{\\boxed{21}", "no_answer"),
        ("\\boxed{}", "no_answer"), ("\\boxed{ }", "no_answer"), ("\\boxed 21", "no_answer"), ("21}", "no_answer"),
        ("\\boxed{20} no, \\boxed{21}", "multi_box"), ("\\boxed{21} \\boxed{ 21}", "correct"),
        ("\\boxed{\\boxed{21}}", "correct"), ("{ \\boxed{21}", "correct"), ("} \\boxed{21}", "correct"),
        ("\\boxed {21}", "correct"), ("<think>\\boxed{3}</think>\\boxed{21}", "correct"),
        ("<think>\\boxed{21}", "no_think"),
        ("<think>", "no_think"), ("<think>\\boxed{21}</think>", "no_answer"),
        ("a</think>b</think>\\boxed{21}", "correct"),
        ("\\boxed{21}</think>20", "no_answer"), ("\udcff\0\\boxed{21}", "correct"),
    ],
)  # fmt: skip
def test_where_the_answer_is_read(completion: str, expected: str):
    assert status("answer", completion, "21") == expected


def test_thinking_can_be_required():
    assert status("answer", "\\boxed{21}", "21", require_think=True) == "no_think"
    assert status("answer", "7*3=21</think>\\boxed{21}", "21", require_think=True) == "correct"


@pytest.mark.parametrize(
    "completion",
    [
        "\\boxed{1" + "0" * 10_000_000 + "}", "\\boxed{" * 1_000_000, "{" * 10_000_000, "}" * 10_000_000 + "\\boxed{",
        "<think>" * 1_000_000, "\\boxed{" * 25_000 + "}" * 25_000, "\\" * 10_000_001 + "boxed{5}",
    ],
)  # fmt: skip
@pytest.mark.parametrize("verifier", ["answer", "exact", "choice", "format"])
def test_ten_million_characters_are_refused_quickly(verifier: str, completion: str):
    gold = "A" if verifier == "choice" else "5"
    start = time.process_time()
    assert status(verifier, completion, gold) != "correct"
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("9^{9^{9^{9}}}", "a power too large to evaluate"), ("9^9^9", "a power too large to evaluate"),
        ("9^{9}^{9}", "a power too large to evaluate"), ("9^{x^{9^{9}}}", "a power too large to evaluate"),
        ("e^{x^{2^{3}}}", "a power too large to evaluate"), ("e^{9^{9}}", "a power too large to evaluate"),
        ("e^{x^2^9}", "a power too large to evaluate"), ("(10^{10^{10}})!", "a power too large to evaluate"),
        ("2^{100000}", "a power too large to evaluate"), ("99999!", "a factorial too large to evaluate"),
        ("(9^{9})!", "a factorial too large to evaluate"), ("9!!", "a factorial too large to evaluate"),
        ("(" * 31 + "x" + ")" * 31, "31 nested groups, at most 30"), ("(" * 500, "500 characters, at most 256"),
        ("x" + "1" * 41, "a number of more than 40 digits"), ("x\0", "a NUL character"),
    ],
)  # fmt: skip
def test_costly_expressions_never_reach_the_parser(text: str, reason: str):
    assert too_costly(text) == reason
    assert answer(rf"\boxed{{{text}}}", "x", False) == Verdict(0.0, "parse_fail", reason)


@pytest.mark.parametrize(
    "text",
    [
        "x^2y^3",
        "x^{10}",
        "2^{2005}",
        "\\frac{1}{2004!}",
        "(n-k)!",
        "e^{i\\pi}",
        "a^{2}+b^{2}",
        "2e^{-x^{2}}",
        "e^{x^3}",
    ],
)
def test_ordinary_expressions_pass_the_guard(text: str):
    assert too_costly(text) is None


def test_a_constant_must_be_evaluated():
    gold = "2\\sqrt{3}"
    assert status("answer", "\\boxed{\\sqrt{3}+\\sqrt{3}}", gold) == "wrong"
    assert status("answer", "\\boxed{\\log(9)}", gold) == "wrong"
    for fair in ("\\sqrt{12}", "2\\cdot\\sqrt3", "\\frac{6}{\\sqrt3}"):
        assert isinstance(answer(rf"\boxed{{{fair}}}", gold), Deferred)
    assert status("answer", "\\boxed{3\\sqrt{3}-\\sqrt{3}}", gold) == "wrong"
    assert status("answer", "\\boxed{3\\pi-\\pi}", "2\\pi") == "wrong"
    for found, other in (
        ("-1+\\sqrt5", "\\sqrt5-1"),
        ("\\sqrt5 - 1", "-1+\\sqrt5"),
        ("1,\\quad -\\sqrt2", "1,-\\sqrt2"),
    ):
        assert isinstance(answer(rf"\boxed{{{found}}}", other), Deferred), "a sum in another order"
    assert isinstance(answer("\\boxed{(x+1)^2}", "x^2+2x+1"), Deferred), "with variables, any equivalent form is fair"


def test_an_empty_gold_is_refused_not_scored():
    for verifier in ("answer", "exact", "choice", "gym"):
        with pytest.raises(ArtifactError, match=verifier):
            verify.judge(verifier, "\\boxed{1}", " ")


@pytest.mark.parametrize(
    "text",
    ["B", "(B)", "B.", "B:", "b", "[B]", "**B**", "$B$", "\\text{B}", "\\textbf{(B)}", "B) fig", "(B) fig", "Ｂ"],
)
def test_choice_reads_a_label(text: str):
    assert status("choice", rf"\boxed{{{text}}}", "B") == "correct"
    assert status("choice", f" {text}\n", "B") == "correct", "a bare label needs no box"
    assert status("choice", rf"\boxed{{{text}}}", "C") == "wrong"


@pytest.mark.parametrize(
    "text", ["A or B", "AB", "A, B", "A) or B)", "B) or A", "B. or c.", "not B", "Banana", "B fig", "-"]
)
def test_choice_never_takes_a_letter_that_happens_to_stand_there(text: str):
    assert status("choice", rf"\boxed{{{text}}}", "B") == "wrong"


@pytest.mark.parametrize("text", ["", "The answer is B", "B or C", "A B C D", "Which is it?\nA) fig\nB) nut"])
def test_choice_without_a_box_takes_nothing_but_a_label(text: str):
    assert status("choice", text, "B") != "correct"


def test_choice_text_must_belong_to_the_label():
    assert status("choice", "\\boxed{B) fig}", "B) fig") == "correct"
    assert status("choice", "\\boxed{B}", "B) Vitamin C") == "correct"
    assert status("choice", "\\boxed{B) nut}", "B) fig") == "wrong"


@pytest.mark.parametrize("text", ["Ann", "ann", " ANN. ", "\\text{Ann}", "the Ann", '"Ann"'])
def test_exact_ignores_case_and_dress(text: str):
    assert status("exact", rf"\boxed{{{text}}}", "Ann") == "correct"


@pytest.mark.parametrize("text", ["Anna", "Ann Bob", "Ann or Bob", "Bob", "not Ann", "nnA"])
def test_exact_is_exact(text: str):
    assert status("exact", rf"\boxed{{{text}}}", "Ann") == "wrong"


def test_exact_reads_numerals_and_dashes():
    assert status("exact", "\\boxed{Twelve}", "12") == "correct"
    assert status("exact", "\\boxed{left–right}", "left-right") == "correct"


@pytest.mark.parametrize(
    ("completion", "think", "expected"),
    [
        ("\\boxed{1}", False, "correct"), ("so \\boxed{1}.", False, "correct"), ("$\\boxed{1}$", False, "correct"),
        ("\\boxed{1} done", False, "wrong"), ("\\boxed{1}\\boxed{1}", False, "multi_box"), ("1", False, "no_answer"),
        ("\\boxed{ }", False, "no_answer"), ("\\boxed{1", False, "no_answer"), ("\\boxed{1}", True, "no_think"),
        ("<think>a</think>\\boxed{1}", True, "correct"), ("a</think>\\boxed{1}", True, "correct"),
        ("<think> </think>\\boxed{1}", True, "no_think"), ("<think>a\\boxed{1}", False, "no_think"),
        ("a<think>b</think>\\boxed{1}", True, "no_think"), ("<think>a</think></think>\\boxed{1}", True, "no_think"),
        ("<think>\\boxed{1}</think>\\boxed{1}", True, "multi_box"),
    ],
)  # fmt: skip
def test_format(completion: str, think: bool, expected: str):
    assert status("format", completion, "", require_think=think) == expected


def test_unknown_verifiers_are_explained():
    with pytest.raises(ConfigError, match="did you mean answer"):
        verify.judge("anwser", "", "1")


def test_the_page_names_every_status_and_verifier():
    page = (Path(__file__).parents[2] / "docs" / "verify.md").read_text(encoding="utf-8")
    for name in (*get_args(verify.Status), *verify.VERIFIERS):
        assert f"`{name}`" in page


def test_scores_follow_statuses():
    assert verify.judge("answer", "\\boxed{1}", "1") == Verdict(1.0, "correct", "")
    assert verify.judge("answer", "", "1").score == 0.0
    assert Verdict.of("infra_error").score is None


PLAIN = st.text(alphabet="5x \n", max_size=4) | st.sampled_from([r"\{", r"\}", r"\\", r"\frac"])
NESTED = st.recursive(
    PLAIN.map(lambda text: (text, [])),
    lambda inner: st.tuples(st.sampled_from(["", r"\boxed"]), st.lists(inner, max_size=3)).map(
        lambda pair: wrap(*pair)
    ),
)


def wrap(command: str, parts: list) -> tuple[str, list[str]]:
    """A group or box around parts, each (text, contents of its outermost boxes)."""
    content = "".join(text for text, _ in parts)
    return f"{command}{{{content}}}", [content] if command else [box for _, found in parts for box in found]


@settings(deadline=None)
@given(st.lists(NESTED, max_size=4))
def test_box_search_finds_the_boxes_that_were_built(parts: list):
    text = " ".join(part for part, _ in parts)
    assert boxes(text) == [box for _, found in parts for box in found]
    assert boxes(text + r" \boxed{" + text) is None


@settings(deadline=None)
@given(st.fractions(min_value=-1000, max_value=1000, max_denominator=500))
def test_fractions_are_read_back(value):
    for text in (f"{value}", rf"\frac{{{value.numerator}}}{{{value.denominator}}}"):
        number = read_number(text)
        assert number is not None
        assert number.value == value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\\frac12", "\\frac{1}{2}"), ("\\frac1{2x}", "\\frac{1}{2x}"), ("\\frac{\\sqrt6}3", "\\frac{\\sqrt{6}}{3}"),
        ("\\frac \\pi4", "\\frac{\\pi}{4}"), ("10\\sqrt 2+1", "10\\sqrt{2}+1"), ("\\sqrt[3]2", "\\sqrt[3]{2}"),
        ("\\frac{1}{2}", "\\frac{1}{2}"), ("\\frac", "\\frac"), ("\\sqrt", "\\sqrt"), ("\\frac{1", "\\frac{1"),
    ],
)  # fmt: skip
def test_arguments_get_their_braces(text: str, expected: str):
    assert brace_arguments(text) == expected
