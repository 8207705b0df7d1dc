"""Device, precision and threads, chosen once and recorded."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` takes CUDA, then Apple's MPS, then the CPU; any other name is PyTorch's own."""
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
        else:
            name = "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # meta holds no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used here ({reason}); use auto, cpu, cuda or mps") from None
    return device


@contextmanager
def exact() -> Iterator[None]:
    """Computation that repeats itself: cuDNN deterministic (same settings, same tables), float32 in full.

    Neither convolutions nor matrix products round to TF32 or bfloat16. The process's own flags come back afterwards.
    Also usable as a decorator.
    """
    cudnn = torch.backends.cudnn
    switches = _precision_switches()
    deterministic, precisions = cudnn.deterministic, [switch.fp32_precision for switch in switches]
    tf32, matmul = _agreed(lambda: cudnn.allow_tf32), _agreed(torch.get_float32_matmul_precision)
    try:
        cudnn.deterministic = True
        if tf32:
            cudnn.allow_tf32 = False
        if matmul not in (None, "highest"):
            torch.set_float32_matmul_precision("highest")
        for switch in switches:
            if switch.fp32_precision not in ("ieee", "none"):  # what is full already goes on following its parent
                switch.fp32_precision = "ieee"
        yield
    finally:
        cudnn.deterministic = deterministic
        if tf32:
            cudnn.allow_tf32 = tf32
        if matmul not in (None, "highest"):
            torch.set_float32_matmul_precision(matmul)
        for switch, precision in zip(switches, precisions, strict=True):
            if switch.fp32_precision != precision:
                switch.fp32_precision = precision


def _precision_switches() -> list[Any]:
    """Objects whose ``fp32_precision`` is that of one kind of operation; none before PyTorch 2.9."""
    backends: Any = torch.backends
    if not hasattr(backends, "fp32_precision"):
        return []
    cudnn, mkldnn = backends.cudnn, backends.mkldnn
    return [cudnn.conv, cudnn.rnn, backends.cuda.matmul, mkldnn.conv, mkldnn.matmul]


def _agreed(read: Callable[[], T]) -> T | None:
    """An older flag; None where the switches were set otherwise, when PyTorch refuses to read it."""
    try:
        return read()
    except RuntimeError:
        return None


def training_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The autocast type of training: ``auto`` is bfloat16 on a GPU that computes it natively, else float32.

    So a CPU's numbers do not depend on whether it has bfloat16, though they do on its rounding. Only training uses it;
    embeddings, prototypes and explanations are always float32.
    """
    match precision, device.type:
        case "float32", _:
            native = False
        case "bfloat16", _:
            native = True
        case "auto", "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        case "auto", _:
            native = False
        case _:
            raise ValueError(f"precision must be auto, float32 or bfloat16, got {precision!r}")
    return torch.bfloat16 if native else torch.float32


def set_threads(count: int) -> int:
    """Fix PyTorch's CPU threads (0: as the environment says); returns the number in force, at most one per core.

    The order of floating-point sums follows the number of threads, so it is part of a run's settings.
    """
    if count < 0:
        raise ValueError(f"threads must be 0 or more, got {count}")
    if count:
        torch.set_num_threads(min(count, os.cpu_count() or count))
    return torch.get_num_threads()


def peak_memory() -> float:
    """The most memory this process has held so far, in GiB: of the GPU where there is one, else of the machine."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def machine() -> str:
    """Chip and PyTorch version in a few words, to stand beside measured times."""
    chip = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return f"{chip}, PyTorch {torch.__version__}"
