import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from bloomery.data import tokenizer as stage
from bloomery.data.dataset import write_rows
from bloomery.data.tokenizer import SPECIAL_TOKENS, TokenizerConfig, load_tokenizer, train_tokenizer
from bloomery.errors import ArtifactError, ConfigError

TEXTS = [f"the answer to {n} plus {n + 1} is {2 * n + 1}, naïve café\n" for n in range(200)]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "12+3?"},
    {"role": "assistant", "content": "15"},
    {"role": "user", "content": "and <5>?"},
    {"role": "assistant", "content": "20\n"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 280, added_tokens=["<think>"])


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(path)
    return path


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_every_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_transformers_gives_the_same_ids_and_chats(tokenizer, folder):
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in [*TEXTS[:5], " 12  345\n\n", "<think>x</think>", "a<|endoftext|>b", "日本 🙂", ""]:
        assert theirs(text).input_ids == tokenizer.encode(text)
        assert theirs.decode(theirs(text).input_ids) == tokenizer.decode(tokenizer.encode(text))
    assert len(theirs) == tokenizer.vocab_size
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert theirs.bos_token_id is tokenizer.bos_token_id is None
    for prompt in (False, True):
        ours = tokenizer.render(CHAT, add_generation_prompt=prompt)
        assert ours == theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt)


def test_a_saved_tokenizer_loads_as_it_was(tokenizer, folder):
    again = load_tokenizer(folder)
    assert again.encode_batch(TEXTS[:9]) == [tokenizer.encode(text) for text in TEXTS[:9]]
    assert again.render(CHAT) == tokenizer.render(CHAT)
    assert again.vocab_size == tokenizer.vocab_size == 280
    assert again.settings == tokenizer.settings


def test_a_turn_costs_two_tokens(tokenizer):
    chat = [{"role": "user", "content": "the"}]
    assert tokenizer.render(chat) == "<|user|>the<|endoftext|>"
    assert len(tokenizer.encode(tokenizer.render(chat))) == len(tokenizer.encode("the")) + 2


def test_each_digit_is_a_token_unless_asked_otherwise(tokenizer):
    assert [tokenizer.token(i) for i in tokenizer.encode("12345")] == list("12345")
    numbers = ["2024 2024 2024"] * 50
    assert len(train_tokenizer(numbers, 300, individual_digits=False).encode("2024")) == 1
    assert len(train_tokenizer(numbers, 300).encode("2024")) == 4


def test_added_tokens_are_one_token_and_stay_visible(tokenizer):
    ids = tokenizer.encode("<think>")
    assert len(ids) == 1
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == "<think>"
    assert ids[0] not in tokenizer.special_ids
    assert len(tokenizer.special_ids) == len(SPECIAL_TOKENS)


def test_training_twice_gives_the_same_file(tokenizer):
    assert train_tokenizer(TEXTS, 280, added_tokens=["<think>"]).backend.to_str() == tokenizer.backend.to_str()


def test_a_vocabulary_too_small_for_bytes_is_refused():
    with pytest.raises(ConfigError, match=r"vocab_size: found 200, expected at least 262"):
        train_tokenizer(TEXTS, 200)


def test_unknown_roles_are_refused(tokenizer):
    with pytest.raises(ConfigError, match="the chat template refuses this chat: unknown role robot"):
        tokenizer.render([{"role": "robot", "content": "x"}])


def test_stored_truncation_and_padding_are_switched_off(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    data = json.loads(file.read_text())
    data["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    file.write_text(json.dumps(data))
    assert len(load_tokenizer(tmp_path).encode(TEXTS[0])) > 3


@pytest.mark.parametrize("form", ["object", "list", "none"])
def test_older_ways_to_store_settings(tokenizer, tmp_path, form):
    tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    settings = {"eos_token": {"content": "<|endoftext|>", "special": True}}
    if form != "none":
        template = "{{ messages[0].content }}{{ eos_token }}"
        named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": template}]
        settings["chat_template"] = template if form == "object" else named
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = load_tokenizer(tmp_path)
    assert loaded.eos_token_id == loaded.pad_token_id == tokenizer.eos_token_id
    if form == "none":
        with pytest.raises(ConfigError, match=r"has no chat template; expected a chat_template\.jinja"):
            loaded.render(CHAT)
    else:
        assert loaded.render([{"role": "user", "content": "a"}]) == "a<|endoftext|>"


def test_missing_and_damaged_folders_are_named(tmp_path):
    with pytest.raises(ArtifactError, match="no such folder; expected a tokenizer"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(ArtifactError, match=r"no tokenizer\.json here"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: cannot be read"):
        load_tokenizer(tmp_path)


def test_stage_learns_from_every_kind_of_dataset(tmp_path):
    write_rows(tmp_path / "a", "text", [{"text": text} for text in TEXTS], "documents")
    write_rows(tmp_path / "b", "chat", [{"messages": CHAT}] * 3, "messages")
    config = TokenizerConfig(inputs=[tmp_path / "a", tmp_path / "b"], vocab_size=285, max_documents=100)
    manifest = stage.run(config, tmp_path / "out")
    assert manifest.kind == "tokenizer"
    assert manifest.summary["documents"] == 103
    assert manifest.summary["vocab_size"] == load_tokenizer(tmp_path / "out").vocab_size == 285
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<|endoftext|>"


def test_stage_refuses_an_empty_corpus(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(ArtifactError, match="no Parquet files"):
        stage.run(TokenizerConfig(inputs=[tmp_path / "a"]), tmp_path / "out")
    with pytest.raises(ArtifactError, match="no text; a tokenizer needs some to learn from"):
        stage.run(TokenizerConfig(inputs=[]), tmp_path / "out2")
