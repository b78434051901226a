"""Verdicts by a Ray cluster are those of the local pool: with Ray where it is installed, else with a stand-in."""

import json
import os
import signal
import sys
import types
from typing import Any

import pytest

from bloomery.errors import ConfigError
from bloomery.verify import Deferred, Pool
from bloomery.verify import ray_pool as module
from bloomery.verify.ray_pool import RayPool, open_pool

DOUBLE = json.dumps({"kind": "call", "fn_name": "f", "cases": [{"args": [3], "ret": 6}]})
ITEMS = [
    ("answer", r"\boxed{1+x}", "x+1"),
    ("answer", r"\boxed{x+2}", "x+1"),
    ("answer", "none", "x+1"),
    ("answer", r"\boxed{\frac{1}{2}}", "0.5"),
    ("program", "```python\ndef f(x):\n    return 2 * x\n```", DOUBLE),
    ("program", "```python\ndef f(x):\n    return 3 * x\n```", DOUBLE),
]


class StandIn(types.ModuleType):
    """As much of Ray as the pool uses, in this process: an actor is an object, a future its outcome."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.exceptions = types.SimpleNamespace(RayActorError=type("RayActorError", (Exception,), {}))
        self.actors: list[Any] = []

    def is_initialized(self) -> bool:
        return True

    def remote(self, cls: type) -> Any:
        def create() -> Any:
            self.actors.append(cls())
            ask = types.SimpleNamespace(remote=lambda *request: (self.actors[-1], request))
            return types.SimpleNamespace(ask=ask, post=self.actors[-1])

        return types.SimpleNamespace(options=lambda **_: types.SimpleNamespace(remote=create))

    def get(self, waiting: Any, timeout: float) -> Any:
        post, request = waiting
        try:
            return post.ask(*request)
        except EOFError:
            raise self.exceptions.RayActorError from None

    def kill(self, actor: Any) -> None:
        actor.post._worker.kill()
        actor.post._worker.bury()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    found = StandIn()
    monkeypatch.setitem(sys.modules, "ray", found)
    return found


def test_the_same_verdicts_as_the_local_pool(stand_in: StandIn) -> None:
    with Pool(1) as local, RayPool(1) as pool:
        assert pool.judge_all(ITEMS) == local.judge_all(ITEMS)
    assert len(stand_in.actors) == 1


def test_an_actor_that_dies_is_replaced_once(stand_in: StandIn) -> None:
    with RayPool(1) as pool:
        task = Deferred("math", {"gold": "x+1", "found": "1+x"})
        assert pool.defer(task).result().status == "correct"
        os.kill(stand_in.actors[0]._worker._process.pid, signal.SIGKILL)
        assert pool.defer(task).result().status == "correct"
    assert len(stand_in.actors) == 2
    assert all(actor._worker._process.poll() is not None for actor in stand_in.actors)


def test_a_late_worker_is_a_timeout_and_ends(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = "import sys, time\nfor line in sys.stdin:\n    'load' in line or time.sleep(60)\n    print('{}', flush=True)"
    monkeypatch.setattr(module, "COMMAND", (sys.executable, "-c", slow))
    with RayPool(1, deadline_seconds=0.3) as pool:
        assert pool.defer(Deferred("math", {"gold": "x", "found": "x"})).result().status == "timeout"
    assert stand_in.actors[0]._worker._process.poll() is not None


def test_without_ray_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"not installed; run pip install 'bloomery\[ray\]'"):
        open_pool("ray", 1)
    with open_pool("local", 1) as pool:
        assert type(pool) is Pool


def test_with_ray_itself() -> None:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
    try:
        with Pool(1) as local, RayPool(2) as pool:
            assert pool.judge_all(ITEMS * 3) == local.judge_all(ITEMS) * 3
            with pytest.raises(RuntimeError, match="failed on"):
                pool.defer(Deferred("math", {"no": "argument"})).result()
    finally:
        ray.shutdown()
