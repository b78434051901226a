import pytest

from bloomery.data.dedup import ExactDedup
from bloomery.data.document import Document, Drops
from bloomery.data.filters import FilterConfig, drop_reason, filter_documents, repeated_lines, sample_documents


@pytest.mark.parametrize(
    ("text", "settings", "reason"),
    [
        ("", {}, "empty"),
        (" \n\t", {}, "empty"),
        ("abc", {"min_characters": 4}, "shorter than 4 characters"),
        ("  abc ", {"min_characters": 3}, None),
        ("abcd", {"max_characters": 3}, "longer than 3 characters"),
        ("ab\ud800", {"max_invalid_fraction": 1.0}, "invalid characters"),
        ("a\x00b", {}, "invalid characters"),
        ("a\ufffdb", {}, "invalid characters"),
        ("a\tb\r\n\x0c", {}, None),
        ("x" * 2000 + "\ufffd", {}, None),
        ("a\na\na\nb", {"max_repeated_lines": 0.4}, "repeated lines"),
        ("a\na\na\nb", {"max_repeated_lines": 0.5}, None),
        ("a\na\na\nb", {}, None),
    ],
)
def test_each_filter_gives_its_reason(text, settings, reason):
    assert drop_reason(text, FilterConfig(**settings)) == reason


def test_repeated_lines_ignore_empty_ones():
    assert repeated_lines("a\n\n\na\n b\nb ") == 0.5
    assert repeated_lines("\n\n") == 0.0


def test_filtering_counts_what_it_drops():
    drops = Drops()
    kept = filter_documents([Document("good"), Document(""), Document("a\x00", "bad")], FilterConfig(), drops)
    assert [document.text for document in kept] == ["good"]
    assert drops.counts == {"empty": 1, "invalid characters": 1}
    assert drops.examples["invalid characters"] == ["bad"]


def test_exact_dedup_sees_through_spaces_and_composition_but_not_case():
    dedup, drops = ExactDedup(), Drops()
    texts = ["x = 1", "x  =\n1 ", "X = 1", "caf\u00e9", "cafe\u0301"]
    assert [document.text for document in dedup(map(Document, texts), drops)] == ["x = 1", "X = 1", "caf\u00e9"]
    assert drops.counts == {"duplicate": 2}


def test_one_dedup_serves_several_sources():
    dedup, drops = ExactDedup(), Drops()
    assert len(list(dedup([Document("a")], drops))) == 1
    assert not list(dedup([Document("a")], drops))


def test_sampling_is_by_content_and_close_to_its_share():
    documents = [Document(f"text {number}") for number in range(2000)]
    kept = {document.text for document in sample_documents(documents, 0.25)}
    assert 420 < len(kept) < 580
    assert kept == {document.text for document in sample_documents(reversed(documents), 0.25)}
    assert len(list(sample_documents(documents, 1.0))) == 2000
