"""The CPU kernels of kernels.cpp: built with the machine's own C++ compiler at first use, kept for the next process.

Without a compiler, with `BLOOMERY_NATIVE=0`, on another device or in another dtype than float32, callers take their
plain PyTorch form, with the same results within rounding.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from ctypes import byref, c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bloomery.progress import say

_SOURCE = Path(__file__).with_name("kernels.cpp")
_COMPILE = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-fopenmp", "-c"]
_WIDE = ["-mprefer-vector-width=512"]  # x86 only; without it the compiler stays at 256 bits
_BUILD_SECONDS = 300
MOST_TAPS = 16


class AttentionSizes(ctypes.Structure):
    """`Attention` of kernels.cpp: `tokens` is the stride of a head's channels in the keys, the others that of a row."""

    _fields_ = [
        *((name, c_int64) for name in ("rows", "heads", "key_heads", "head_dim", "tokens", "key_row", "value_row")),
        *((name, c_int64) for name in ("angle_row", "window")),
        ("norm_eps", c_float),
        ("scale", c_float),
    ]


class MambaSizes(ctypes.Structure):
    """`Mamba` of kernels.cpp; low and high bound dt."""

    _fields_ = [
        *((name, c_int64) for name in ("rows", "tokens", "heads", "head_dim", "groups", "state", "taps")),
        *((name, c_int64) for name in ("conv_row", "ssm_row")),
        *((name, c_float) for name in ("eps", "low", "high")),
    ]


class MambaWeights(ctypes.Structure):
    """`MambaWeights` of kernels.cpp: addresses, which live as long as the tensors they were taken from."""

    _fields_ = [(name, c_void_p) for name in ("taps", "bias", "dt_bias", "A", "D")]


def serves(*tensors: Tensor) -> bool:
    """Whether the kernels can work on these tensors, here and now."""
    plain = all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
    return plain and not torch.is_grad_enabled() and library() is not None


def unit_length(x: Tensor, eps: float) -> Tensor:
    """`folded.to_unit_length` over the last dimension of a contiguous x."""
    out = torch.empty_like(x)
    size = x.shape[-1]
    _call("unit_length", x.data_ptr(), out.data_ptr(), x.numel() // size, size, eps, torch.get_num_threads())
    return out


def activate(x: Tensor, gated: bool, squared: bool) -> Tensor:
    """SiLU, or max(0, x)², of x (rows, size); gated: of the first half, times the second."""
    rows, size = len(x), x.shape[1] // (2 if gated else 1)
    out = x.new_empty(rows, size)
    _call("activate", x.data_ptr(), out.data_ptr(), rows, size, gated, squared, torch.get_num_threads())
    return out


def attend(
    sizes: AttentionSizes,
    qkv: Tensor,
    angles: tuple[Tensor, Tensor] | None,
    norm: Tensor | None,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
) -> Tensor:
    """Appends each row's key and value at `lengths` and attends to the row's tokens: (rows, heads · head_dim).

    `qkv` (rows, all heads · head_dim) is overwritten; `angles` cos and sin with one row for all or one each.
    """
    sizes.rows, sizes.tokens = len(qkv), keys.stride(2)
    sizes.key_row, sizes.value_row = keys.stride(0), values.stride(0)
    cos, sin = (None, None) if angles is None else (angle.data_ptr() for angle in angles)
    sizes.angle_row = 0 if angles is None or len(angles[0]) == 1 else angles[0].stride(0)
    out = qkv.new_empty(len(qkv), sizes.heads * sizes.head_dim)
    _call(
        "attend", byref(sizes), qkv.data_ptr(), cos, sin, None if norm is None else norm.data_ptr(), keys.data_ptr(),
        values.data_ptr(), lengths.data_ptr(), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def mamba(
    sizes: MambaSizes, weights: MambaWeights, x: Tensor, conv: Tensor, ssm: Tensor, lengths: Tensor | None
) -> Tensor:
    """Everything between in_proj and out_proj, but for the norm's weight: x (rows, tokens, in_proj) → (rows, tokens,
    inner). `conv` and `ssm` move on; tokens from `lengths` (rows,) on are padding and give 0."""
    sizes.rows, sizes.tokens = x.shape[:2]
    sizes.conv_row, sizes.ssm_row = conv.stride(0), ssm.stride(0)
    out = x.new_empty(*x.shape[:2], sizes.heads * sizes.head_dim)
    _call(
        "mamba", byref(sizes), byref(weights), x.data_ptr(), conv.data_ptr(), ssm.data_ptr(),
        None if lengths is None else lengths.data_ptr(), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def draw(logits: Tensor, uniforms: Tensor, temperatures: Tensor, greedy: Tensor) -> tuple[Tensor, Tensor]:
    """A token a row of logits (rows, vocab), and its log-probability, each (rows, 1); see `generate.sampling`.

    uniforms (rows, 1) float64, temperatures (rows,) float32, greedy (rows,) bool.
    """
    rows, vocab = logits.shape
    tokens, logprobs = torch.empty(rows, 1, dtype=torch.int64), torch.empty(rows, 1)
    _call(
        "draw", logits.data_ptr(), rows, vocab, uniforms.data_ptr(), temperatures.data_ptr(), greedy.data_ptr(),
        tokens.data_ptr(), logprobs.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return tokens, logprobs


def _call(name: str, *arguments: Any) -> None:
    built = library()
    assert built is not None, "callers ask `serves` first"
    getattr(built, name)(*arguments)


@cache
def library() -> ctypes.CDLL | None:
    """The built kernels, or `None` after saying why there are none."""
    if os.environ.get("BLOOMERY_NATIVE") == "0":
        return None
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "c++", "clang++"))), None)
    if compiler is None:
        say("no C++ compiler: text is generated by plain PyTorch, which is slower; install g++ to change that")
        return None
    flags = _COMPILE + (_WIDE if platform.machine() in ("x86_64", "AMD64") else [])
    name = f"kernels-{_digest(_SOURCE.read_text(), compiler, *flags, _processor())}.so"
    try:
        folder = _folder()
        if not (folder / name).exists():
            _build(compiler, flags, folder / name)
        return _declared(ctypes.CDLL(str(folder / name)))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        say(f"the CPU kernels do not build, text is generated by plain PyTorch, which is slower: {reason}")
        return None


def _folder() -> Path:
    """Where built kernels are kept: the user's cache, or where that cannot be written a place of this process."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    try:
        (base / "bloomery").mkdir(parents=True, exist_ok=True)
        if os.access(base / "bloomery", os.W_OK):
            return base / "bloomery"
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="bloomery-"))


def _build(compiler: str, flags: Sequence[str], target: Path) -> None:
    """Compiles beside the target and renames: two processes at once do the work twice, and no harm.

    OpenMP is left to be found at loading: torch has brought a runtime, and two of them in a process are one too many.
    """
    say("building the CPU kernels for generating text (once, some seconds)")
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        compiled, linked = f"{folder}/kernels.o", f"{folder}/kernels.so"
        for command in ([*flags, str(_SOURCE), "-o", compiled], ["-shared", compiled, "-o", linked]):
            subprocess.run([compiler, *command], check=True, capture_output=True, text=True, timeout=_BUILD_SECONDS)
        os.replace(linked, target)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """What `-march=native` depends on: a cache folder may be shared by machines."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _declared(built: ctypes.CDLL) -> ctypes.CDLL:
    sizes = [c_int64, c_int64]
    built.unit_length.argtypes = [c_void_p, c_void_p, *sizes, c_float, c_int]
    built.activate.argtypes = [c_void_p, c_void_p, *sizes, c_int, c_int, c_int]
    built.attend.argtypes = [c_void_p, *[c_void_p] * 8, c_int]
    built.mamba.argtypes = [c_void_p, c_void_p, *[c_void_p] * 5, c_int]
    built.draw.argtypes = [c_void_p, *sizes, *[c_void_p] * 5, c_int]
    for function in (built.unit_length, built.activate, built.attend, built.mamba, built.draw):
        function.restype = None
    return built
