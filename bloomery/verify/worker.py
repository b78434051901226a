"""The process that does what may hang: `python -m bloomery.verify.worker`.

One JSON request a line on standard input, one JSON reply a line on standard output: first `{"load": judge}`, which
takes as long as the imports take, then `{"judge": …, "arguments": …, "seconds": …}` under an alarm. It ends when its
input closes; the kernel ends it when one item uses far more processor time than allowed, even where no parent is left.
"""

import importlib
import json
import logging
import os
import signal
import sys
import traceback
from typing import IO, Any

from bloomery.errors import SandboxError
from bloomery.verify.verdict import Verdict

JUDGES = {
    "math": ("bloomery.verify.symbolic", "math"),
    "gym": ("bloomery.verify.gym", "score"),
    "program": ("bloomery.verify.program", "score"),
}
LIMITS_ITSELF = {"program"}
"""Judges that work behind limits of their own: every case of a program has its time."""

ALARM_SECONDS = 3.0  # of processor time: a busy machine makes no right answer late


class _Alarm(BaseException):
    """Not an `Exception`: the libraries called here catch those."""


def main() -> None:
    """Serve until the input ends."""
    replies = _private_stdout()
    signal.signal(signal.SIGVTALRM, _ring)
    logging.disable(logging.CRITICAL)
    for line in sys.stdin:
        json.dump(_reply(json.loads(line)), replies)
        replies.write("\n")
        replies.flush()


def _private_stdout() -> IO[str]:
    """The pipe to the parent; what libraries print goes to standard error instead."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return replies


def _ring(*_: object) -> None:
    raise _Alarm


def _reply(request: dict[str, Any]) -> dict[str, str]:
    try:
        if "load" in request:
            importlib.import_module(JUDGES[request["load"]][0])
            return {"loaded": request["load"]}
        verdict = _judge(request)
    except SandboxError as error:
        return {"refused": str(error)}
    except Exception:  # noqa: BLE001 - sent to the parent, which raises it
        return {"bug": traceback.format_exc()}
    return {"status": verdict.status, "reason": verdict.reason}


def _judge(request: dict[str, Any]) -> Verdict:
    module, name = JUDGES[request["judge"]]
    function = getattr(importlib.import_module(module), name)
    if request["judge"] in LIMITS_ITSELF:
        return function(**request["arguments"])
    # SIGPROF keeps its default action, which ends the process: nothing else stops a long call into C.
    signal.setitimer(signal.ITIMER_PROF, 2 * request["seconds"] + ALARM_SECONDS)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, ALARM_SECONDS)
        return function(**request["arguments"])
    except _Alarm:
        return Verdict.of("timeout", f"no verdict within {ALARM_SECONDS:g} s of processor time")
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    main()
