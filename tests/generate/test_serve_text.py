"""Pieces of a stream: whole characters, no part of a stop string, and together the whole text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bloomery.generate.serve.text import TextStream
from bloomery.generate.stopping import cut


def from_bytes(ids):
    return bytes(ids).decode("utf-8", errors="replace")


def pieces(tokens, stop=(), size=1):
    """What is sent for each group of `size` byte tokens, then at the end."""
    stream = TextStream(from_bytes, stop)
    sent = [stream.push(tokens[start : start + size]) for start in range(0, len(tokens), size)]
    return [*sent, stream.finish(cut(from_bytes(tokens), stop))]


def test_a_character_is_sent_when_its_last_byte_is_there():
    assert pieces("aé€😀".encode()) == ["a", "", "é", "", "", "€", "", "", "", "😀", ""]


def test_what_may_begin_a_stop_string_waits():
    assert pieces(b"one\ntwo\n\nthree", stop=("\n\n",))[:9] == ["o", "n", "e", "", "\nt", "w", "o", "", ""]
    assert "".join(pieces(b"one\ntwo\n\nthree", stop=("\n\n",))) == "one\ntwo"


def test_a_beginning_that_comes_to_nothing_is_sent_late_but_whole():
    assert pieces(b"ababac", stop=("abac!",)) == ["", "", "", "ab", "", "", "abac"]


def test_bytes_that_never_become_a_character_are_shown_once():
    assert "".join(pieces(b"a\xff\xfeb\x80")) == "a\ufffd\ufffdb\ufffd"


@given(
    st.lists(st.one_of(st.sampled_from([*"ab\n é€😀".encode()]), st.integers(0, 255)), max_size=120),
    st.lists(st.sampled_from(["\n\n", "ab", "aab", "é", "b a", "€😀", "\n"]), max_size=3),
    st.integers(1, 5),
)
def test_pieces_add_up_to_the_text_and_never_show_a_stop(tokens, stop, size):
    stream, sent, whole = TextStream(from_bytes, stop), "", cut(from_bytes(tokens), stop)
    for start in range(0, len(tokens), size):
        sent += stream.push(tokens[start : start + size])
        assert whole.startswith(sent)
    assert sent + stream.finish(whole) == whole


@pytest.mark.parametrize("length", [31, 32, 33, 200])
def test_only_a_window_is_decoded(length):
    longest = 0

    def decode(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return from_bytes(ids)

    stream = TextStream(decode)
    assert "".join(stream.push([byte]) for byte in ("é" * length).encode()) == "é" * length
    assert longest <= 33
