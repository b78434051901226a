"""A world in a thimble, made once per test run: tokenizer, hybrid model, chats and prompts of one-digit sums."""

import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

# A shell's background job starts with Ctrl-C ignored, and so would all that the tests start from here.
signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True)
class TinyWorld:
    """Folders of one untrained model of 30 thousand parameters, and of data to train and judge it on."""

    model: Path
    messages: Path
    prompts: Path


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    """Read-only: stages write elsewhere."""
    import torch

    from bloomery.data.dataset import write_rows
    from bloomery.data.tokenizer import train_tokenizer
    from bloomery.model import hf
    from bloomery.model.config import ModelConfig
    from bloomery.model.decoder import Decoder

    folder = tmp_path_factory.mktemp("tiny")
    sums = [(a, b) for a in range(5) for b in range(5)]
    texts = [f"{a}+{b}= \\boxed{{{a + b}}}" for a, b in sums]
    tokenizer = train_tokenizer(texts, 270)
    torch.manual_seed(0)
    model = Decoder(
        ModelConfig(
            pattern="M*-", vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64, mamba_num_heads=4,
            mamba_head_dim=16, ssm_state_size=16, chunk_size=16, num_attention_heads=2, num_key_value_heads=1,
            head_dim=16, max_position_embeddings=64, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    hf.save(model, folder / "model")
    tokenizer.save(folder / "model")
    questions = [[{"role": "user", "content": f"{a}+{b}="}] for a, b in sums]
    answers = [str(a + b) for a, b in sums]
    chats = [
        {"messages": [*question, {"role": "assistant", "content": f"\\boxed{{{answer}}}"}], "id": f"sum-{i}"}
        for i, (question, answer) in enumerate(zip(questions, answers, strict=True))
    ]
    prompts = [
        {"prompt": question, "answer": answer, "verifier": "answer", "id": f"sum-{i}"}
        for i, (question, answer) in enumerate(zip(questions, answers, strict=True))
    ]
    write_rows(folder / "messages", "sums", chats, "messages")
    write_rows(folder / "prompts", "sums", prompts, "prompts")
    return TinyWorld(folder / "model", folder / "messages", folder / "prompts")
