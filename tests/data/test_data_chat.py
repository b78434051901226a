import dataclasses

import numpy as np
import pytest
from transformers import AutoTokenizer

from bloomery.data.chat import (
    UnsupervisedExample,
    encode_example,
    encode_examples,
    encode_prompt,
    stop_token_ids,
)
from bloomery.data.document import Drops
from bloomery.data.tokenizer import CHAT_TEMPLATE, Tokenizer, train_tokenizer
from bloomery.errors import ArtifactError, ConfigError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "12+3?"},
    {"role": "assistant", "content": "15"},
    {"role": "user", "content": "so?"},
    {"role": "assistant", "content": "done 7"},
]
SUPERVISED = "15<|endoftext|>done 7<|endoftext|>"
PLAIN = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
STRIPS_THOUGHT = PLAIN.replace("{{ m.content }}", "{{ m.content if loop.last else m.content.split('</think>')[-1] }}")
OTHER_PROMPT = PLAIN.replace("<|assistant|>\n{% endif %}", "<|assistant|>\n<think>{% endif %}")
NO_END = PLAIN.replace("{{ eos_token }}", "")
END_OUTSIDE = CHAT_TEMPLATE.replace(
    "{{- message.content + eos_token -}}{%- endgeneration -%}",
    "{{- message.content -}}{%- endgeneration -%}{{- eos_token -}}",
    1,
)
MARKS_ALL_ONCE = "{% generation %}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}{% endgeneration %}"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["be brief, done so far 123 <think>"] * 10, 290)


def with_template(tokenizer, template):
    return Tokenizer(tokenizer.backend, tokenizer.settings, template, "models/x")


def supervised(tokenizer, chat=CHAT):
    ids, mask = encode_example(tokenizer, chat)
    return tokenizer.decode(token for token, learnt in zip(ids, mask, strict=True) if learnt)


@pytest.mark.parametrize(
    "template", [CHAT_TEMPLATE, PLAIN, END_OUTSIDE], ids=["marks", "no marks", "end outside marks"]
)
def test_only_the_assistant_and_its_end_of_turn_are_learnt(tokenizer, template):
    assert supervised(with_template(tokenizer, template)) == SUPERVISED


def test_ids_and_mask_equal_those_of_transformers(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = encode_example(tokenizer, CHAT)
    assert ids == expected["input_ids"]
    assert [int(learnt) for learnt in mask] == expected["assistant_masks"]
    prompt = theirs.apply_chat_template(CHAT[:2], tokenize=True, add_generation_prompt=True, return_dict=True)
    assert encode_prompt(tokenizer, CHAT[:2]) == prompt["input_ids"]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, PLAIN], ids=["marks", "no marks"])
def test_a_prompt_is_how_its_example_begins(tokenizer, template):
    tokenizer = with_template(tokenizer, template)
    prompt, (ids, mask) = encode_prompt(tokenizer, CHAT[:2]), encode_example(tokenizer, CHAT[:3])
    assert ids[: len(prompt)] == prompt
    assert mask.index(True) == len(prompt)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, PLAIN], ids=["marks", "no marks"])
def test_a_message_can_be_kept_out_of_training(tokenizer, template):
    chat = [*CHAT[:2], {**CHAT[2], "train": False}, *CHAT[3:]]
    assert supervised(with_template(tokenizer, template), chat) == "done 7<|endoftext|>"


def test_templates_whose_masks_would_be_wrong_are_named(tokenizer):
    thought = [CHAT[1], {"role": "assistant", "content": "<think>so</think>15"}, *CHAT[3:]]
    with pytest.raises(
        ConfigError, match=r"models/x: the chat template has no .* the chat up to message 1 is not how the whole"
    ):
        encode_example(with_template(tokenizer, STRIPS_THOUGHT), thought)
    with pytest.raises(
        ConfigError, match=r"generation prompt before message 2 .* token \d+ is '.*', in the whole chat '1'"
    ):
        encode_example(with_template(tokenizer, OTHER_PROMPT), CHAT)
    with pytest.raises(
        ConfigError, match="no special token behind the assistant's message, so the model would never learn"
    ):
        encode_example(with_template(tokenizer, NO_END), CHAT)
    with pytest.raises(ConfigError, match="marks 1 assistant turns, the chat has 2"):
        encode_example(with_template(tokenizer, MARKS_ALL_ONCE), CHAT)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, PLAIN], ids=["marks", "no marks"])
@pytest.mark.parametrize("chat", [[], CHAT[:2], [CHAT[1], {**CHAT[2], "train": False}]], ids=["empty", "prompt", "off"])
def test_an_example_that_teaches_nothing_is_refused(tokenizer, template, chat):
    with pytest.raises(UnsupervisedExample, match="no supervised tokens"):
        encode_example(with_template(tokenizer, template), chat)


def test_an_empty_reply_still_teaches_the_end_of_the_turn(tokenizer):
    chat = [CHAT[1], {"role": "assistant", "content": ""}]
    for template in (CHAT_TEMPLATE, PLAIN, END_OUTSIDE):
        ids, mask = encode_example(with_template(tokenizer, template), chat)
        (learnt,) = [place for place, flag in enumerate(mask) if flag]
        assert ids[learnt] == tokenizer.eos_token_id
        assert learnt >= len(encode_prompt(with_template(tokenizer, template), chat[:1]))


def test_a_special_token_inside_a_reply_is_not_its_end(tokenizer):
    chat = [CHAT[1], {"role": "assistant", "content": "a<|pad|>b"}]
    assert supervised(tokenizer, chat) == "a<|pad|>b<|endoftext|>"
    assert supervised(with_template(tokenizer, END_OUTSIDE), chat) == "a<|pad|>b<|endoftext|>"
    no_end = END_OUTSIDE.replace("{%- endgeneration -%}{{- eos_token -}}", "{%- endgeneration -%}")
    with pytest.raises(ConfigError, match="would never learn to stop"):
        encode_example(with_template(tokenizer, no_end), chat)


def test_malformed_messages_are_named(tokenizer):
    with pytest.raises(
        ArtifactError, match=r"message 1: found \{'role': 'assistant'\}, expected a 'role' and a 'content'"
    ):
        encode_example(tokenizer, [CHAT[1], {"role": "assistant"}])
    with pytest.raises(ArtifactError, match="message 0: found"):
        encode_prompt(tokenizer, [{"role": "user", "content": 3}])


def test_generation_stops_at_the_end_of_a_turn(tokenizer):
    assert stop_token_ids(tokenizer) == [tokenizer.eos_token_id]
    other_end = with_template(tokenizer, PLAIN.replace("{{ eos_token }}", "<|pad|>"))
    assert stop_token_ids(other_end) == [tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert stop_token_ids(with_template(tokenizer, None)) == [tokenizer.eos_token_id]


def rows(*chats):
    return [
        {"messages": chat, "id": f"r{number}", "source": "even" if number % 2 == 0 else "odd"}
        for number, chat in enumerate(chats)
    ]


def test_examples_are_encoded_flat_and_what_is_dropped_is_counted(tokenizer):
    long = [CHAT[1], {"role": "assistant", "content": "1" * 500}]
    drops = Drops()
    examples = encode_examples(tokenizer, rows(CHAT, CHAT[:2], CHAT[:3], long), 100, drops)
    assert len(examples) == 2
    assert drops.counts == {"no supervised tokens": 1, "longer than 100 tokens": 1}
    assert drops.examples == {"no supervised tokens": ["r1"], "longer than 100 tokens": ["r3"]}
    for number, chat in enumerate((CHAT, CHAT[:3])):
        place = slice(examples.offsets[number], examples.offsets[number + 1])
        assert (examples.ids[place].tolist(), examples.learnt[place].tolist()) == encode_example(tokenizer, chat)
    assert [examples.names[source] for source in examples.sources] == ["even", "even"]
    assert dataclasses.is_dataclass(examples)
    assert examples.ids.dtype == np.int32


def test_nothing_left_is_an_error_that_says_why(tokenizer):
    with pytest.raises(
        ArtifactError, match=r"no example is left to train on; dropped: 2 longer than 3 tokens \(r0, r1\)"
    ):
        encode_examples(tokenizer, rows(CHAT, CHAT), 3, Drops())
