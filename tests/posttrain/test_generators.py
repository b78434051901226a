"""Completions from elsewhere: an endpoint that takes weights from a folder, and vLLM, with a fake of each."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from rl_kills import starts_with_digit

from bloomery import artifact
from bloomery.config import build
from bloomery.errors import BloomeryError
from bloomery.generate import Engine, Request, SamplingParams
from bloomery.model import hf
from bloomery.posttrain import generators, rl
from bloomery.posttrain.rl_config import RLConfig
from bloomery.train.model_folder import open_model
from bloomery.verify import VERIFIERS


class Endpoint:
    """A server of another kind: an engine on weights of its own, which it reads from a folder when it is told to."""

    def __init__(self, start: Path, refuses: bool = False):
        self.refuses, self.asked, self.lock = refuses, list[str](), threading.Lock()
        self.folder = open_model(start)
        self.load(self.folder.path)

    def load(self, path: Path) -> None:
        self.engine = Engine(hf.load(path), 1, 64, decode=self.folder.tokenizer.decode)

    def reply(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        with self.lock:
            self.asked.append(path)
            if path == "/v1/completions":
                return self.complete(body)
            if self.refuses:
                return {"success": False, "message": "no room for these weights"}
            if path == "/update_weights_from_disk":
                self.load(Path(body["model_path"]))
            elif path == "/collective_rpc":
                assert body["method"] == "reload_weights"
                self.load(Path(body["kwargs"]["weights_path"]))
            return {"success": True}

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        params = SamplingParams(
            max_new_tokens=body["max_tokens"], temperature=body["temperature"], seed=body["seed"],
            stop_token_ids=tuple(body["stop_token_ids"]),
        )  # fmt: skip
        [found] = self.engine.generate([Request(body["prompt"], params)])
        choice = {"index": 0, "text": found.text, "finish_reason": found.finish_reason, "token_ids": found.token_ids,
                  "logprobs": {"token_logprobs": found.logprobs, "tokens": []}}  # fmt: skip
        usage = {"prompt_tokens": 1, "completion_tokens": len(found.token_ids), "total_tokens": 2}
        return {"id": "x", "object": "text_completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}


@contextmanager
def serving(endpoint: Endpoint) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            content = json.dumps(endpoint.reply(self.path, body)).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VERIFIERS, "answer", starts_with_digit)
    monkeypatch.setattr(rl, "self_test", lambda verifiers: None)


def config(world: Any, generator: dict[str, Any]) -> RLConfig:
    loop = {"max_steps": 2, "learning_rate": 2e-2, "schedule": "constant"}
    return build(RLConfig, {
        "model": world.model, "prompts": world.prompts, "num_prompts": 2, "group_size": 4, "max_new_tokens": 3,
        "seed": 1, "loop": loop, "workers": 1, "generator": generator,
    })  # fmt: skip


@pytest.mark.parametrize("server", ["sglang", "vllm"])
def test_an_endpoint_takes_every_steps_weights(tiny_world: Any, tmp_path: Path, server: str) -> None:
    """The trainer's own engine and the endpoint write the same texts, so the two runs end with the same weights."""
    endpoint = Endpoint(tiny_world.model)
    with serving(endpoint) as url:
        rl.run(
            config(tiny_world, {"type": "endpoint", "base_url": url, "model": "m", "server": server}), tmp_path / "a"
        )
    rl.run(config(tiny_world, {"type": "engine"}), tmp_path / "b")
    reload = "/update_weights_from_disk" if server == "sglang" else "/collective_rpc"
    draws = endpoint.asked.count(reload)
    assert draws >= 2
    assert endpoint.asked.count("/v1/completions") == 8 * draws
    gaps = [row["logprob_gap_max"] for row in artifact.Metrics(tmp_path / "a" / "metrics.jsonl").read()[1::2]]
    assert max(gaps) < 1e-4
    ours, theirs = (hf.load(tmp_path / run / "model").state_dict() for run in "ba")
    assert all(torch.allclose(tensor, theirs[name], atol=1e-5) for name, tensor in ours.items())


def test_an_endpoint_that_refuses_weights_stops_the_run(tiny_world: Any, tmp_path: Path) -> None:
    with (
        serving(Endpoint(tiny_world.model, refuses=True)) as url,
        pytest.raises(BloomeryError, match="did not take new weights: .*no room for these weights"),
    ):
        rl.run(
            config(tiny_world, {"type": "endpoint", "base_url": url, "model": "m", "server": "sglang"}), tmp_path / "a"
        )
    absent = {"type": "endpoint", "base_url": "http://127.0.0.1:9/v1", "model": "m", "server": "vllm"}
    with pytest.raises(BloomeryError, match=r"/collective_rpc: .* vLLM has it under VLLM_SERVER_DEV_MODE=1"):
        rl.run(config(tiny_world, absent), tmp_path / "b")


class FakeVllm:
    """The interface of `generate.vllm.VllmEngine`, on an engine of ours; keeps what it was given."""

    made: "FakeVllm"

    def __init__(self, path: Path, rows: int, window: int, **settings: Any):
        folder = open_model(path)
        self.engine = Engine(hf.load(folder.path), rows, window, decode=folder.tokenizer.decode)
        self.settings, self.given = settings, list[Any]()
        FakeVllm.made = self

    @property
    def weight_version(self) -> int:
        return self.engine.weight_version

    def stream(self, requests: Any) -> Any:
        return self.engine.stream(requests)

    def sync(self, weights: Any) -> None:
        self.given.append(weights)
        self.engine.sync(hf.load(weights).state_dict() if isinstance(weights, Path) else None)


@pytest.mark.parametrize("settings", [{"tensor_parallel_size": 2}, {"gpu_memory_utilization": 0.4}])
def test_vllm_gets_the_weights_by_the_way_that_reaches_it(
    tiny_world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    apart = "tensor_parallel_size" in settings
    monkeypatch.setattr(generators, "VllmEngine", FakeVllm)
    chosen = config(tiny_world, {"type": "vllm", "settings": settings}).model_copy(
        update={"loop": config(tiny_world, {"type": "engine"}).loop.model_copy(update={"max_steps": 1})}
    )
    rl.run(chosen, tmp_path / "out")
    vllm = FakeVllm.made
    assert vllm.settings == settings
    assert vllm.weight_version == len(vllm.given) >= 1
    if apart:
        assert vllm.given[0] == tmp_path / "out" / "checkpoints" / "vllm"
    else:
        saved = hf.load(open_model(tiny_world.model).path)
        assert vllm.given[0].keys() == hf.published(saved).keys()
