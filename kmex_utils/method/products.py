"""What depends on the chip: which of several ways to the same numbers is fast, and why.

Measured in PyTorch 2.15, float32, one thread, on an AMD EPYC with AVX-512 (1 MiB of cache a core, 32 MiB shared) or,
where it is said, with AVX2. None of it changes a result beyond the order in which a sum is rounded.
"""

import torch

# Share of changed labels below which a step of k-means sums single rows instead of a matrix product: 3,920 rows of
# 896, K = 10, ten restarts: 2.8 against 3.2 ms at 0.25, as fast at 0.3. With AVX2 they meet at 0.12, but a whole fit is
# no faster for it (1.95 s at 0.25, 2.05 at 0.1).
FEW = 0.25

# Rows and prototypes that an explanation map compares at a time: 2 MiB of float32. B4, B34 and B234 of an image then
# take 0.26 of a forward pass, in 8 MiB at a time 0.30 (AVX2); in 50 MiB twice as long. Not measured on a GPU.
MAP_ROWS, MAP_PROTOTYPES = 1024, 512


def rows_per_chunk(device: torch.device) -> int:
    """Rows that k-means works on at a time.

    With AVX2 a fit of 23,520 rows takes 3.5 s and 22 MiB; with 2,048 rows 4.3 s, with 8,192 3.9 s and 36 MiB. A GPU
    needs more to be busy; that number is not measured.
    """
    return 4096 if device.type == "cpu" else 65_536


def double_device(device: torch.device) -> torch.device:
    """Where k-means runs: it sums in float64, which Apple's MPS lacks, so the CPU stands in for that."""
    return torch.device("cpu") if device.type == "mps" else device


def dots(x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """X Pᵀ, [rows, K], for x [rows, D] and p [K, D].

    PyTorch's matrix product is MKL's, which leaves half of the vector units of an AMD chip with AVX-512 idle (95 GF/s).
    oneDNN's, as a 1 x 1 convolution, reached 149 with 128 prototypes and 211 with 2,000; with 64 nothing was gained.
    This is the operator by which ``torch.compile`` calls it; of columns of a larger matrix it makes a slow loop, hence
    the copy.
    """
    few = len(p) < 128 or p.dtype != torch.float32 or p.device.type != "cpu"
    if few or torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return x @ p.T
    return torch.ops.mkldnn._linear_pointwise(x, p.contiguous(), None, "none", [], "")


def index_type(k: int) -> torch.dtype:
    """The type that indices below k are kept in: half the memory where two bytes hold them."""
    return torch.int16 if k < 2**15 else torch.int32
