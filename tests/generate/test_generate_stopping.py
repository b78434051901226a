"""Stop strings in growing text: found exactly when a decode of everything would find them, at constant cost."""

import random

import pytest

from bloomery.generate.stopping import StopStrings, cut


def decode_bytes(ids):
    return bytes(ids).decode("utf-8", errors="replace")


def first_hit(text, stop):
    """How many bytes of `text` are needed until its decoding holds a stop string."""
    data = text.encode()
    return next((n for n in range(1, len(data) + 1) if any(s in decode_bytes(data[:n]) for s in stop)), None)


def push_all(text, stop, decode=decode_bytes):
    watch = StopStrings(stop, decode)
    return next((n for n, byte in enumerate(text.encode(), 1) if watch.push(byte)), None)


@pytest.mark.parametrize(
    ("text", "stop"),
    [
        ("a simple END of it", ["END"]),
        ("x" * 500 + "STOP" + "y" * 50, ["nothing", "STOP"]),
        ("Grüße aus Köln — ✓ fertig ✓✓", ["✓ f"]),
        ("ääääääääääääääääääääääääääääüö", ["üö"]),
        ("never here", ["zzz"]),
        ("\n\n", ["\n\n"]),
    ],
)
def test_found_at_the_first_token_that_completes_it(text, stop):
    assert push_all(text, stop) == first_hit(text, stop)


def test_agrees_with_decoding_everything_on_random_texts():
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choice("abé€") for _ in range(rng.randint(1, 60)))
        stop = ["".join(rng.choice("abé€") for _ in range(rng.randint(1, 4))) for _ in range(2)]
        assert push_all(text, stop) == first_hit(text, stop), (text, stop)


def test_cost_does_not_grow_with_the_text():
    longest = 0

    def decode(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return decode_bytes(ids)

    assert push_all("abc" * 2000, ["END"], decode) is None
    assert longest < 20


def test_tokens_without_text_do_not_lose_the_beginning_of_a_stop_string():
    watch = StopStrings(["ab"], lambda ids: "".join(chr(i) for i in ids if i))
    assert not watch.push(ord("a"))
    assert not any(watch.push(0) for _ in range(100))
    assert watch.push(ord("b"))


def test_cut_ends_before_the_earliest_stop():
    assert cut("one two three", ["three", "two"]) == "one "
    assert cut("one", ["two"]) == "one"
    assert cut("one", []) == "one"
