import json
import os
import random
from pathlib import Path

import pytest

from bloomery import config as configs
from bloomery.data import decontaminate, prepare
from bloomery.data.dataset import read_rows
from bloomery.data.decontaminate import DecontaminateConfig, Decontaminator, Hit, load, tokens
from bloomery.data.document import Document, Drops
from bloomery.data.prepare import PrepareConfig
from bloomery.errors import ArtifactError, ConfigError

DATA = Path(os.environ.get("BLOOMERY_DATA", Path(__file__).parents[3] / "shared" / "data"), "math")
ITEM = "A robe takes 2 bolts of blue fiber and half that much white fiber; how many bolts?"


def knows(*items: str, ngram: int = 9) -> Decontaminator:
    decontaminator = Decontaminator(ngram)
    decontaminator.add("bench", map(Document, items))
    return decontaminator


def kept(decontaminator: Decontaminator, *texts: str) -> list[str]:
    return [document.text for document in decontaminator(map(Document, texts), Drops())]


def test_tokens_ignore_dress_and_keep_numbers():
    assert tokens("The  $x^{2}$, ＡＢ_c—½ 3.5!") == ["the", "x", "2", "ab", "c", "1", "2", "3", "5"]
    assert tokens("x²") == tokens("X ^ 2") == ["x", "2"]


def test_nine_words_in_a_row_are_a_match_and_eight_are_not():
    words = tokens(ITEM)
    assert kept(knows(ITEM), "so " + " ".join(words[3:11]) + " end") != []
    assert kept(knows(ITEM), "so " + " ".join(words[3:12]).upper() + "\tend") == []
    assert kept(knows(ITEM, ngram=14), "so " + " ".join(words[3:12]) + " end") != []


def test_a_short_item_is_compared_whole():
    assert kept(knows("Simplify: $-10-4(n-5)$"), "First simplify -10 - 4(n - 5), then add.", "simplify -10-4(n-6)") == [
        "simplify -10-4(n-6)"
    ]


def test_a_very_short_item_must_be_a_line_or_a_message_of_its_own():
    documents = [
        Document("We evaluate 3 pears.", "inside"), Document("first\nEvaluate $3$.\nlast", "line"),
        Document("Evaluate\n3\n7", "message", columns={"prompt": [{"role": "user", "content": "Evaluate\n3"}]}),
    ]  # fmt: skip
    drops = Drops()
    assert [document.id for document in knows("Evaluate $3$")(documents, drops)] == ["inside"]
    assert drops.counts == {"in benchmark bench": 2}


def test_drops_and_hits_name_the_benchmark_item():
    decontaminator, drops = knows("nothing of interest stands in this first item here at all", ITEM), Drops()
    assert not list(decontaminator([Document("Q: " + ITEM, "d1")], drops))
    assert drops.counts == {"in benchmark bench": 1}
    assert drops.examples == {"in benchmark bench": ["d1 holds item 2"]}
    assert decontaminator.hits == [Hit("d1", "bench", 2, "a robe takes 2 bolts of blue fiber and", masked=False)]


def test_a_renumbered_clone_is_reported_and_kept():
    decontaminator = knows(ITEM)
    clone = "A gown takes 5 bolts of blue fiber and half that much white fiber"
    text = clone.replace("gown", "robe").replace("much", "many")
    assert kept(decontaminator, text) == [text]
    [hit] = decontaminator.hits
    assert hit.masked
    assert hit.words == "a robe takes 5 bolts of blue fiber and"


def test_rows_of_numbers_are_no_clones():
    decontaminator = knows("Add 1 2 3 4 5 6 7 8 9 10 11 12 and say the sum")
    assert kept(decontaminator, "31 32 33 34 35 36 37 38 39 40 41 42")
    assert not decontaminator.hits


def test_benchmarks_may_be_added_between_documents():
    decontaminator = knows(ITEM)
    assert kept(decontaminator, "one two three four five six seven eight nine ten") != []
    decontaminator.add("more", [Document("zero one two three four five six seven eight nine")])
    assert kept(decontaminator, "one two three four five six seven eight nine ten", ITEM) == []
    assert [hit.benchmark for hit in decontaminator.hits] == ["more", "bench"]


def test_odd_texts_pass():
    texts = ["", "!!!", "\ud800", "1", "word " * 100]
    assert kept(knows(ITEM, "", "???"), *texts) == texts
    assert kept(Decontaminator(9), *texts) == texts


def test_every_planted_item_is_caught():
    random.seed(0)
    words = [f"w{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(600)]
    items = [" ".join(random.choices(words, k=random.randint(4, 40))) for _ in range(400)]
    clean = [" ".join(random.choices(words, k=60)) for _ in range(400)]
    planted = [f"{text}. {item.title()}! {text}" for text, item in zip(clean, items, strict=True)]
    decontaminator, drops = knows(*items), Drops()
    left = list(decontaminator(map(Document, clean + planted), drops))
    assert [document.text for document in left] == clean
    assert drops.total == 400


@pytest.mark.skipif(not (DATA / "math_test.jsonl").is_file(), reason=f"no real data under {DATA}; set BLOOMERY_DATA")
@pytest.mark.parametrize(
    ("name", "column"),
    [("gsm8k_test", "question"), ("math_test", "problem"), ("olympiadbench", "question"), ("college_math", "question"),
     ("minerva_math", "problem"), ("gaokao2023en", "question"), ("amc23", "question")],
)  # fmt: skip
def test_every_item_of_the_published_benchmarks_is_caught(name, column):
    benchmark = {"type": "jsonl", "name": name, "path": str(DATA / f"{name}.jsonl"), "columns": {"text": column}}
    decontaminator = load(configs.build(DecontaminateConfig, {"benchmarks": [benchmark]}))
    questions = [json.loads(line)[column] for line in (DATA / f"{name}.jsonl").read_text("utf-8").splitlines()]
    planted = (Document(f"Q:\n{question}\nthe answer is 3") for question in questions)
    assert [document.text for document in decontaminator(planted, Drops())] == []


def jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_prepare_drops_and_lists_contamination(tmp_path):
    rows = [
        {"prompt": "What is the sum of 2 and 3?", "answer": "5"}, {"prompt": ITEM, "answer": "3"},
        {"prompt": "Prove that 2 is prime.", "answer": "2"},
        {"prompt": ITEM.replace("2", "4").replace("many", "few"), "answer": "6"},
    ]  # fmt: skip
    path = jsonl(tmp_path / "a.jsonl", rows)
    bench = {"type": "jsonl", "name": "bench", "path": jsonl(tmp_path / "b.jsonl", [{"q": "x"}, {"q": ITEM}])}
    settings = {
        "kind": "prompts", "math": {}, "sources": [{"type": "jsonl", "name": "m", "path": path, "verifier": "answer"}],
        "decontaminate": {"benchmarks": [bench | {"columns": {"text": "q"}}]},
    }  # fmt: skip
    manifest = prepare.run(configs.build(PrepareConfig, settings), tmp_path / "out")
    assert manifest.summary["sources"]["m"]["dropped"] == {"in benchmark bench": 2, "proof": 1}
    assert [row["answer"] for row in read_rows(tmp_path / "out", "prompts")] == ["5"]
    listed = json.loads((tmp_path / "out" / prepare.CONTAMINATION).read_text())
    assert [(hit["benchmark"], hit["item"], hit["masked"]) for hit in listed] == [("bench", 2, False)] * 2


def test_bad_settings_are_explained(tmp_path):
    empty = {"type": "jsonl", "name": "bench", "path": jsonl(tmp_path / "b.jsonl", [])}
    with pytest.raises(ArtifactError, match="benchmark bench: no item could be read"):
        load(configs.build(DecontaminateConfig, {"benchmarks": [empty]}))
    settings = {"kind": "documents", "math": {}, "sources": [{"type": "stdlib", "name": "code"}]}
    with pytest.raises(ConfigError, match="math: these filters read a question"):
        prepare.check(configs.build(PrepareConfig, settings))
    assert configs.build(DecontaminateConfig, {"benchmarks": [empty], "domain": "code"}).ngram == 14
    assert decontaminate.NGRAM["math"] == 9
