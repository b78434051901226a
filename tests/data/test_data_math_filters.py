import pytest

from bloomery.data.document import Document, Drops
from bloomery.data.math_filters import MathFilterConfig, filter_math, math_drop_reason

CHOICE = "What is the sum? (A) 3 (B) 4 (C) 5 (D) 6 (E) 7"


@pytest.mark.parametrize(
    ("question", "answer", "reason"),
    [
        ("What is the sum of 2 and 3?", "5", None),
        ("Simplify: $-10-4(n-5)$", "10-4n", None),
        ("Find $f(1)$ for $f(x) = (x) (a)$ where $a$ is 3.", "3", None),
        ("Find the mean of (1) and of (3) for a sample of two.", "2", None),
        ("How far is it? Show your work.", "3", None),
        ("The chart of accounts has 3 entries. How many are there?", "3", None),
        ("Find x. (a) $x+1=2$ (b) $x+2=4$", "1, 2", "several questions"),
        ("Consider a circle of radius 2.\n1. Find its area.\n2. Find its length.", "4\\pi", "several questions"),
        ("(i) Find the area of it. (ii) Find the length of it.", "3", "several questions"),
        ("How many apples are there? How many pears are there?", "3", "several questions"),
        (CHOICE, "C", "multiple choice"),
        ("Which of the following is the largest of these numbers: 1, 2, 3?", "3", "multiple choice"),
        ("$\\text{(A) } 3 \\quad \\text{(B) } 4 \\quad \\text{(C) } 5$ is the sum?", "B", "multiple choice"),
        ("True or false: the sum of two primes is even.", "3", "true or false"),
        ("Is the number 91 a prime number?", "No", "true or false"),
        ("Prove that the sum of the two is 5.", "5", "proof"),
        ("Let $x=1$. Show that $x+1=2$ and find $x$.", "1", "proof"),
        ("What is the area of the triangle in the figure?", "6", "needs a figure"),
        ("As shown, the square has side 2. Find its area.", "4", "needs a figure"),
        ("Find the area. [asy] draw((0,0)--(1,1)); [/asy]", "4", "needs a figure"),
        ("The graph below is of $f$. Find $f(1)$.", "4", "needs a figure"),
        ("求两个数的和，其中一个数是三。", "5", "not English"),
        ("Combien de pommes reste-t-il si Marie donne trois pommes et mange deux autres pommes", "5", "not English"),
        ("2+3", "5", "question of fewer than 3 words"),
        ("What is the sum of 2 and 3?", " ", "no answer"),
        ("What is the sum of 2 and 3?", "x" * 101, "answer longer than 100 characters"),
    ],
)
def test_each_filter_gives_its_reason(question, answer, reason):
    assert math_drop_reason(question, answer, MathFilterConfig()) == reason


def test_limits_are_settings():
    assert math_drop_reason("2 3", "12345", MathFilterConfig(min_words=2, max_answer_characters=5)) is None
    assert math_drop_reason("2 3 5", "12345", MathFilterConfig(max_answer_characters=4)) == (
        "answer longer than 4 characters"
    )


def test_filtering_counts_what_it_drops():
    columns = {"prompt": [{"role": "user", "content": CHOICE}], "answer": "C", "verifier": "choice"}
    fine = {"prompt": [{"role": "user", "content": "What is the sum of 2 and 3?"}], "answer": "5", "verifier": "answer"}
    drops = Drops()
    documents = [Document(CHOICE, "bad", columns=columns), Document("sum", "good", columns=fine)]
    assert [document.id for document in filter_math(documents, MathFilterConfig(), drops)] == ["good"]
    assert drops.counts == {"multiple choice": 1}
    assert drops.examples["multiple choice"] == ["bad"]
