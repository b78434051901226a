"""The HTTP side with an engine of a few lines: refusals, limits, ends."""

import json
import socket
import threading
from dataclasses import replace

import httpx
import pytest
from live_server import Typist, metric, running, typist_model, typist_service, wait_until

from bloomery.generate.serve.plan import plan_completion
from bloomery.generate.serve.protocol import CompletionBody, parse

BASE = {"model": "typist", "prompt": "hi"}
CHAT = {"model": "typist", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def root():
    with running(typist_service(max_body_bytes=4096)) as address:
        yield address


def complete(root, **fields):
    return httpx.post(f"{root}/v1/completions", json={**BASE, **fields}, timeout=20)


def error_of(response):
    """The error object, whose shape clients rely on."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text
    return body["error"]


def test_a_completion(root):
    found = complete(root, max_tokens=5).json()
    assert found["object"] == "text_completion"
    assert found["choices"][0]["text"] == "abcde"
    assert found["usage"] | {"prompt_tokens_details": 0} == {
        "prompt_tokens": 2, "completion_tokens": 5, "total_tokens": 7, "prompt_tokens_details": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "says"),
    [
        ("completions", b"{", 400, None, "the body is not JSON"),
        ("completions", b"[" * 3000, 400, None, "the body is not JSON"),
        ("completions", b"\xff\xfe", 400, None, "the body is not JSON"),
        ("completions", b"[]", 400, None, "the body is list, expected a JSON object"),
        ("completions", b" " * 5000, 413, None, "more than 4096 bytes"),
        ("completions", {"prompt": "a"}, 400, "model", "model: missing"),
        ("completions", {**BASE, "model": "gpt-4"}, 404, "model", "this server has 'typist'"),
        ("completions", {"model": "typist"}, 400, "prompt", "prompt: missing"),
        ("completions", {**BASE, "prompt": ""}, 400, "prompt", "prompt: empty"),
        ("completions", {**BASE, "prompt": []}, 400, "prompt", "prompt: empty"),
        ("completions", {**BASE, "prompt": [[]]}, 400, "prompt", "prompt: empty"),
        ("completions", {**BASE, "prompt": [3, 256]}, 400, "prompt", "token 256 is outside the vocabulary of 256"),
        ("completions", {**BASE, "prompt": [3, -1]}, 400, "prompt", "token -1 is outside"),
        ("completions", {**BASE, "prompt": [3, "a"]}, 400, "prompt.*", "prompt"),
        ("completions", {**BASE, "prompt": {"a": 1}}, 400, "prompt.*", "prompt"),
        ("completions", {**BASE, "prompt": "\ud800"}, 400, None, "half a surrogate pair"),
        ("completions", {**BASE, "temprature": 1}, 400, "temprature", "did you mean temperature?"),
        ("completions", {**BASE, "temperature": -1}, 400, "temperature", "greater than or equal to 0"),
        ("completions", {**BASE, "temperature": "hot"}, 400, "temperature", "valid number"),
        ("completions", {**BASE, "temperature": 1e-4}, 400, "temperature", "neither 0 (greedy)"),
        ("completions", {**BASE, "top_p": 0}, 400, "top_p", "greater than 0"),
        ("completions", {**BASE, "n": 0}, 400, "n", "greater than or equal to 1"),
        ("completions", {**BASE, "n": 1.5}, 400, "n", "valid integer"),
        ("completions", {**BASE, "n": True}, 400, "n", "valid integer"),
        ("completions", {**BASE, "max_tokens": -1}, 400, "max_tokens", "greater than or equal to 0"),
        ("completions", {**BASE, "max_tokens": 0}, 400, None, "max_tokens 0 asks for nothing"),
        ("completions", {**BASE, "max_tokens": 59}, 400, "prompt", "the context holds 60"),
        ("completions", {**BASE, "seed": 2**63}, 400, "seed", "less than"),
        ("completions", {**BASE, "stop": ""}, 400, None, "none of them empty"),
        ("completions", {**BASE, "stop": ["a"] * 33}, 400, None, "at most 32"),
        ("completions", {**BASE, "logprobs": 21}, 400, "logprobs", "less than or equal to 20"),
        ("completions", {**BASE, "best_of": 2}, 400, "best_of", "not supported"),
        ("completions", {**BASE, "suffix": "x"}, 400, "suffix", "not supported"),
        ("completions", {**BASE, "logit_bias": {"5": 1}}, 400, "logit_bias", "not supported"),
        ("completions", {**BASE, "presence_penalty": 0.5}, 400, "presence_penalty", "not supported"),
        ("completions", {**BASE, "stream_options": {"include_usage": True}}, 400, None, "only for stream: true"),
        ("completions", {**BASE, "stream": True, "echo": True}, 400, None, "echo with stream"),
        ("completions", {**BASE, "n": 128, "prompt": ["a"] * 4}, 400, None, "asks for 512 completions"),
        ("completions", {**BASE, "prompt": "!"}, 400, None, "does not like exclamation marks"),
        ("chat/completions", {**CHAT, "messages": []}, 400, "messages", "messages: empty"),
        ("chat/completions", {**CHAT, "messages": "hi"}, 400, "messages", "valid list"),
        ("chat/completions", {**CHAT, "messages": [{"content": "x"}]}, 400, "messages.0.role", "expected text"),
        ("chat/completions", {**CHAT, "messages": [{"role": "user"}]}, 400, "messages.0.content", "found NoneType"),
        ("chat/completions", {**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400,
         "messages.0.content.0", "'image_url' is not supported"),
        ("chat/completions", {**CHAT, "messages": [{"role": "user", "content": "", "tool_calls": [1]}]}, 400,
         "messages.0.tool_calls", "not supported"),
        ("chat/completions", {**CHAT, "tools": [{"type": "function"}]}, 400, "tools", "not supported"),
        ("chat/completions", {**CHAT, "response_format": {"type": "json_object"}}, 400, "response_format", "not supp"),
        ("chat/completions", {**CHAT, "top_logprobs": 3}, 400, None, "top_logprobs needs logprobs"),
        ("chat/completions", {**CHAT, "max_tokens": 3, "max_completion_tokens": 4}, 400, None, "the same limit"),
        ("chat/completions", {**CHAT, "prompt": "x"}, 400, "prompt", "not supported"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused_by_name(root, path, body, status, param, says):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = httpx.post(f"{root}/v1/{path}", content=content)
    error = error_of(response)
    assert (response.status_code, error["type"]) == (status, "invalid_request_error")
    assert says in error["message"]
    assert error["param"] == param or (param and param.endswith("*") and error["param"].startswith(param[:-2]))


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405), ("GET", "/v1/models/other", 404), ("PUT", "/", 404)],
)
def test_no_such_page(root, method, path, status):
    response = httpx.request(method, f"{root}{path}")
    assert response.status_code == status
    error_of(response)


def test_fields_that_change_nothing_pass(root):
    neutral = {
        "best_of": 1, "presence_penalty": 0.0, "logit_bias": {}, "suffix": None, "user": "u", "temperature": 0,
        "top_p": 0.9, "n": 1, "stop": None,
    }  # fmt: skip
    assert complete(root, max_tokens=2, **neutral).json()["choices"][0]["text"] == "ab"
    chat = {
        **CHAT,
        "max_completion_tokens": 2,
        "tools": [],
        "response_format": {"type": "text"},
        "metadata": {"a": "b"},
    }
    message = httpx.post(f"{root}/v1/chat/completions", json=chat).json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "ab", "refusal": None}


@pytest.mark.parametrize(
    ("fields", "ends"),
    [({}, (7, 9)), ({"stop_token_ids": [9, 5]}, (7, 9, 5)), ({"ignore_eos": True, "stop_token_ids": [5]}, (5,))],
)
def test_the_models_own_end_tokens_end_a_text_unless_told_not_to(fields, ends):
    model = replace(typist_model(), stop_token_ids=(7, 9))
    [request] = plan_completion(parse(CompletionBody, {**BASE, **fields}), model).requests
    assert request.params.stop_token_ids == ends


def test_text_parts_of_a_message_are_joined(root):
    content = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    body = {**CHAT, "messages": [{"role": "user", "content": content, "name": None}], "max_tokens": 1}
    assert httpx.post(f"{root}/v1/chat/completions", json=body).json()["usage"]["prompt_tokens"] == 2


def test_a_chat_may_fill_the_context(root):
    found = httpx.post(f"{root}/v1/chat/completions", json=CHAT).json()
    assert found["usage"]["completion_tokens"] == 58


def events(response):
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_stream_holds_a_stop_string_back_and_ends_with_usage(root):
    response = complete(root, max_tokens=20, stop=["def"], stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *pieces, usage = events(response)
    assert [piece["choices"][0]["text"] for piece in pieces] == ["a", "b", "c", ""]
    assert [piece["choices"][0]["finish_reason"] for piece in pieces] == [None, None, None, "stop"]
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 6


def test_a_streamed_chat_says_first_who_speaks(root):
    response = httpx.post(f"{root}/v1/chat/completions", json={**CHAT, "max_tokens": 2, "stream": True})
    assert [event["choices"][0]["delta"] for event in events(response)] == [
        {"role": "assistant", "content": ""}, {"content": "a"}, {"content": "b"},
    ]  # fmt: skip


def test_several_prompts_and_samples_come_in_order(root):
    found = complete(root, prompt=["x", "yy"], n=2, max_tokens=1, return_token_ids=True).json()
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
    assert [choice["prompt_token_ids"] for choice in found["choices"]] == [[120]] * 2 + [[121, 121]] * 2
    assert found["usage"]["prompt_tokens"] == 3


def test_token_ids_instead_of_spellings(root):
    found = complete(root, max_tokens=1, logprobs=0, return_tokens_as_token_ids=True).json()["choices"][0]["logprobs"]
    assert (found["tokens"], found["top_logprobs"]) == (["token_id:97"], [{"token_id:97": -1.0}])


def held(root, **fields):
    """A request in a thread of its own; its response lands in the list."""
    found = []
    thread = threading.Thread(target=lambda: found.append(complete(root, **fields)))
    thread.start()
    return thread, found


def test_past_the_queue_requests_are_refused_and_told_when_to_return():
    engine = Typist(max_batch=1)
    engine.gate.clear()
    with running(typist_service(engine, queue=1)) as root:
        inside = [held(root, max_tokens=3) for _ in range(2)]
        wait_until(lambda: metric(root, "bloomery_requests_running") + metric(root, "bloomery_requests_waiting") == 2)
        refused = complete(root)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert error_of(refused)["type"] == "rate_limit_error"
        engine.gate.set()
        for thread, found in inside:
            thread.join()
            assert found[0].json()["choices"][0]["text"] == "abc"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_rows(stream):
    engine = Typist()
    with running(typist_service(engine)) as root:
        engine.gate.clear()
        host, _, port = root.removeprefix("http://").partition(":")
        body = json.dumps({**BASE, "max_tokens": 50, "n": 3, "stream": stream}).encode()
        with socket.create_connection((host, int(port))) as line:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            line.sendall(head.encode() + body)
            wait_until(lambda: len(engine._written) == 3)
        wait_until(lambda: not engine.busy)
        assert engine.cancelled == [1, 2, 3]
        wait_until(lambda: metric(root, "bloomery_client_disconnects_total") == 1)
        assert metric(root, "bloomery_requests_running") == metric(root, "bloomery_requests_waiting") == 0
        engine.gate.set()
        assert complete(root, max_tokens=1).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_takes_too_long(stream):
    engine = Typist()
    engine.gate.clear()
    with running(typist_service(engine, timeout_seconds=0.05)) as root:
        response = complete(root, stream=stream)
        error = json.loads(response.text.removeprefix("data: "))["error"]
        assert (response.status_code, error["type"]) == (200 if stream else 504, "timeout_error")
        assert "not finished within 0.05 seconds" in error["message"]
        wait_until(lambda: not engine.busy)


def test_an_engine_that_fails_is_told_to_all_and_logged_once(capfd):
    engine = Typist()
    engine.gate.clear()
    with running(typist_service(engine)) as root:
        inside = [held(root, max_tokens=3) for _ in range(2)]
        wait_until(lambda: len(engine._written) == 2)
        engine.failure = RuntimeError("secret detail")
        for thread, found in inside:
            thread.join()
            assert found[0].status_code == 500
            assert error_of(found[0])["message"] == "the engine failed on this request (RuntimeError)"
        assert httpx.get(f"{root}/health").status_code == 503
        assert complete(root).status_code == 503
    assert capfd.readouterr().err.count("RuntimeError: secret detail") == 1


def test_draining_finishes_what_runs_and_refuses_the_rest():
    engine = Typist()
    engine.gate.clear()
    service = typist_service(engine)
    with running(service) as root:
        thread, found = held(root, max_tokens=3)
        wait_until(lambda: engine.busy)
        assert httpx.get(f"{root}/health").json() == {"status": "ok"}
        service.drain()
        assert httpx.get(f"{root}/health").status_code == 503
        assert error_of(complete(root))["code"] == "draining"
        engine.gate.set()
        thread.join()
        assert found[0].json()["choices"][0]["text"] == "abc"


def test_a_drain_does_not_wait_for_ever():
    engine = Typist()
    engine.gate.clear()
    service = typist_service(engine, drain_seconds=0.1)
    with running(service) as root:
        thread, found = held(root, max_tokens=3)
        wait_until(lambda: engine.busy)
        service.drain()
        thread.join()
        assert "shutting down" in error_of(found[0])["message"]


def test_the_key_guards_everything_under_v1():
    with running(typist_service(api_key="sesame")) as root:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "sesame"}):
            response = httpx.get(f"{root}/v1/models", headers=headers)
            assert response.status_code == 401
            assert error_of(response)["code"] == "invalid_api_key"
        assert complete(root).status_code == 401
        allowed = httpx.get(f"{root}/v1/models", headers={"Authorization": "Bearer sesame"})
        assert [card["id"] for card in allowed.json()["data"]] == ["typist"]
        assert httpx.get(f"{root}/health").status_code == 200


def test_metrics_count_what_happened(root):
    before = metric(root, 'bloomery_requests_total{path="/v1/completions",status="200"}')
    complete(root, max_tokens=3, stream=True)
    assert metric(root, 'bloomery_requests_total{path="/v1/completions",status="200"}') == before + 1
    assert metric(root, "bloomery_time_to_first_token_seconds_count") >= 1
    text = httpx.get(f"{root}/metrics").text
    assert 'bloomery_request_seconds_bucket{le="+Inf"}' in text
