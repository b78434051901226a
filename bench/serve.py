"""Streaming to 16 clients at once, against `transformers serve`.

Same weights (both serve our export), same prompts through /v1/chat/completions with the official client's protocol,
float32, greedy, exactly NEW tokens each (the end token lies outside the vocabulary). The clients run in a process of
their own; each server has one core to itself in its turn, the other one rests, and the clients have the rest of the
machine. Both sides answer CLIENTS × ROUNDS requests a turn, each client one after the other. The peer runs with
whichever of its two schedulers is faster here: one request at a time, or continuous batching.

`python -m bench.serve [--quick]` prints one JSON line: `serve/throughput`, new tokens per second over a turn;
ratio > 1: we are faster. `first_token_ms` and `inter_token_ms` are medians over all pieces that clients saw.
"""

import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.figure import figure
from bench.grpo import tokenizer
from bench.peers import install
from bloomery.model import hf
from bloomery.model.config import ModelConfig, RopeConfig
from bloomery.model.decoder import Decoder

WORDS, NEW, PROMPT, CLIENTS = 1024, 64, 32, 16
MODEL = ModelConfig(
    family="llama", pattern="*-" * 4, vocab_size=WORDS + 1, hidden_size=256, intermediate_size=704, mlp_gated=True,
    mlp_hidden_act="silu", num_attention_heads=8, num_key_value_heads=4, head_dim=32, rope=RopeConfig(),
    max_position_embeddings=512,
)  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}{{ message.content + ' ' }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
SERVER_CORE = 0
PEER_SETTINGS: tuple[str, ...] = ()


@dataclass
class Turn:
    """What the clients saw: seconds of the whole, and times in milliseconds."""

    seconds: float = 0.0
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """New tokens per second."""
        return self.tokens / self.seconds


def export(folder: Path) -> None:
    """The model and its tokenizer as an ordinary directory."""
    torch.manual_seed(0)
    model = Decoder(MODEL)
    with torch.no_grad():
        model.lm_head.weight[-1] = 0.0  # the end token is never the likeliest
    hf.save(model, folder)
    tokenizer(folder, WORDS)
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def prompts(count: int) -> list[str]:
    """Random words, PROMPT tokens each."""
    ids = torch.randint(WORDS, (count, PROMPT), generator=torch.Generator().manual_seed(1)).tolist()
    return [" ".join(f"w{token}" for token in row) for row in ids]


async def ask(address: tuple[str, int], model: str, prompt: str, turn: Turn) -> None:
    """One streamed chat, its pieces timed."""
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": NEW, "temperature": 0,
            "stream": True}  # fmt: skip
    content = json.dumps(body).encode()
    start = before = time.perf_counter()
    reader, writer = await asyncio.open_connection(*address)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nConnection: close"
    writer.write(f"{head}\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)
    pieces = 0
    while line := await reader.readline():
        if line.startswith(b"data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
            now = time.perf_counter()
            (turn.between if pieces else turn.first).append(1e3 * (now - before if pieces else now - start))
            before, pieces = now, pieces + 1
    writer.close()
    assert pieces, "the server wrote nothing"
    turn.tokens += NEW


async def _take_turn(address: tuple[str, int], model: str, texts: list[str]) -> Turn:
    turn, queue, start = Turn(), iter(texts), time.perf_counter()

    async def client() -> None:
        for prompt in queue:
            await ask(address, model, prompt, turn)

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    turn.seconds = time.perf_counter() - start
    return turn


def take_turn(port: int, model: str, texts: list[str]) -> Turn:
    """All requests, CLIENTS at a time."""
    return asyncio.run(_take_turn(("127.0.0.1", port), model, texts))


@contextmanager
def server(command: list[str], port: int) -> Iterator[None]:
    """A server on SERVER_CORE, one thread, its output kept from ours."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=sys.stderr,
        preexec_fn=lambda: os.sched_setaffinity(0, {SERVER_CORE}),
    )  # fmt: skip
    try:
        while process.poll() is None and not _listens(port):
            time.sleep(0.1)
        assert process.poll() is None, f"{' '.join(command)} ended with code {process.returncode}"
        yield
    finally:
        process.kill()
        process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def commands(folder: Path) -> dict[str, tuple[list[str], int]]:
    """How each side is started, and on which port."""
    model, ours, peer = str(folder), _free_port(), _free_port()
    transformers_cli = str(install().parent / "transformers")
    return {
        "ours": ([sys.executable, "-m", "bloomery", "serve", model, "--port", str(ours), "--name", model], ours),
        "peer": ([transformers_cli, "serve", model, "--port", str(peer), "--device", "cpu", "--dtype", "float32",
                  *PEER_SETTINGS], peer),
    }  # fmt: skip


def measure(rounds: int, repeats: int) -> dict[str, object]:
    """The figure: both servers stay up, and take turns."""
    texts = prompts(CLIENTS * rounds)
    with tempfile.TemporaryDirectory() as name, ExitStack() as servers:
        folder = Path(name) / "llama"
        folder.mkdir()
        export(folder)
        sides = commands(folder)
        for command, port in sides.values():
            servers.enter_context(server(command, port))
        for _, port in sides.values():
            take_turn(port, str(folder), texts[:CLIENTS])  # warm-up
        turns: dict[str, list[Turn]] = {side: [] for side in sides}
        for _ in range(repeats):
            for side, (_, port) in sides.items():
                turns[side].append(take_turn(port, str(folder), texts))
    rates = {side: [turn.rate for turn in taken] for side, taken in turns.items()}
    found = figure("serve/throughput", rates["ours"], rates["peer"], "tokens/s")
    for name, key in (("first_token_ms", "first"), ("inter_token_ms", "between")):
        found[name] = {
            side: round(statistics.median(ms for turn in taken for ms in getattr(turn, key)), 1)
            for side, taken in turns.items()
        }
    return found


def main() -> None:
    quick = "--quick" in sys.argv
    print(json.dumps(measure(rounds=1 if quick else 2, repeats=3 if quick else 5)), flush=True)


if __name__ == "__main__":
    main()
