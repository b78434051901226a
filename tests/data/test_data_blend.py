import shutil

import datasets
import numpy as np
import pytest
import torch

from bloomery import config as configs
from bloomery.data import blend
from bloomery.data.blend import BlendConfig, BlendedRows
from bloomery.data.dataset import write_rows
from bloomery.data.pack import to_batch
from bloomery.data.tokenizer import Tokenizer, train_tokenizer
from bloomery.data.tokens import RowWriter
from bloomery.errors import ArtifactError, ConfigError

SEQ_LEN = 32


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two sources of short texts, one of a single document, one of long ones, and a tokenizer."""
    path = tmp_path_factory.mktemp("corpus")
    texts = {
        "sums": [f"{a}+{b}={a + b}" for a in range(20) for b in range(20)],
        "words": [f"the word {n} is {'very ' * (n % 5)}good" for n in range(150)],
        "one": ["the only document there is"],
        "long": [f"long {n}: " + "again and again " * 30 for n in range(20)],
    }
    for source, documents in texts.items():
        write_rows(path / "docs", source, [{"text": text} for text in documents], "documents")
    write_rows(path / "blank", "blank", [{"text": ""}, {"text": ""}], "documents")
    train_tokenizer([text for documents in texts.values() for text in documents], 290).save(path / "tok")
    return path


def config(corpus, weights, sources=None, **settings):
    where = {name: {"path": str(corpus / "docs"), "source": name} for name in weights} | (sources or {})
    for name, weight in weights.items():
        where[name] = {**where[name], "weight": weight}
    length = {} if "tokens" in settings or "sequences" in settings else {"sequences": 400}
    base = {"sources": where, "tokenizer": str(corpus / "tok"), "seq_len": SEQ_LEN, "seed": 3}
    return configs.build(BlendConfig, {**base, **length, **settings})


@pytest.fixture(scope="module")
def blended(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("blend") / "out"
    manifest = blend.run(config(corpus, {"sums": 3, "words": 1}, validation_fraction=0.1), out)
    return out, manifest


def documents_in(batches):
    """Every document of a stream of batches as a tuple of ids, rebuilt from labels: what was really learnt."""
    found = []
    for batch in batches:
        segments = batch.get("segment_ids", torch.zeros_like(batch["input_ids"]))
        for ids, labels, segment in zip(batch["input_ids"], batch["labels"], segments, strict=True):
            for number in segment.unique():
                inside = (segment == number) & (labels != -100)
                if inside.any():
                    found.append((ids[inside][0].item(), *labels[inside].tolist()))
    return found


def test_counts_are_exact_shares_of_tokens(blended):
    out, manifest = blended
    sources = manifest.summary["sources"]
    assert manifest.kind == "tokens"
    assert sum(source["training_sequences"] for source in sources.values()) == 400
    ratio = sources["sums"]["training_tokens"] / sources["words"]["training_tokens"]
    assert ratio == pytest.approx(3, rel=0.02)
    rows = BlendedRows(out)
    for _ in rows.batches(0, 40, 10):
        pass
    rows.ledger.verify(rows.plan, 0, 400)
    assert {name: read["sequences"] for name, read in rows.ledger.summary().items()} == {
        name: source["training_sequences"] for name, source in sources.items()
    }
    read = rows.ledger.summary()["sums"]
    assert read["epochs"] == pytest.approx(sources["sums"]["epochs"], abs=1e-3)


def test_one_epoch_learns_every_document_once_and_no_held_out_one(corpus, blended):
    out, manifest = blended
    rows = BlendedRows(out)
    whole = [rows._rows[0].take(row) for row in range(len(rows._rows[0]))]
    batch = to_batch(np.stack([row[0] for row in whole]), [row[1] for row in whole])
    learnt = documents_in([batch])
    held_out = documents_in(batch for batch in rows.validation(4) if (batch["source_ids"] == 0).all())
    assert len(learnt) == len(set(learnt)) == 400 - manifest.summary["sources"]["sums"]["validation_documents"]
    assert 20 < len(held_out) < 65
    assert not set(learnt) & set(held_out)
    tokenizer = blend.load_tokenizer(corpus / "tok")
    texts = {tokenizer.decode(ids, skip_special_tokens=True) for ids in learnt + held_out}
    assert texts == {f"{a}+{b}={a + b}" for a in range(20) for b in range(20)}
    assert all(ids[-1] == tokenizer.eos_token_id for ids in learnt)


def test_ranks_and_resumption_give_the_same_stream(blended):
    rows = BlendedRows(blended[0])
    whole = [torch.cat([micro["input_ids"] for micro in step]) for step in rows.batches(0, 16, 4)]
    resumed = [torch.cat([micro["input_ids"] for micro in step]) for step in BlendedRows(blended[0]).batches(48, 16, 8)]
    assert len(whole) == 25
    assert all(torch.equal(a, b) for a, b in zip(whole[3:], resumed, strict=True))
    halves = [
        [torch.cat([m["input_ids"] for m in step]) for step in rows.batches(0, 16, 4, rank, 2)] for rank in (0, 1)
    ]
    assert all(torch.equal(a, torch.cat([b, c])) for a, b, c in zip(whole, *halves, strict=True))


def test_source_ids_tell_the_sources_apart(corpus, blended):
    rows = BlendedRows(blended[0])
    tokenizer = blend.load_tokenizer(corpus / "tok")
    batch = rows.batch(0, 40)
    for ids, source in zip(batch["input_ids"], batch["source_ids"], strict=True):
        assert ("+" in tokenizer.decode(ids.tolist())) == (rows.names[source[0]] == "sums")


def test_the_folder_loads_with_datasets(blended, tmp_path):
    out, manifest = blended
    loaded = datasets.load_dataset(str(out), cache_dir=str(tmp_path))
    sources = manifest.summary["sources"].values()
    assert loaded["train"].num_rows == sum(source["rows"] for source in sources)
    assert loaded["validation"].num_rows == sum(source["validation_rows"] for source in sources)
    assert len(loaded["train"][0]["input_ids"]) == SEQ_LEN + 1
    assert sum(loaded["train"][0]["lengths"]) <= SEQ_LEN + 1


def test_a_finished_blend_is_left_alone(corpus, blended):
    out, manifest = blended
    before = {file: file.stat().st_mtime_ns for file in (out / "data").iterdir()}
    assert blend.run(config(corpus, {"sums": 3, "words": 1}, validation_fraction=0.1), out) == manifest
    assert {file: file.stat().st_mtime_ns for file in (out / "data").iterdir()} == before
    with pytest.raises(ArtifactError, match=r"sources\.sums\.weight was 3\.0 and is now 4\.0"):
        blend.run(config(corpus, {"sums": 4, "words": 1}, validation_fraction=0.1), out)


@pytest.mark.parametrize("packing", ["whole", "concatenated"])
def test_documents_longer_than_the_context_are_split_and_counted(corpus, tmp_path, packing):
    manifest = blend.run(config(corpus, {"long": 1}, packing=packing, validation_fraction=0), tmp_path / "out")
    source = manifest.summary["sources"]["long"]
    assert source["split"] == source["documents"] == 20
    rows = BlendedRows(tmp_path / "out")
    tokenizer = blend.load_tokenizer(corpus / "tok")
    taken = [rows._rows[0].take(row) for row in range(len(rows._rows[0]))]
    batch = to_batch(np.stack([row[0] for row in taken]), [row[1] for row in taken])
    texts = [f"long {n}: " + "again and again " * 30 for n in range(20)]
    predicted = sum(len(tokenizer.encode(text)) for text in texts)  # every token but the first, and the end
    assert (batch["labels"] != -100).sum() == predicted
    assert (batch["labels"] == tokenizer.eos_token_id).sum() == 20


def test_a_corpus_of_one_document_is_repeated(corpus, tmp_path, capsys):
    manifest = blend.run(config(corpus, {"one": 1, "sums": 1}, validation_fraction=0.05), tmp_path / "out")
    source = manifest.summary["sources"]["one"]
    assert (source["rows"], source["documents"], source["validation_rows"]) == (1, 1, 0)
    assert source["epochs"] == source["training_sequences"] > 100
    assert "one: too few documents for a validation split of 0.05; it has none" in capsys.readouterr().err


def test_a_corpus_without_text_is_an_error(corpus, tmp_path):
    blank = {"blank": {"path": str(corpus / "blank")}}
    with pytest.raises(
        ArtifactError, match=r"sources\.blank: .*blank has no documents to train on: the corpus is empty"
    ):
        blend.run(config(corpus, {"sums": 1, "blank": 1}, blank), tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
    manifest = blend.run(config(corpus, {"sums": 1, "blank": 0}, blank), tmp_path / "out2")
    assert set(manifest.summary["sources"]) == {"sums"}


def test_everything_held_out_is_an_error(corpus, tmp_path):
    with pytest.raises(ArtifactError, match="all fell into the validation split; lower validation_fraction"):
        blend.run(config(corpus, {"one": 1}, validation_fraction=0.9999999), tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sequences": 5, "tokens": 500}, "sequences, tokens: give exactly one"),
        ({"sequences": None, "tokens": None}, "sequences, tokens: give exactly one"),
        ({"phases": [{"share": 1, "weights": {"sums": 1}}]}, r"sources\.sums\.weight: has no effect beside phases"),
    ],
)
def test_contradicting_settings_are_refused(corpus, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        blend.run(config(corpus, {"sums": 1}, **settings), tmp_path / "out")


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (-1, r"sources\.words: found -1\.0"),
        (float("nan"), r"sources\.words: found nan"),
        (None, r"sources\.words\.weight: missing"),
    ],
)
def test_impossible_weights_name_their_source(corpus, tmp_path, weight, message):
    with pytest.raises(ConfigError, match=message):
        blend.run(config(corpus, {"sums": 1, "words": weight}), tmp_path / "out")


def test_the_same_data_twice_is_refused(corpus, tmp_path):
    again = {"again": {"path": str(corpus / "docs"), "source": "sums"}}
    with pytest.raises(ConfigError, match=r"sources\.again: the same data as sources\.sums"):
        blend.run(config(corpus, {"sums": 1, "again": 1}, again), tmp_path / "out")


def test_a_source_is_not_repeated_more_than_allowed(corpus, tmp_path):
    capped = {"one": {"path": str(corpus / "docs"), "source": "one", "max_epochs": 8}}
    with pytest.raises(
        ConfigError, match=r"sources\.one: the plan goes through it 400\.00 times, more than max_epochs 8"
    ):
        blend.run(config(corpus, {"one": 1}, capped, validation_fraction=0), tmp_path / "out")


def test_phases_change_the_weights_and_continue_the_sources(corpus, tmp_path):
    weights = {"sums": None, "words": None}
    phases = [{"share": 3, "weights": {"sums": 1}}, {"share": 1, "weights": {"sums": 1, "words": 1}}]
    blend.run(config(corpus, weights, phases=phases, tokens=200 * SEQ_LEN), tmp_path / "out")
    rows = BlendedRows(tmp_path / "out")
    assert rows.num_sequences == 200
    source, number = rows.plan.order(0, 200)
    assert source[:150].tolist() == [0] * 150
    assert 0.4 < source[150:].mean() < 0.6
    assert number[source == 0].tolist() == list(range((source == 0).sum()))
    unknown = [{"share": 1, "weights": {"sum": 1}}]
    with pytest.raises(ConfigError, match=r"phases\.0\.weights\.sum: no such source; known: sums, words"):
        blend.run(config(corpus, weights, phases=unknown), tmp_path / "other")


def test_a_tokenizer_without_an_end_token_is_refused(corpus, tmp_path):
    tokenizer = blend.load_tokenizer(corpus / "tok")
    Tokenizer(tokenizer.backend, {}, None).save(tmp_path / "tok")
    with pytest.raises(ConfigError, match="has no eos_token, so a document would have no end"):
        blend.run(config(corpus, {"sums": 1}, tokenizer=str(tmp_path / "tok")), tmp_path / "out")


def test_windows_bound_memory_and_change_no_document(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("bloomery.data.tokens.WINDOW_TOKENS", 200)
    blend.run(config(corpus, {"sums": 1}, validation_fraction=0), tmp_path / "out")
    rows = BlendedRows(tmp_path / "out")
    assert len(rows._rows[0]._ids) > 5  # several record batches
    taken = [rows._rows[0].take(row) for row in range(len(rows._rows[0]))]
    batch = to_batch(np.stack([row[0] for row in taken]), [row[1] for row in taken])
    learnt = documents_in([batch])
    assert len(learnt) == len(set(learnt)) == 400


def test_an_interrupted_blend_ends_like_an_undisturbed_one(corpus, tmp_path, monkeypatch):
    settings = config(corpus, {"sums": 2, "words": 1}, validation_fraction=0.1)
    write, calls = blend._write_source, []

    def interrupted(*arguments):
        calls.append(arguments[0])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(*arguments)

    monkeypatch.setattr(blend, "_write_source", interrupted)
    with pytest.raises(KeyboardInterrupt):
        blend.run(settings, tmp_path / "cut")
    assert not (tmp_path / "cut" / "manifest.json").exists()
    assert blend.run(settings, tmp_path / "cut").summary == blend.run(settings, tmp_path / "whole").summary
    for file in ("plan.json", "data/sums-00000.arrow", "validation/sums-00000.arrow", "data/words-00000.arrow"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_a_full_disk_is_explained_and_leaves_no_half_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    file = tmp_path / "data" / "a-00000.arrow"
    with RowWriter(file, 5, "whole", 0) as writer:
        writer.add(np.arange(3, dtype=np.int32))
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    before = file.read_bytes()
    writer = RowWriter(file, 5, "whole", 0)
    writer.add(np.arange(3, dtype=np.int32))
    writer._flush()
    writer.add(np.arange(4, dtype=np.int32))
    monkeypatch.setattr("bloomery.data.tokens.pack_whole", full)
    with pytest.raises(ArtifactError, match=r"a-00000\.arrow: cannot write: No space left on device"):
        writer.__exit__(None, None, None)
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert file.read_bytes() == before


def test_damaged_products_are_named(corpus, tmp_path):
    out = tmp_path / "out"
    blend.run(config(corpus, {"sums": 1}), out)
    (out / "data" / "sums-00000.arrow").write_bytes(b"ARROW1 half")
    with pytest.raises(ArtifactError, match=r"sums-00000\.arrow: not a readable Arrow file"):
        BlendedRows(out)
    with pytest.raises(ArtifactError, match=r"plan\.json: no such file"):
        BlendedRows(corpus / "docs")


def test_check_needs_no_data(corpus):
    assert blend.check(config(corpus, {"sums": 1}, tokens=10_000)) == {
        "sequences": 312, "tokens": 312 * SEQ_LEN, "phases": 1,
    }  # fmt: skip


def test_a_proxy_keeps_its_share_of_every_source_and_its_epochs(corpus, tmp_path):
    """By a hash of the text: what a smaller proxy keeps, a larger one keeps too."""
    weights, whole = {"sums": 3, "words": 1}, {}
    for share in (1, 0.5, 0.25):
        settings = config(corpus, weights, downsample=share, validation_fraction=0)
        whole[share] = blend.run(settings, tmp_path / str(share)).summary
        assert whole[share]["sequences"] == round(400 * share)
    for name in weights:
        documents = [whole[share]["sources"][name]["documents"] for share in (1, 0.5, 0.25)]
        assert documents[1] == pytest.approx(documents[0] / 2, rel=0.1)
        assert documents[2] == pytest.approx(documents[0] / 4, rel=0.15)
        epochs = [whole[share]["sources"][name]["epochs"] for share in (1, 0.5, 0.25)]
        assert epochs[1] == pytest.approx(epochs[0], rel=0.1), "rows of packed documents are coarse here"
    documents = [(blend._rank(blend.content_hash(str(n))), 100 + n % 7) for n in range(5_000)]
    last = {share: blend.last_kept(documents, share) for share in (1 / 15, 0.2)}
    assert last[1 / 15] < last[0.2]
    kept = sum(size for rank, size in documents if rank <= last[1 / 15])
    assert kept == pytest.approx(sum(size for _, size in documents) / 15, rel=0.005)


def test_documents_in_two_sources_are_counted_together(corpus, tmp_path):
    copies = [{"text": f"{a}+{b}={a + b}"} for a in range(20) for b in range(10)]
    write_rows(corpus / "copy", "again", copies, "documents")
    again = {"again": {"path": str(corpus / "copy"), "source": "again", "max_epochs": 20}}
    found = blend.run(config(corpus, {"sums": 1, "again": 0.2}, again, sequences=100), tmp_path / "out").summary
    assert found["shared_tokens"]["sums, again"] > 500
    again["again"]["max_epochs"] = 1
    with pytest.raises(
        ConfigError, match=r"sources\.again: [\d,]+ of its tokens are in sums as well and would be read"
    ):
        blend.run(config(corpus, {"sums": 1, "again": 0.2}, again, sequences=120), tmp_path / "refused")


@pytest.mark.parametrize(("unit", "key"), [("sequences", "training_sequences"), ("documents", "documents")])
def test_the_unit_of_weights_is_what_is_shared(corpus, tmp_path, unit, key):
    settings = config(corpus, {"sums": 1, "long": 1}, unit=unit, validation_fraction=0)
    sources = blend.run(settings, tmp_path / "out").summary["sources"]
    read = {name: source[key] * (source["epochs"] if unit == "documents" else 1) for name, source in sources.items()}
    assert read["sums"] == pytest.approx(read["long"], rel=0.05)


def test_a_blend_goes_on_from_another_and_may_add_sources(corpus, tmp_path):
    first = blend.run(config(corpus, {"sums": 3, "words": 1}, sequences=60), tmp_path / "first")
    after = {"after": str(tmp_path / "first"), "after_sequences": 50}
    more = config(corpus, {"sums": 1, "words": 0, "long": 1}, sequences=20, **after)
    blend.run(more, tmp_path / "more")
    before, after = BlendedRows(tmp_path / "first"), BlendedRows(tmp_path / "more")
    assert after.num_sequences == 70
    assert after.phase_ends == [50, 70]
    assert after.identity(50) == before.identity(50)
    assert torch.equal(before.batch(0, 50)["input_ids"], after.batch(0, 50)["input_ids"])
    assert after.identity(51) != before.identity(51)
    assert first.summary["sequences"] == 60
    for wrong, message in (({"after_sequences": 61}, "61 is more than the 60"), ({"seed": 9}, "seed: 9, the plan of")):
        settings = {"sequences": 20, "after": str(tmp_path / "first"), **wrong}
        with pytest.raises(ConfigError, match=message):
            blend.run(config(corpus, {"sums": 1, "words": 1}, **settings), tmp_path / str(min(wrong.values())))


def test_a_file_with_other_rows_than_planned_is_refused(blended, tmp_path):
    """As when a copy to another machine was cut: no rank may go on with less data than the others."""
    shutil.copytree(blended[0], tmp_path / "copy")
    (tmp_path / "copy" / "data" / "words-00000.arrow").unlink()
    with pytest.raises(ArtifactError, match=r"words-00000\.arrow: not a readable Arrow file"):
        BlendedRows(tmp_path / "copy")
    shutil.copy(tmp_path / "copy" / "data" / "sums-00000.arrow", tmp_path / "copy" / "data" / "words-00000.arrow")
    with pytest.raises(ArtifactError, match=r"words-00000\.arrow: holds \d+ rows, the plan counts on \d+"):
        BlendedRows(tmp_path / "copy")
