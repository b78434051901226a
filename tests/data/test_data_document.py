import json

from bloomery.data.document import Document, Drops, content_hash


def test_id_is_the_content_hash_where_none_is_given():
    assert Document("a").id == content_hash("a") == Document("a", source="other").id
    assert Document("a").id != Document("b").id
    assert Document("a", "mine").id == "mine"


def test_half_a_surrogate_pair_has_an_id():
    assert Document("\ud800").id


def test_rows_of_each_kind():
    assert Document("hello", "1", "web", {"b": 1, "a": "é"}).row("documents") == {
        "text": "hello", "id": "1", "source": "web", "metadata": '{"a": "é", "b": 1}',
    }  # fmt: skip
    chat = [{"role": "user", "content": "hi"}]
    row = Document("hi", "1", columns={"messages": chat}).row("messages")
    assert row["messages"] == chat
    assert "text" not in row
    assert json.loads(row["metadata"]) == {}


def test_drops_count_every_reason_and_show_the_first_three():
    drops = Drops()
    for number in range(5):
        drops.add("too short", f"d{number}")
    drops.add("duplicate", "x")
    assert drops.total == 6
    assert str(drops) == "5 too short (d0, d1, d2, …), 1 duplicate (x)"
    assert str(Drops()) == "none"
