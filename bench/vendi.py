"""The Vendi score of vectors of 1,024 numbers against the `vendi-score` package 0.0.3, in one process, CPU seconds.

`vendi/5000`: of 5,000 float64 rows, against its `score_X`, which takes the eigenvalues of the 5,000 × 5,000 kernel;
both give the same to 1e-6. `vendi/5000_dual`: against its `score_dual`, which like ours takes the smaller matrix.
`vendi/million`: a million float16 sketches block by block, as they come from disk, against `score_dual` of 65,536
float32 rows (it holds all rows in memory, so a million would need 12 GB); rows per second. What it took is told on
stderr.
The package is installed alone, without dependencies, into a temporary folder.
`python -m bench.vendi [--quick]` prints one JSON line per figure; ratio > 1: ours is faster.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.figure import figure
from bloomery.synthesize import vendi
from bloomery.synthesize.vendi import Moments

DIM, ROWS, MILLION, BLOCK = 1024, 5000, 1_000_000, 65_536
PACKAGE = "vendi-score==0.0.3"


def package() -> Any:
    """The peer's module."""
    folder = Path(tempfile.gettempdir()) / "bloomery-vendi-score"
    if not (folder / "vendi_score").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), PACKAGE]
        subprocess.run(command, check=True, stdout=sys.stderr)
    sys.path.append(str(folder))
    import vendi_score.vendi

    return vendi_score.vendi


def rows(count: int) -> np.ndarray:
    """Forty directions of uneven weight and noise, float64."""
    draw = np.random.default_rng(0)
    modes = draw.normal(size=(40, DIM))
    chosen = draw.choice(40, count, p=np.arange(1, 41) / 820)
    return modes[chosen] + draw.normal(size=(count, DIM))


def ours(data: np.ndarray) -> float:
    """Normalised here, as the package does."""
    return vendi.score(vendi.spectrum(Moments.of(data).density))


def rate(count: int, run: Callable[[], object]) -> float:
    """Rows per second of processor time."""
    start = time.process_time()
    run()
    return count / (time.process_time() - start)


def at_five_thousand(peer: Any, repeats: int) -> list[dict[str, object]]:
    """Both of the package's ways."""
    data, found = rows(ROWS), []
    for name, score in (("vendi/5000", peer.score_X), ("vendi/5000_dual", peer.score_dual)):
        assert abs(score(data) - ours(data)) < 1e-6, "both give the same"
        pairs = [(rate(ROWS, lambda: ours(data)), rate(ROWS, lambda s=score: s(data))) for _ in range(repeats)]
        found.append(figure(name, *zip(*pairs, strict=True), "rows/s", {"vendi-score": "0.0.3"}))
    return found


def of_a_million(peer: Any, total: int) -> dict[str, object]:
    """One turn: moments, spectrum and score of `total` rows in blocks."""
    single = rows(BLOCK).astype(np.float32)
    theirs = rate(BLOCK, lambda: peer.score_dual(single))
    block = single.astype(np.float16)

    def run() -> None:
        moments = Moments.empty(DIM)
        for start in range(0, total, BLOCK):
            moments.add(block[: min(BLOCK, total - start)])
        vendi.score(vendi.spectrum(moments.density))

    wall, mine = time.monotonic(), rate(total, run)
    seconds, peak = time.monotonic() - wall, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{total:,} rows: {total / mine:.1f} s of processor time, {seconds:.1f} s, peak {peak:.2f} GiB, "
          "the peer's rows included", file=sys.stderr)  # fmt: skip
    return figure("vendi/million", [mine], [theirs], "rows/s", {"vendi-score": "0.0.3"})


def main() -> None:
    quick, peer = "--quick" in sys.argv, package()
    print(json.dumps(of_a_million(peer, MILLION // 10 if quick else MILLION)), flush=True)
    for each in at_five_thousand(peer, 1 if quick else 5):
        print(json.dumps(each), flush=True)


if __name__ == "__main__":
    main()
