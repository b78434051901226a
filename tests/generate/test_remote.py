"""The client side: our own server as the endpoint, and a scripted one for everything that goes wrong."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from live_server import Typist, running, typist_service

from bloomery.errors import ArtifactError, BloomeryError, ConfigError
from bloomery.generate.remote import RemoteEngine
from bloomery.generate.request import Request
from bloomery.generate.sampling import SamplingParams


def request(prompt="hi", tokens=3, **settings):
    return Request([ord(char) for char in prompt], SamplingParams(max_new_tokens=tokens, **settings))


@pytest.fixture(scope="module")
def address():
    with running(typist_service(Typist(max_batch=8))) as root:
        yield f"{root}/v1"


def remote(address, **settings):
    return RemoteEngine(address, "typist", **settings)


def answer(text="abc", tokens=(97, 98, 99), **choice):
    choice = {"index": 0, "text": text, "finish_reason": "length", "token_ids": list(tokens), "logprobs": None} | choice
    usage = {"prompt_tokens": 2, "completion_tokens": len(tokens), "total_tokens": 2 + len(tokens)}
    return 200, {
        "id": "x",
        "object": "text_completion",
        "created": 0,
        "model": "m",
        "choices": [choice],
        "usage": usage,
    }


def refusal(status, message, code=None):
    return status, {"error": {"message": message, "type": "x", "param": None, "code": code}}


@contextmanager
def scripted(*answers, headers=None):
    """An endpoint that gives these answers in turn, the last one for ever; yields its address and what it was asked."""
    asked, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            with lock:
                asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
                status, body = answers[min(len(asked), len(answers)) - 1]
            content = json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"content-type": "application/json", "content-length": str(len(content)),
                                **(headers or {})}.items():  # fmt: skip
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        thread.join()


NOW = {"retry-after-ms": "1"}


def test_completions_come_in_order_with_tokens_and_logprobs(address):
    engine = remote(address)
    completions = engine.generate([request("hi", n) for n in (5, 1, 3)])
    assert [completion.text for completion in completions] == ["abcde", "a", "abc"]
    assert completions[2].token_ids == [97, 98, 99]
    assert completions[2].logprobs == [-1.0] * 3
    assert {completion.finish_reason for completion in completions} == {"length"}
    assert (engine.ledger.requests, engine.ledger.prompt_tokens, engine.ledger.completion_tokens) == (3, 6, 9)


def test_a_stop_string_keeps_its_tokens_and_loses_its_text(address):
    [completion] = remote(address).generate([request("hi", 9, stop=("cd",))])
    assert (completion.text, completion.token_ids, completion.finish_reason) == ("ab", [97, 98, 99, 100], "stop")


def test_a_stream_that_is_closed_early_drops_the_rest():
    engine = Typist(max_batch=1)
    with running(typist_service(engine)) as root:
        stream = remote(f"{root}/v1", concurrency=4).stream([request("hi", n) for n in (2, 57, 56, 55, 54, 53)])
        next(stream)
        engine.gate.clear()
        stream.close()
        engine.gate.set()
    assert not engine.busy


def test_what_is_sent():
    """The model's own end tokens must not end a text: the engine knows none but `stop_token_ids`."""
    with scripted(answer()) as (url, asked):
        wanted = request("hi", 3, top_k=5, min_p=0.1, stop=("x",), stop_token_ids=(7,), seed=4)
        RemoteEngine(url, "m").generate([wanted])
    assert asked == [{
        "model": "m", "prompt": [104, 105], "max_tokens": 3, "temperature": 1.0, "top_p": 1.0, "seed": 4, "stop": ["x"],
        "logprobs": 0, "echo": False, "top_k": 5, "min_p": 0.1, "stop_token_ids": [7], "ignore_eos": True,
        "return_token_ids": True, "return_tokens_as_token_ids": True,
    }]  # fmt: skip


def test_the_ledger_knows_the_price():
    with scripted(answer()) as (url, _):
        engine = RemoteEngine(url, "m", prices=(2.0, 10.0))
        engine.generate([request(), request("ho")])
    assert engine.ledger.cost == pytest.approx((4 * 2 + 6 * 10) / 1e6)
    assert RemoteEngine(url, "m").ledger.cost is None


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(status):
    with scripted(refusal(status, "busy"), refusal(status, "busy"), answer(), headers=NOW) as (url, asked):
        engine = RemoteEngine(url, "m")
        assert engine.generate([request()])[0].text == "abc"
    assert (len(asked), engine.ledger.retries, engine.ledger.requests) == (3, 2, 1)


@pytest.mark.parametrize(
    ("status", "kind", "says"),
    [
        (401, ConfigError, "request 0: 401: no; give api_key or set OPENAI_API_KEY"),
        (404, ConfigError, "request 0: 404: no; asked for model 'm'"),
        (400, ConfigError, "request 0: 400: no"),
        (429, BloomeryError, "request 0: 429: no; gave up after 1 retries"),
        (500, BloomeryError, "request 0: 500: no; gave up after 1 retries"),
    ],
)
def test_refusals_in_plain_words(status, kind, says):
    with scripted(refusal(status, "no"), headers=NOW) as (url, _), pytest.raises(kind, match=says):
        RemoteEngine(url, "m", max_retries=1).generate([request()])


def test_no_server():
    with pytest.raises(BloomeryError, match=r"127.0.0.1:9/v1: request 0: cannot connect .*is the server running"):
        RemoteEngine("http://127.0.0.1:9/v1", "m", max_retries=0).generate([request()])


def test_a_server_that_does_not_answer(address):
    engine = Typist()
    engine.gate.clear()
    with (
        running(typist_service(engine, drain_seconds=0)) as root,
        pytest.raises(BloomeryError, match=r"within 0.1 s, 1 "),
    ):
        remote(f"{root}/v1", timeout_seconds=0.1, max_retries=0).generate([request()])


def test_an_endpoint_without_token_ids():
    with scripted(answer(token_ids=None)) as (url, asked):
        with pytest.raises(ConfigError, match="gave no token ids; .*text_only=True"):
            RemoteEngine(url, "m").generate([request()])
        [completion] = RemoteEngine(url, "m", text_only=True).generate([request()])
        assert (completion.text, completion.token_ids) == ("abc", [])
        own = {"model", "prompt", "max_tokens", "temperature", "top_p", "seed", "logprobs", "echo"}
        assert set(asked[-1]) <= own
        with pytest.raises(ConfigError, match="request 0: top_k is not in OpenAI's API"):
            RemoteEngine(url, "m", text_only=True).generate([request(top_k=3)])


def test_an_end_that_is_none_of_ours():
    with (
        scripted(answer(finish_reason="content_filter")) as (url, _),
        pytest.raises(BloomeryError, match="content_filter"),
    ):
        RemoteEngine(url, "m").generate([request()])


def test_a_rerun_sends_only_what_is_missing(tmp_path):
    journal, wanted = tmp_path / "deep" / "answers.jsonl", [request("a"), request("b"), request("a")]
    with scripted(answer(), refusal(400, "no")) as (url, asked):
        with pytest.raises(ConfigError):
            RemoteEngine(url, "m", journal=journal, concurrency=1).generate(wanted)
        assert len(asked) == 2
    with journal.open("a") as file:
        file.write('{"request": "torn')
    with scripted(answer("xyz", (1, 2))) as (url, asked):
        engine = RemoteEngine(url, "m", journal=journal)
        assert [completion.text for completion in engine.generate(wanted)] == ["abc", "xyz", "abc"]
        assert [one["prompt"] for one in asked] == [[ord("b")]]
        assert (engine.ledger.requests, engine.ledger.from_journal) == (1, 1)
        assert [completion.token_ids for completion in engine.generate(wanted)] == [[97, 98, 99], [1, 2], [97, 98, 99]]
        assert len(asked) == 1


def test_another_model_or_setting_is_another_answer(tmp_path):
    journal = tmp_path / "answers.jsonl"
    with scripted(answer()) as (url, asked):
        RemoteEngine(url, "m", journal=journal).generate([request()])
        RemoteEngine(url, "n", journal=journal).generate([request()])
        RemoteEngine(url, "m", journal=journal).generate([request(seed=1)])
        assert len(asked) == 3


def test_alternatives_survive_the_journal(tmp_path):
    logprobs = {
        "tokens": ["token_id:104", "token_id:97"], "token_logprobs": [None, -0.5], "text_offset": [0, 1],
        "top_logprobs": [None, {"token_id:97": -0.5, "token_id:5": -2.0}],
    }  # fmt: skip
    wanted = [request("h", 1, top_logprobs=2, prompt_logprobs=True)]
    with scripted(answer("a", (97,), logprobs=logprobs)) as (url, asked):
        for _ in range(2):
            [found] = RemoteEngine(url, "m", journal=tmp_path / "j.jsonl").generate(wanted)
            assert (found.logprobs, found.top_logprobs) == ([-0.5], [{97: -0.5, 5: -2.0}])
            assert (found.prompt_logprobs, found.prompt_top_logprobs, found.text) == ([None], [None], None)
        assert len(asked) == 1


def test_a_damaged_journal_is_named(tmp_path):
    journal = tmp_path / "answers.jsonl"
    journal.write_text('{"request": 1}\n')
    with pytest.raises(ArtifactError, match="line 1 is not an answer"):
        RemoteEngine("http://127.0.0.1:9/v1", "m", journal=journal).generate([request()])


def test_a_journal_has_one_writer(tmp_path):
    journal = tmp_path / "answers.jsonl"
    with scripted(answer()) as (url, _):
        stream = RemoteEngine(url, "m", journal=journal).stream([request(), request("b")])
        next(stream)
        with pytest.raises(ArtifactError, match="another process is writing here"):
            RemoteEngine(url, "m", journal=journal).generate([request()])
        stream.close()
