"""On real problems: subsets of GSM8K's training set made more and less diverse are ranked as they were made."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from bloomery.data.document import Drops
from bloomery.data.tokenizer import train_tokenizer
from bloomery.model.config import ModelConfig, RopeConfig
from bloomery.model.decoder import Decoder
from bloomery.synthesize import vendi
from bloomery.synthesize.gradients import sketch
from bloomery.synthesize.samples import batches, encode_samples
from bloomery.synthesize.sketch import SketchConfig, Sketcher
from bloomery.train.losses import next_token

DATA = Path(os.environ.get("BLOOMERY_DATA", Path(__file__).parents[3] / "shared" / "data"), "math")
needs_data = pytest.mark.skipif(
    not (DATA / "gsm8k_train.jsonl").is_file(), reason=f"no real data under {DATA}; set BLOOMERY_DATA"
)
SIZE, COPIES, STEPS, MOST_TOKENS = 240, 4, 200, 320
TOPIC = re.compile(r"\b(years? old|ages?|older|younger)\b")


def rows():
    lines = (DATA / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        row = json.loads(line)
        chat = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
        yield {"id": str(number), "source": "gsm8k", "messages": chat}


def trained(samples, tokenizer):
    """A proxy that has read a part of the set of which no subset is made."""
    torch.manual_seed(0)
    model = Decoder(
        ModelConfig(
            family="llama", pattern="*-*-*-", vocab_size=tokenizer.vocab_size, hidden_size=96, intermediate_size=256,
            mlp_gated=True, mlp_hidden_act="silu", num_attention_heads=4, num_key_value_heads=2, head_dim=24,
            rope=RopeConfig(),
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    found = list(batches(samples, 0, 4096))
    for step in range(STEPS):
        loss = next_token(model, found[(step * 7) % len(found)][1])
        (loss.sum / loss.weight).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), float(loss.sum / loss.weight)


def renamed(row, copy):
    """A near-duplicate: the same problem with another name in it."""
    name = ["Ann", "Bob", "Kim", "Lee"][copy]
    chat = [{**message, "content": re.sub(r"^\w+", name, message["content"])} for message in row["messages"]]
    return {**row, "id": f"{row['id']}-{copy}", "messages": chat}


@needs_data
@pytest.mark.slow
def test_subsets_are_ranked_as_constructed():
    every = list(rows())
    for_proxy, rest = every[:3000], every[3000:]
    tokenizer = train_tokenizer((m["content"] for row in for_proxy for m in row["messages"]), 1024)
    model, loss = trained(list(encode_samples(for_proxy, tokenizer, MOST_TOKENS, Drops())), tokenizer)
    draw = np.random.default_rng(0)
    chosen = [rest[n] for n in draw.choice(len(rest), SIZE, replace=False)]
    topic = [row for row in rest if TOPIC.search(row["messages"][0]["content"])][:SIZE]
    assert len(topic) == SIZE
    few = [renamed(row, copy) for row in chosen[: SIZE // COPIES] for copy in range(COPIES)]
    half = [*chosen[: SIZE // 2], *(renamed(row, copy) for row in chosen[: SIZE // 8] for copy in range(COPIES))]
    scores, sketcher = {}, Sketcher(SketchConfig(dim=1024))
    for name, subset in {"random": chosen, "topic": topic, "half copies": half, "copies": few}.items():
        samples = list(encode_samples(subset, tokenizer, 1024, Drops()))
        z = np.concatenate([sketch(model, batch, sketcher)[0].numpy() for _, batch in batches(samples, 0, 4096)])
        assert len(z) == SIZE
        scores[name] = vendi.score(vendi.spectrum_of(z))
    print(f"proxy loss {loss:.2f}: {scores}")  # noqa: T201
    assert scores["copies"] < scores["half copies"] < scores["random"]
    assert scores["topic"] < scores["random"]
