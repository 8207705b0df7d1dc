"""What depends on the chip: which of several ways to the same numbers is fast, and why.

Measured on an AMD EPYC with AVX-512 (1 MiB of cache a core, 32 MiB shared) and PyTorch 2.15, float32, one thread
unless said otherwise. None of it changes a result beyond the order in which a sum is rounded.
"""

import torch
import torch.nn.functional as F

# Entries of A_h ⊗ A_w up to which one product with it beats one along each axis. Up, 100 maps: 7² to 14² (9,604
# entries) 0.15 against 0.22 ms, 4² to 28² (12,544) 0.09 against 0.08. Down: 28² to 7² (38,416) 0.27 against 0.34 ms,
# 28² to 14² (153,664) 0.87 against 0.25. (Two threads.)
SMALL_UP, SMALL_DOWN = 10_000, 40_000

# Share of changed labels below which a step of k-means sums single rows instead of a matrix product: 3,920 rows of
# 896, K = 10, ten restarts: 2.8 against 3.2 ms at 0.25, as fast at 0.3.
FEW = 0.25

# Rows and prototypes that an explanation map compares at a time: 8 MiB of float32, which stay in the shared cache
# whatever the number of either. In 50 MiB at a time a map takes twice as long.
MAP_ROWS, MAP_PROTOTYPES = 1024, 2048


def rows_per_chunk(device: torch.device) -> int:
    """Rows that k-means works on at a time.

    On a CPU 2,048 to 8,192 are equally fast (257 to 285 ms a fit; 16,384: 311). A GPU needs more to be busy; that
    number is not measured.
    """
    return 4096 if device.type == "cpu" else 65_536


def double_device(device: torch.device) -> torch.device:
    """Where k-means runs: it sums in float64, which Apple's MPS lacks, so the CPU stands in for that."""
    return torch.device("cpu") if device.type == "mps" else device


def dots(p: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """P xᵀ, [K, rows], for p [K, D] and x [rows, D].

    PyTorch's matrix product is MKL's, which leaves half of an AMD chip's vector units idle (95 GF/s). oneDNN computes
    the same as a 1 x 1 convolution, prototypes as pixels of images and rows as filters: 149 GF/s with 128
    prototypes, 211 with 2,000; with 64 nothing is gained. With one thread PyTorch takes oneDNN for 16 images and more,
    so there are 16 where K can be divided by it.
    """
    few = len(p) < 128 or p.dtype != torch.float32
    if few or p.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return p @ x.T
    images = 16 if len(p) % 16 == 0 else 1
    pixels = p.reshape(images, 1, -1, p.shape[1]).permute(0, 3, 1, 2)
    return F.conv2d(pixels, x[:, :, None, None]).permute(0, 2, 3, 1).reshape(len(p), -1)


def index_type(k: int) -> torch.dtype:
    """The type that indices below k are kept and compared in: half the memory where two bytes hold them."""
    return torch.int16 if k < 2**15 else torch.int32


def argmax(values: torch.Tensor) -> torch.Tensor:
    """Index of the largest along dimension 1, [n, K, m] -> [n, m], ties to the lowest.

    Maximum, comparison and maximum again: 0.2 ms for 10 x 10 x 4,096, where PyTorch's own search takes 5.4 (two
    threads).
    """
    k = values.shape[1]
    code = torch.arange(k, 0, -1, dtype=index_type(k), device=values.device)
    hit = values == values.amax(1, keepdim=True)
    return k - (hit * code[:, None]).amax(1).long()


def largest(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest along dimension 0 and its index, [K, rows] -> [rows] each, ties to the lowest.

    Of each group of 16 only the maximum is looked at, then only the best group of each row: with the product before it
    61 to 66 ms for 2,000 prototypes and 6,272 rows, for any group from 4 to 80; without groups 72 to 80.
    """
    group = 16 if len(values) % 16 == 0 else 1
    groups = values.unflatten(0, (-1, group))  # [groups, in each, rows]
    value, best = groups.amax(1).max(0)
    within = groups.gather(0, best.expand(1, group, -1))[0].max(0).indices
    return value, best * group + within
