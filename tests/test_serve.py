"""`bloomery serve` as a process, asked by the official client; the engine itself is the oracle."""

import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest
import torch

from bloomery import cli
from bloomery.generate import Engine, Request, SamplingParams
from bloomery.generate.remote import RemoteEngine
from bloomery.model import hf
from bloomery.serve import describe
from bloomery.train.model_folder import open_model

WINDOW = 64


@contextmanager
def process(model: Path, *options: str):
    """The verb in a process of its own; yields it and its address."""
    command = [sys.executable, "-m", "bloomery", "serve", str(model), "--port", "0", "--json", *options]
    environment = {name: value for name, value in os.environ.items() if name != "BLOOMERY_API_KEY"}
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment | {"OMP_NUM_THREADS": "1"}
    )
    try:
        line = running.stdout.readline()
        assert line, running.stderr.read()
        url = json.loads(line)["url"]
        wait_until(lambda: healthy(url))
        yield running, url
    finally:
        running.kill()
        running.communicate()


def healthy(url: str) -> bool:
    try:
        return httpx.get(url.replace("/v1", "/health")).status_code == 200
    except httpx.TransportError:
        return False


def wait_until(true, seconds: float = 60.0) -> None:
    """Wait for a condition, not for a time."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def url(tiny_world):
    with process(tiny_world.model, "--name", "tiny", "--max-batch", "8", "--queue", "1000") as (_, address):
        yield address


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def served(tiny_world):
    return describe(open_model(tiny_world.model), "tiny", WINDOW)


@pytest.fixture(scope="module")
def engine(tiny_world, served):
    return Engine(hf.load(tiny_world.model), max_batch=8, max_tokens=WINDOW, decode=served.decode)


def ours(engine, served, prompt, **params):
    ids = served.encode(prompt) if isinstance(prompt, str) else prompt
    settings = {"stop_token_ids": served.stop_token_ids, "max_new_tokens": 16} | params
    return engine.generate([Request(ids, SamplingParams(**settings))])[0]


def test_a_completion_is_the_engines(client, engine, served):
    expected = ours(engine, served, "1+2=", temperature=0.8, seed=5, top_logprobs=2)
    asked = {"model": "tiny", "prompt": "1+2=", "temperature": 0.8, "seed": 5, "logprobs": 2}
    found = client.completions.create(**asked)
    [choice] = found.choices
    assert (choice.text, choice.finish_reason) == (expected.text, expected.finish_reason)
    assert choice.logprobs.token_logprobs == pytest.approx(expected.logprobs, abs=1e-5)
    assert choice.logprobs.tokens == [served.spell(token) for token in expected.token_ids]
    assert found.usage.completion_tokens == len(expected.token_ids)
    by_id = client.completions.create(**asked, extra_body={"return_tokens_as_token_ids": True}).choices[0].logprobs
    for at, shown in enumerate(by_id.top_logprobs):
        wanted = expected.top_logprobs[at] | {expected.token_ids[at]: expected.logprobs[at]}
        assert {int(token.removeprefix("token_id:")): logprob for token, logprob in shown.items()} == approximate(
            wanted
        )


def test_samples_differ_and_the_first_has_the_calls_seed(client, engine, served):
    found = client.completions.create(model="tiny", prompt=["1+2=", "3+4="], n=3, seed=9, temperature=1, max_tokens=12)
    texts = [choice.text for choice in found.choices]
    assert texts[0] == ours(engine, served, "1+2=", seed=9, max_new_tokens=12).text
    assert texts[3] == ours(engine, served, "3+4=", seed=9, max_new_tokens=12).text
    assert len(set(texts[:3])) == 3
    again = client.completions.create(model="tiny", prompt="3+4=", n=3, seed=9, temperature=1, max_tokens=12)
    assert [choice.text for choice in again.choices] == texts[3:]


def test_a_stream_adds_up_to_the_whole(client, engine, served):
    expected = ours(engine, served, "4+4=", seed=3, max_new_tokens=40, stop=("\n", "7"))
    stream = client.completions.create(
        model="tiny", prompt="4+4=", seed=3, max_tokens=40, stop=["\n", "7"], stream=True, logprobs=0,
        stream_options={"include_usage": True},
    )  # fmt: skip
    *events, usage = list(stream)
    assert "".join(event.choices[0].text for event in events) == expected.text
    assert events[-1].choices[0].finish_reason == expected.finish_reason
    streamed = [logprob for event in events for logprob in event.choices[0].logprobs.token_logprobs]
    assert streamed == pytest.approx(expected.logprobs, abs=1e-5)
    assert usage.usage.completion_tokens == len(expected.token_ids)


def test_a_chat_and_its_stream(client, engine, served):
    messages = [{"role": "user", "content": "2+2="}]
    expected = ours(engine, served, served.render_chat(messages), seed=1, max_new_tokens=20, top_logprobs=3)
    asked = {"model": "tiny", "messages": messages, "seed": 1, "max_completion_tokens": 20, "logprobs": True}
    found = client.chat.completions.create(**asked, top_logprobs=3).choices[0]
    assert found.message.content == expected.text
    assert [at.logprob for at in found.logprobs.content] == pytest.approx(expected.logprobs, abs=1e-5)
    assert [len(at.top_logprobs) for at in found.logprobs.content] == [3] * len(expected.token_ids)
    events = list(client.chat.completions.create(**asked, stream=True))
    assert events[0].choices[0].delta.role == "assistant"
    assert "".join(event.choices[0].delta.content or "" for event in events) == expected.text
    assert events[-1].choices[0].finish_reason == expected.finish_reason


def test_scoring_a_prompt_is_the_models_own_log_softmax(client, tiny_world, served):
    ids = served.encode("3+1=\\boxed{4}")
    model = hf.load(tiny_world.model)
    with torch.no_grad():
        logprobs = model.lm_head(model(torch.tensor([ids]))).log_softmax(-1)[0, :-1]
    expected = logprobs.gather(-1, torch.tensor(ids[1:])[:, None]).flatten().tolist()
    for extra in (0, 1):
        found = client.completions.create(
            model="tiny", prompt=ids, echo=True, logprobs=1, max_tokens=extra, temperature=0
        ).choices[0]
        assert found.text.startswith(served.decode(ids))
        assert len(found.logprobs.token_logprobs) == len(ids) + extra
        assert found.logprobs.token_logprobs[0] is found.logprobs.top_logprobs[0] is None
        assert found.logprobs.token_logprobs[1 : len(ids)] == pytest.approx(expected, abs=1e-4)
        best = [max(top.values()) for top in found.logprobs.top_logprobs[1 : len(ids)]]
        assert best == pytest.approx(logprobs.max(-1).values.tolist(), abs=1e-4)


def test_errors_are_the_clients_own_kinds(client):
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.completions.create(model="gpt-4", prompt="a")
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="tiny", prompt="1", max_tokens=64)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "prompt")
    assert [card.id for card in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_the_remote_engine_is_the_engine(url, engine, served):
    end = served.stop_token_ids
    requests = [
        Request(served.encode("1+1="), SamplingParams(max_new_tokens=12, seed=4, stop_token_ids=end)),
        Request(served.encode("2+3="), SamplingParams(max_new_tokens=20, seed=7, stop=("1",), top_k=40, top_p=0.9)),
        Request(served.encode("0+3="), SamplingParams(max_new_tokens=5, temperature=0, top_logprobs=2)),
        Request(served.encode("0+4="), SamplingParams(max_new_tokens=3, prompt_logprobs=True, top_logprobs=1)),
        Request(served.encode("0+4="), SamplingParams(max_new_tokens=0, prompt_logprobs=True)),
    ]
    for found, expected in zip(RemoteEngine(url, "tiny").generate(requests), engine.generate(requests), strict=True):
        assert (found.token_ids, found.finish_reason) == (expected.token_ids, expected.finish_reason)
        assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-5)
        assert found.text in (expected.text, None)
        for name in ("top_logprobs", "prompt_top_logprobs"):
            pairs = zip(getattr(found, name) or (), getattr(expected, name) or (), strict=True)
            assert all(theirs is None or mine.items() >= approximate(theirs).items() for mine, theirs in pairs)
        assert (found.prompt_logprobs or [])[1:] == pytest.approx((expected.prompt_logprobs or [])[1:], abs=1e-5)


def approximate(top):
    return {token: pytest.approx(logprob, abs=1e-5) for token, logprob in top.items()}


async def talk(address, body, leave_after: int | None = None) -> bytes:
    """One request on a connection of its own; the answer without its head, or nothing where the client leaves after
    that many reads."""
    reader, writer = await asyncio.open_connection(*address)
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.0\r\nContent-Length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + content)
    try:
        if leave_after is None:
            head, _, answer = (await reader.read()).partition(b"\r\n\r\n")
            assert b" 200 " in head.splitlines()[0], answer
            return answer
        for _ in range(leave_after):
            await reader.readline()
        return b""
    finally:
        writer.close()


async def soak(url, bodies, clients: int, leave: float) -> tuple[dict[int, str], int]:
    """Each client sends one request after the other; some leave before or in the middle of the answer. Returns the
    texts of the others by index, and how many left."""
    host, _, port = url.removeprefix("http://").removesuffix("/v1").partition(":")
    rng, texts, left = random.Random(0), {}, 0
    queue = iter(enumerate(bodies))

    async def client():
        nonlocal left
        for index, body in queue:
            if rng.random() < leave:
                left += 1
                await talk((host, int(port)), body, rng.choice([0, 5, 7, 9]))
            else:
                texts[index] = text_of(await talk((host, int(port)), body), body["stream"])

    await asyncio.gather(*(client() for _ in range(clients)))
    return texts, left


def text_of(answer: bytes, stream: bool) -> str:
    if not stream:
        return json.loads(answer)["choices"][0]["text"]
    lines = [line.removeprefix("data: ") for line in answer.decode().splitlines() if line]
    assert lines[-1] == "[DONE]"
    return "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1])


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_sixty_four_clients_that_come_and_go(url, engine, served, count):
    rng = random.Random(1)
    bodies = [
        {"model": "tiny", "prompt": f"{rng.randrange(5)}+{rng.randrange(5)}=" * rng.randint(1, 3), "seed": index,
         "temperature": rng.choice([0, 1]), "max_tokens": rng.randint(1, 24), "stop": rng.choice([[], ["1", "="]]),
         "stream": rng.random() < 0.5}
        for index in range(count)
    ]  # fmt: skip
    texts, left = asyncio.run(soak(url, bodies, clients=64, leave=0.3))
    assert left > count / 5
    assert len(texts) == count - left
    for index, text in texts.items():
        asked = {name: bodies[index][name] for name in ("seed", "temperature", "stop")}
        expected = ours(engine, served, bodies[index]["prompt"], max_new_tokens=bodies[index]["max_tokens"], **asked)
        assert text == expected.text
    root = url.removesuffix("/v1")
    wait_until(lambda: numbers(root)["bloomery_requests_running"] == numbers(root)["bloomery_requests_waiting"] == 0)
    assert numbers(root)["bloomery_cache_bytes"] == 0
    assert numbers(root)["bloomery_client_disconnects_total"] > 0
    body = {"model": "tiny", "prompt": "1+2=", "temperature": 0}
    after = httpx.post(f"{url}/completions", json=body).json()["choices"][0]["text"]
    assert after == ours(engine, served, "1+2=", temperature=0).text


def numbers(root: str) -> dict[str, float]:
    lines = httpx.get(f"{root}/metrics").text.splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}


def test_sigterm_finishes_what_runs_and_ends_with_code_0(tiny_world, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_world.model, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    body = {"model": "model", "prompt": "1+", "max_tokens": 2000, "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True}, "return_token_ids": True}  # fmt: skip
    with process(model, "--api-key", "k", "--drain-seconds", "600") as (running, url):
        headers = {"Authorization": "Bearer k"}
        with httpx.stream("POST", f"{url}/completions", json=body, headers=headers, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            running.send_signal(signal.SIGTERM)
            wait_until(lambda: httpx.get(url.replace("/v1", "/health")).status_code == 503)
            refused = httpx.post(f"{url}/completions", json=body, headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            received = [line for line in lines if line]
        assert received[-1] == "data: [DONE]"
        assert json.loads(received[-2].removeprefix("data: "))["usage"]["completion_tokens"] == 2000
        assert running.wait(timeout=30) == 0
        assert "Traceback" not in running.stderr.read()


def fails(monkeypatch, capsys, *words: str) -> str:
    monkeypatch.setattr("sys.argv", ["bloomery", "serve", *words])
    monkeypatch.delenv("BLOOMERY_API_KEY", raising=False)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_other_machines_need_a_key(monkeypatch, capsys, tiny_world):
    said = fails(monkeypatch, capsys, str(tiny_world.model), "--host", "0.0.0.0")
    assert "--host: 0.0.0.0 is open to other machines and there is no API key; set BLOOMERY_API_KEY" in said


def test_a_port_that_is_taken(monkeypatch, capsys, tiny_world, url):
    port = url.rpartition(":")[2].removesuffix("/v1")
    assert f"--port: 127.0.0.1:{port}: Address already in use" in fails(
        monkeypatch, capsys, str(tiny_world.model), "--port", port
    )


def test_settings_out_of_range(monkeypatch, capsys, tiny_world):
    assert "timeout_seconds: " in fails(monkeypatch, capsys, str(tiny_world.model), "--timeout-seconds", "0")
