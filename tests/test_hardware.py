"""The process's flags are set while it computes, and come back, by whichever interface they were set."""

import multiprocessing

import pytest
import torch

PROGRAM = """
import torch
from kmex_utils.hardware import exact

backends = torch.backends
{setting}


def read(flag):
    try:
        return flag()
    except RuntimeError:
        return "not to be read"


def flags():
    cudnn, matmul = backends.cudnn, backends.cuda.matmul
    older = (lambda: cudnn.allow_tf32, lambda: matmul.allow_tf32, torch.get_float32_matmul_precision)
    values = [cudnn.deterministic, cudnn.enabled, cudnn.benchmark, *map(read, older)]
    if hasattr(backends, "fp32_precision"):
        parts = backends, cudnn.conv, cudnn.rnn, matmul, backends.mkldnn.conv, backends.mkldnn.matmul
        values += [part.fp32_precision for part in parts]
    return values


@exact()
def computed():
    assert backends.cudnn.deterministic
    if hasattr(backends, "fp32_precision"):
        of = backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul, backends.mkldnn.conv, backends.mkldnn.matmul
        assert all(part.fp32_precision in ("ieee", "none") for part in of), flags()
    else:
        assert not backends.cudnn.allow_tf32
    assert read(torch.get_float32_matmul_precision) == "highest"
    assert read(lambda: backends.cuda.matmul.allow_tf32) is False
    return flags()


before = flags()
inside = computed()
assert flags() == before, (before, flags())
try:
    with exact():
        assert computed() == inside
        assert flags() == inside, "within another"
        raise KeyboardInterrupt
except KeyboardInterrupt:
    assert flags() == before, (before, flags())
"""


@pytest.mark.parametrize(
    "setting",
    [
        "",
        "backends.cudnn.deterministic = backends.cudnn.benchmark = True",
        "torch.set_float32_matmul_precision('high')",
        "torch.set_float32_matmul_precision('medium'); backends.cudnn.allow_tf32 = False",
        "backends.fp32_precision = 'ieee'",
        "backends.fp32_precision = 'tf32'",
        "backends.cuda.matmul.fp32_precision = 'tf32'; backends.cudnn.conv.fp32_precision = 'ieee'",
    ],
)
def test_exact_computation_leaves_the_flags_as_they_were(setting):
    if "fp32_precision" in setting and not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("an interface of later PyTorch")
    child = multiprocessing.get_context("fork").Process(target=exec, args=(PROGRAM.format(setting=setting), {}))
    child.start()
    child.join()
    assert child.exitcode == 0
