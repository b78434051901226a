import pytest

from bloomery import cli
from bloomery.chat import Conversation
from bloomery.errors import ArtifactError, ConfigError


def conversation(tiny_world, max_new_tokens=4):
    return Conversation(tiny_world.model, max_new_tokens=max_new_tokens, temperature=0.0, seed=0)


def test_turns_are_kept_and_read_again(tiny_world):
    talk = conversation(tiny_world)
    first = talk.ask("1+2=")
    assert conversation(tiny_world).ask("1+2=") == first
    talk.ask("2+2=")
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2
    assert talk.messages[1]["content"] == first


def test_a_question_that_does_not_fit_leaves_the_conversation_as_it_was(tiny_world):
    talk = conversation(tiny_world)
    with pytest.raises(ConfigError, match="the model reads 64; start a new one"):
        talk.ask("1+" * 64)
    assert talk.messages == []


def test_the_last_tokens_of_the_window_are_used(tiny_world):
    assert conversation(tiny_world, max_new_tokens=10_000).ask("1+2=") is not None


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ArtifactError, match="no config.json here; expected a model"):
        Conversation(tmp_path, max_new_tokens=4, temperature=0.0, seed=0)


def test_the_verb_prints_the_answer(tiny_world, monkeypatch, capsys):
    expected = conversation(tiny_world).ask("1+2=")
    words = ["bloomery", "chat", str(tiny_world.model), "1+2=", "--max-new-tokens", "4"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert capsys.readouterr().out == expected + "\n"
