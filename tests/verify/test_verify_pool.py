"""Verdicts that need a worker process: mathematics, reasoning-gym, and everything that can go wrong with a process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bloomery import verify
from bloomery.errors import ArtifactError, BloomeryError, ConfigError
from bloomery.verify import Deferred, Pool, canaries
from bloomery.verify import pool as pool_module
from bloomery.verify.extract import boxes

DATA = Path(os.environ.get("BLOOMERY_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
SYMBOLIC = ("answer", "\\boxed{x+1}", "1+x")

FAKE_WORKER = """
import json, os, sys, time
log = sys.argv[1]
open(log, "a").write(f"{os.getpid()}\\n")
starts = len(open(log).read().split())
for line in sys.stdin:
    request = json.loads(line)
    found = request.get("arguments", {}).get("found", "")
    if found == "hang": time.sleep(60)
    if found == "die" or (found == "die once" and starts == 1): os._exit(1)
    reply = {"bug": "Traceback: oh"} if found == "bug" else {"status": "correct", "reason": ""}
    print(json.dumps(reply), flush=True)
"""


@pytest.fixture(scope="module")
def pool():
    with Pool(workers=1) as pool:
        yield pool


@pytest.fixture
def fake(tmp_path):
    """A command for a worker that does as it is told, and the process ids it has had."""
    log = tmp_path / "started"
    return (sys.executable, "-c", FAKE_WORKER, str(log)), lambda: [int(pid) for pid in log.read_text().split()]


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def task(found: str) -> Deferred:
    return Deferred("math", {"gold": "x", "found": found})


@pytest.mark.parametrize(
    ("found", "gold", "status"),
    [
        ("(x+1)^2", "x^2+2x+1", "correct"), ("(x+2)^2", "x^2+2x+1", "wrong"), ("\\sqrt{12}", "2\\sqrt{3}", "correct"),
        ("3, 1", "\\{1,3\\}", "correct"), ("(1,3)", "1<x<3", "correct"), ("1<x<3", "(1,3)", "wrong"),
        ("\\frac{\\sqrt3}2", "\\frac{\\sqrt{3}}{2}", "correct"), ("\\text{east}", "\\text{East}", "correct"),
        ("x+", "x+y", "parse_fail"), ("5\\pi", "5\\pi", "correct"), ("y=x", "x=y", "correct"),
        ("x\udcff", "x", "parse_fail"),
    ],
)  # fmt: skip
def test_mathematics(pool: Pool, found: str, gold: str, status: str):
    verdict = pool.submit("answer", rf"\boxed{{{found}}}", gold).result()
    assert verdict.status == status, verdict


def test_verdicts_come_in_the_order_of_the_items(pool: Pool):
    items = [("answer", rf"\boxed{{{k}x}}", f"x+{k - 1}x" if k % 2 else f"{k + 1}x") for k in range(2, 12)]
    items.insert(3, ("answer", "\\boxed{5}", "5"))
    items.insert(5, ("choice", "\\boxed{A}", "B"))
    scores = [verdict.score for verdict in pool.judge_all(items)]
    assert scores == [0, 1, 0, 1, 1, 0, 0, 1, 0, 1, 0, 1]


def test_simple_verdicts_start_nothing(fake):
    with Pool(command=fake[0]) as pool:
        assert [v.score for v in pool.judge_all([("answer", "\\boxed{5}", "5"), ("choice", "B", "B")])] == [1, 1]
        assert pool.submit("answer", "\\boxed{5}", "6").done()
    assert not Path(fake[0][-1]).exists()


def test_the_alarm_inside_the_worker_ends_a_slow_expression():
    """Unguarded, this power tower keeps math-verify busy for as long as it is allowed to."""
    with Pool(workers=1, deadline_seconds=30) as pool:
        pool.judge_all([SYMBOLIC])  # imports
        start = time.monotonic()
        verdict = pool.defer(Deferred("math", {"gold": "5", "found": "9^{9^{9^{9}}}"})).result()
        assert (verdict.score, verdict.status) == (0.0, "timeout")
        assert time.monotonic() - start < 15
        assert pool.judge_all([SYMBOLIC])[0].status == "correct", "the same worker goes on"


def test_a_hung_worker_is_killed_at_the_deadline(fake):
    command, started = fake
    with Pool(workers=1, deadline_seconds=0.5, command=command) as pool:
        start = time.monotonic()
        hung, after = pool.defer(task("hang")), pool.defer(task("fine"))
        assert (hung.result().score, hung.result().status) == (0.0, "timeout")
        assert after.result().status == "correct"
        assert time.monotonic() - start < 10
        first, second = started()
        assert gone(first)
        assert not gone(second)
    assert gone(second), "closing the pool leaves no process"


def test_a_worker_that_dies_is_replaced_and_the_item_tried_once_more(fake):
    command, started = fake
    with Pool(workers=1, command=command) as pool:
        assert pool.defer(task("die once")).result().status == "correct"
        assert len(started()) == 2


def test_an_item_that_kills_two_workers_is_missing_not_wrong(fake):
    command, started = fake
    with Pool(workers=1, command=command) as pool:
        verdict = pool.defer(task("die")).result()
        assert (verdict.score, verdict.status) == (None, "infra_error")
        assert pool.defer(task("fine")).result().score == 1.0
    assert len(started()) == 3
    assert all(gone(pid) for pid in started())


def test_a_bug_in_a_verifier_is_raised_not_scored(fake):
    with (
        Pool(workers=1, command=fake[0]) as pool,
        pytest.raises(RuntimeError, match="verifier 'math' failed on .*\n.*oh"),
    ):
        pool.defer(task("bug")).result()


def test_the_real_worker_reports_its_bugs():
    with Pool(workers=1) as pool, pytest.raises(RuntimeError, match="unexpected keyword argument 'extra'"):
        pool.defer(Deferred("math", {"gold": "x", "found": "x", "extra": ""})).result()


def test_a_worker_that_cannot_start_stops_the_run():
    with Pool(workers=1, command=("false",)) as pool, pytest.raises(BloomeryError, match=r"exit status 1.*run false"):
        pool.defer(task("x")).result()


def test_a_judge_that_cannot_be_loaded_stops_the_run():
    worker = 'import sys\nfor line in sys.stdin: print(\'{"bug": "No module named sympy"}\', flush=True)'
    with Pool(workers=1, command=(sys.executable, "-c", worker)) as pool, pytest.raises(BloomeryError, match="sympy"):
        pool.defer(task("x")).result()


def test_closing_does_not_wait_for_a_hung_item(fake):
    command, started = fake
    with Pool(workers=2, deadline_seconds=60, command=command) as pool:
        futures = [pool.defer(task("hang")) for _ in range(6)]
        while not Path(command[-1]).exists():
            time.sleep(0.01)
        start = time.monotonic()
    assert time.monotonic() - start < 5
    assert all(future.done() or future.cancelled() for future in futures)
    assert all(gone(pid) for pid in started())


def test_ctrl_c_ends_everything(fake, tmp_path):
    command, started = fake
    script = tmp_path / "run.py"
    script.write_text(
        "from bloomery.verify import Deferred, Pool\n"
        f"with Pool(workers=1, deadline_seconds=60, command={command!r}) as pool:\n"
        "    pool.defer(Deferred('math', {'gold': 'x', 'found': 'hang'})).result()\n"
    )
    run = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 20
    while not Path(command[-1]).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=10)
    assert b"KeyboardInterrupt" in errors
    assert all(gone(pid) for pid in started())


def test_a_worker_ends_when_its_parent_is_killed():
    real = "import os, time; from bloomery.verify import Pool\npool = Pool(workers=1)\n"
    real += f"pool.judge_all([{SYMBOLIC!r}])\nprint(next(iter(pool._alive))._process.pid, flush=True)\ntime.sleep(60)"
    run = subprocess.Popen([sys.executable, "-c", real], stdout=subprocess.PIPE)
    assert run.stdout is not None
    pid = int(run.stdout.readline())
    assert not gone(pid)
    run.kill()
    run.communicate()
    deadline = time.monotonic() + 10
    while not gone(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert gone(pid)


def test_gym_answers_need_a_score_of_exactly_one(pool: Pool):
    gold = json.dumps({"dataset": "gcd", "config": {}, "entry": {"question": "", "answer": "6", "metadata": {}}})
    for text, status in (("6", "correct"), ("6 or 66", "wrong"), ("66", "wrong"), ("x" * 10_001, "parse_fail")):
        assert pool.submit("gym", rf"\boxed{{{text}}}", gold).result().status == status, text


def test_a_scorer_that_raises_has_said_wrong(pool: Pool):
    entry = {"question": "", "answer": "2 × 3", "metadata": {"number": 6, "factors": [2, 3]}}
    gold = json.dumps({"dataset": "prime_factorization", "config": {}, "entry": entry})
    verdict = pool.submit("gym", "\\boxed{junk}", gold).result()
    assert verdict.status == "wrong"
    assert "ValueError" in verdict.reason


def test_gym_golds_are_checked():
    with pytest.raises(ArtifactError, match="dataset, config and entry"):
        verify.judge("gym", "\\boxed{1}", "1")
    gold = json.dumps({"dataset": "countdown", "config": {}, "entry": {}})
    with pytest.raises(ArtifactError, match="executes answers as Python code"):
        verify.judge("gym", "\\boxed{1}", gold)


def test_the_self_test_passes_and_finds_a_broken_verifier(monkeypatch):
    verify.self_test()
    monkeypatch.setattr(canaries, "judge", lambda *_: verify.Verdict.of("correct"))
    with pytest.raises(BloomeryError, match=r"answer judges .* as correct .*, expected wrong"):
        verify.self_test(["answer"])
    with pytest.raises(ConfigError, match="unknown"):
        verify.self_test(["nonsense"])


@pytest.mark.parametrize(
    ("found", "gold", "correct"),
    [
        ("I=2t", "I=2t", True), ("I=2t+2", "I=2(t+1)", True), ("I=7", "I=2t", False), ("I_0=7", "I=2t", False),
        ("2t", "I=2t", True), ("7", "I=2t", False), ("3+4i", "4i+3", True), ("E=mc^2", "E=mc^2", True),
        ("E=7", "E=mc^2", False), ("e^{-x^2}", "\\frac{1}{e^{x^2}}", True), ("e^{x^2}", "e^{-x^2}", False),
    ],
)  # fmt: skip
def test_names_that_are_constants_elsewhere(found: str, gold: str, correct: bool):
    assert verify.judge("answer", rf"\boxed{{{found}}}", gold).correct == correct


def test_judge_shares_one_worker():
    assert verify.judge(*SYMBOLIC).score == 1.0
    assert verify.judge("answer", "\\boxed{x+2}", "1+x").score == 0.0
    assert len(pool_module._shared_pool()._alive) == 1


needs_data = pytest.mark.skipif(
    not (DATA / "math" / "math_test.jsonl").exists(), reason=f"no real data under {DATA}; set BLOOMERY_DATA"
)


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / "math" / name).read_text(encoding="utf-8").splitlines()]


@needs_data
def test_every_gsm8k_answer_verifies_itself(pool: Pool):
    golds = [row["answer"].rpartition("####")[2].strip() for row in rows("gsm8k_test.jsonl")]
    verdicts = pool.judge_all([("answer", verify.echo("answer", gold), gold) for gold in golds])
    assert len(verdicts) == 1319
    assert all(verdict.score == 1.0 for verdict in verdicts)


@needs_data
def test_math_answers_verify_themselves(pool: Pool):
    golds = [(boxes(row["solution"]) or [""])[-1] for row in rows("math_test.jsonl")[::13]]
    verdicts = pool.judge_all([("answer", verify.echo("answer", gold), gold) for gold in golds])
    assert sum(verdict.score == 1.0 for verdict in verdicts) >= 0.995 * len(golds)
    shifted = pool.judge_all([("answer", rf"\boxed{{{gold}+1}}", gold) for gold in golds])
    assert not any(verdict.score for verdict in shifted), "an answer that is one too large is never right"
