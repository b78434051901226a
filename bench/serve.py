"""Streaming to 16 clients at once, against `transformers serve`.

Same weights (both serve our export), same prompts through /v1/chat/completions, float32, greedy, exactly NEW tokens
each (the end token is never the likeliest). Each server is pinned to the same core, with one thread; they stay up and
take turns, so that only one works at a time. A turn is CLIENTS × rounds requests, each client one after the other.
`serve/throughput`: the peer as it starts by default, one request at a time.
`serve/throughput_continuous`: the peer with its option --continuous-batching.

`python -m bench.serve [--quick]` prints one JSON line per figure: new tokens per second of the server's own time, so
that what else the machine does hardly enters; ratio > 1: we are faster. `first_token_ms` and `inter_token_ms`
are medians by the clock over all pieces that clients saw, and need an idle machine.
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

WORDS, NEW, PROMPT, CLIENTS = 1024, 32, 32, 16
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
PEERS = {"serve/throughput": (), "serve/throughput_continuous": ("--continuous-batching",)}
TICKS = os.sysconf("SC_CLK_TCK")
TEMPLATE = (
    "{% for message in messages %}{{ message.content + ' ' }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
SERVER_CORE = 0
PEER_SETTINGS: tuple[str, ...] = ()


@dataclass
class Turn:
    """Seconds that the server computed, and what the clients saw, in milliseconds."""

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
    turn, queue = Turn(), iter(texts)

    async def client() -> None:
        for prompt in queue:
            await ask(address, model, prompt, turn)

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return turn


def take_turn(side: "Server", model: str, texts: list[str]) -> Turn:
    """All requests, CLIENTS at a time."""
    before = side.seconds()
    turn = asyncio.run(_take_turn(("127.0.0.1", side.port), model, texts))
    turn.seconds = side.seconds() - before
    return turn


@dataclass(frozen=True)
class Server:
    """A running server."""

    pid: int
    port: int

    def seconds(self) -> float:
        """Processor time that it has used, all threads."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS


@contextmanager
def serving(command: list[str]) -> Iterator[Server]:
    """A server on SERVER_CORE, one thread, with what it prints on standard error."""
    port = _free_port()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [*command, "--port", str(port)], env=environment, stdout=sys.stderr,
        preexec_fn=lambda: os.sched_setaffinity(0, {SERVER_CORE}),
    )  # fmt: skip
    try:
        while process.poll() is None and not _listens(port):
            time.sleep(0.1)
        assert process.poll() is None, f"{' '.join(command)} ended with code {process.returncode}"
        yield Server(process.pid, port)
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


def commands(model: str) -> dict[str, list[str]]:
    """How each side is started."""
    peer = [str(install().parent / "transformers"), "serve", model, "--device", "cpu", "--dtype", "float32"]
    ours = [sys.executable, "-m", "bloomery", "serve", model, "--name", model]
    return {"ours": ours} | {name: [*peer, *settings] for name, settings in PEERS.items()}


def measure(rounds: int, repeats: int) -> list[dict[str, object]]:
    """Both figures: all servers stay up, and take turns after a warm-up."""
    texts = prompts(CLIENTS * rounds)
    turns: dict[str, list[Turn]] = {}
    with tempfile.TemporaryDirectory() as name, ExitStack() as running:
        folder = Path(name) / "llama"
        folder.mkdir()
        export(folder)
        servers = {side: running.enter_context(serving(line)) for side, line in commands(str(folder)).items()}
        for repeat in range(repeats + 1):
            for side, server in servers.items():
                turn = take_turn(server, str(folder), texts if repeat else texts[:2])
                turns.setdefault(side, []).extend([turn] if repeat else [])
    return [_figure(name, turns["ours"], turns[name]) for name in PEERS]


def _figure(name: str, ours: list[Turn], peer: list[Turn]) -> dict[str, object]:
    found = figure(name, [turn.rate for turn in ours], [turn.rate for turn in peer], "tokens/s")
    for key, field_name in (("first_token_ms", "first"), ("inter_token_ms", "between")):
        found[key] = {
            side: round(statistics.median(ms for turn in taken for ms in getattr(turn, field_name)), 1)
            for side, taken in (("ours", ours), ("peer", peer))
        }
    return found


def main() -> None:
    quick = "--quick" in sys.argv
    for found in measure(rounds=1 if quick else 2, repeats=3 if quick else 5):
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
