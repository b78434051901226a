"""How near a real training step (the library's own loop) comes to the fastest matrix product of the same machine.

The limit is measured in the same run, in turns with the steps. On a CPU it is the faster of float32 and bf16, whichever
type the step computes in, which is the harder reading; on a GPU it is bf16.
"""

import statistics
import time
from collections.abc import Callable, Iterator

import torch

from bench.figure import figure
from bloomery.model import gpu
from bloomery.model.config import ModelConfig
from bloomery.model.decoder import Decoder
from bloomery.train.loop import LoopConfig, TrainState, steps
from bloomery.train.losses import next_token
from bloomery.train.optim import adamw

MATMUL_SIZES = {"cpu": 2048, "cuda": 8192}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BEST_OF = 3


def limit(
    name: str, config: ModelConfig, batch: int, seq: int, repeats: int, device: str = "cpu", precision: str = "auto"
) -> dict[str, object]:
    """One figure: GFLOP/s of the step, by `config.flops_per_token`, over that of the fastest matrix product."""
    step, clock = training(config, batch, seq, device, precision), CLOCKS[device]
    work = config.flops_per_token(seq) * batch * seq / 1e9
    rates: dict[str, list[float]] = {"step": [], "fp32": [], "bf16": []}
    for _ in range(repeats + 1):
        for dtype in DTYPES if device == "cpu" else ["bf16"]:
            rates[dtype].append(matmul_rate(DTYPES[dtype], MATMUL_SIZES[device], device))
        rates["step"].append(work / timed(lambda: next(step), clock))
    rates = {side: found[1:] for side, found in rates.items() if found}  # the first is warm-up
    measured = {dtype: statistics.median(found) for dtype, found in rates.items() if dtype != "step"}
    fastest = max(measured, key=measured.__getitem__)
    extra = {f"limit_{dtype}": round(rate, 1) for dtype, rate in measured.items()}
    extra |= {
        f"ratio_to_{dtype}": round(statistics.median(rates["step"]) / rate, 3) for dtype, rate in measured.items()
    }
    sizes = {"parameters": config.count_parameters(), "tokens_per_step": batch * seq, "precision": precision}
    tokens = round(statistics.median(rates["step"]) * 1e9 / config.flops_per_token(seq), 1)
    return figure(name, rates["step"], rates[fastest], "GFLOP/s") | extra | sizes | {"tokens_per_second": tokens}


def training(config: ModelConfig, batch: int, seq: int, device: str, precision: str) -> Iterator[object]:
    """Steps of the library's loop on random tokens, at the model's first weights."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Decoder(config)
    if device == "cuda":
        gpu.apply(model)
    loop = LoopConfig(max_steps=10**6, batch_size=batch, learning_rate=1e-4, schedule="constant", precision=precision)
    tokens = torch.randint(config.vocab_size, (batch, seq + 1), device=device)
    batches = iter(lambda: [{"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}], None)
    return steps(TrainState(model, adamw(model, loop)), batches, next_token, loop)


def matmul_rate(dtype: torch.dtype, size: int, device: str) -> float:
    """GFLOP/s of a square product, the best of some."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / 1e9 / min(timed(lambda: left @ right, CLOCKS[device]) for _ in range(BEST_OF + 1))


def timed(run: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds that it took."""
    start = clock()
    run()
    return clock() - start


def _gpu_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


CLOCKS: dict[str, Callable[[], float]] = {"cpu": time.process_time, "cuda": _gpu_clock}
