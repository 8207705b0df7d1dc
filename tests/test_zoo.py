"""The independent check of heads against modules whose answer is known, and the sweep over architectures."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kmex_utils import paths

sys.path.insert(0, str(paths.ROOT / "benchmarks"))
import architectures
import heads

D, C = 12, 5


class Tiny(nn.Module):
    """A convolution and what a subclass makes of its map h."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Conv2d(3, D, 3, 2), nn.ReLU())
        self.norm, self.batch_norm, self.fc, self.other = nn.LayerNorm(D), nn.BatchNorm1d(D), *self.two(nn.Linear, D, C)
        self.conv, self.hidden = nn.Conv2d(D, C, 1), nn.Linear(D, D)

    @staticmethod
    def two(kind, *sizes):
        return kind(*sizes), kind(*sizes)

    def forward(self, x):
        h = self.encoder(x)
        return type(self).head(self, h, h.flatten(2).mT)


def attended(m, tokens):
    weight = (tokens @ m.hidden.weight[:1].T).softmax(1)
    return (weight.mT @ tokens).flatten(1)


# of m, the map h [N, D, H, W] and its tokens [N, H·W, D]
SPELLINGS = {
    "adaptive": lambda m, h, t: m.fc(F.adaptive_avg_pool2d(h, 1).flatten(1)),
    "mean": lambda m, h, t: m.fc(h.mean((2, 3))),
    "mean twice": lambda m, h, t: m.fc(h.mean(3).mean(2)),
    "sum": lambda m, h, t: m.fc(h.sum((2, 3)) / h[0, 0].numel()),
    "avg_pool2d": lambda m, h, t: m.fc(F.avg_pool2d(h, h.shape[2:]).flatten(1)),
    "einsum": lambda m, h, t: torch.einsum("nphd,cd->nc", h.permute(0, 2, 3, 1), m.fc.weight / h[0, 0].numel()),
    "depthwise convolution": lambda m, h, t: m.fc(
        F.conv2d(h, torch.ones(D, 1, *h.shape[2:]) / h[0, 0].numel(), groups=D).flatten(1)
    ),
    "channels last": lambda m, h, t: m.fc(h.permute(0, 2, 3, 1).mean((1, 2))),
    "tokens": lambda m, h, t: m.fc(t.mean(1)),
    "matmul without bias": lambda m, h, t: t.mean(1) @ m.fc.weight.T,
    "changed in place": lambda m, h, t: m.fc(h.mul_(2).mean((2, 3))),
    "convolution behind": lambda m, h, t: m.conv(h.mean((2, 3), keepdim=True)).flatten(1),
    "bias added by hand": lambda m, h, t: t.mean(1) @ m.fc.weight.T + m.fc.bias,
    "dropout": lambda m, h, t: m.fc(F.dropout(h.mean((2, 3)), 0.5, m.training)),
}
CONVOLUTIONS = {
    "convolution": lambda m, h, t: m.conv(h).mean((2, 3)),
    "linear on tokens": lambda m, h, t: m.fc(t).mean(1),
    "linear, channels last": lambda m, h, t: m.fc(h.permute(0, 2, 3, 1)).mean((1, 2)),
}
BATCH_NORMS = {
    "module": lambda m, h, t: m.fc(m.batch_norm(h.mean((2, 3)))),
    "by hand": lambda m, h, t: m.fc(t.mean(1) * m.norm.weight - m.norm.bias),
}
AVERAGED = {
    "two heads": lambda m, h, t: (m.fc(t.mean(1)) + m.other(t.mean(1))) / 2,
    "each after BatchNorm": lambda m, h, t: (m.fc(m.batch_norm(t.mean(1))) + m.other(h.mean((2, 3)) * 3)) / 2,
}
NORMS = {
    "LayerNorm": lambda m, h, t: m.fc(m.norm(h.mean((2, 3)))),
    "by hand": lambda m, h, t: m.fc(F.layer_norm(t.mean(1, keepdim=True), (D,)).flatten(1)),
    "RMSNorm": lambda m, h, t: m.fc(F.rms_norm(t.mean(1), (D,), m.norm.weight)),
    "cosine": lambda m, h, t: F.normalize(t.mean(1)) @ F.normalize(m.fc.weight).T,
}
MLPS = {
    "relu": lambda m, h, t: m.fc(m.hidden(t.mean(1)).relu()),
    "gated": lambda m, h, t: m.fc(t.mean(1) * m.hidden(t.mean(1)).sigmoid()),
}
# and what the head reads instead
NOT = {
    "max": (lambda m, h, t: m.fc(h.amax((2, 3))), "amax of"),
    "max and mean": (lambda m, h, t: m.fc(h.amax((2, 3)) + h.mean((2, 3))), "amax of"),
    "one token": (lambda m, h, t: m.fc(t[:, 0]), "select of"),
    "attention": (lambda m, h, t: m.fc(attended(m, t)), "bmm of"),
    "flattened": (lambda m, h, t: F.linear(h.flatten(1), torch.ones(C, h[0].numel()).tril()), "view of"),
    "power mean": (lambda m, h, t: m.fc(h.square().mean((2, 3)).sqrt() + h.mean((2, 3))), "means of 2 tensors"),
    "softmax behind": (lambda m, h, t: m.fc(t.mean(1)).softmax(1), "no linear map makes the scores"),
    "constant": (lambda m, h, t: m.fc(0 * t.mean(1)), "scores do not depend on the image"),
    "two tensors": (lambda m, h, t: (m.fc(t.mean(1)) + m.other(t[:, 1:].mean(1))) / 2, "two heads of two tensors"),
}


def found(head):
    """The module with this head, disturbed and settled, its images and what the check says."""
    module = type("Net", (Tiny,), {"head": head})().eval()
    x = heads.images(33, 29)
    heads.disturb(module)
    heads.settle(module, x)
    with torch.no_grad():
        return module, x, heads.head_of(module, x)


CASES = [
    *((heads.POOLED_LINEAR[0], head) for head in SPELLINGS.values()),
    *((heads.POOLED_LINEAR[1], head) for head in BATCH_NORMS.values()),
    *((heads.POOLED_LINEAR[2], head) for head in AVERAGED.values()),
    *((heads.POOLED_LINEAR[3], head) for head in CONVOLUTIONS.values()),
    *((heads.NORM, head) for head in NORMS.values()),
]
NAMES = [*SPELLINGS, *BATCH_NORMS, *AVERAGED, *CONVOLUTIONS, *NORMS]


@pytest.mark.parametrize(("kind", "head"), CASES, ids=NAMES)
def test_a_head_with_columns(kind, head):
    module, x, result = found(head)
    assert (result.kind, result.why, result.pooled_linear) == (kind, "", kind != heads.NORM)
    assert result.residual < 2e-6
    with torch.no_grad():
        assert torch.equal(result.y, module(x)), "what the module returns"
        h = module.encoder(x).flatten(2) * (2 if head is SPELLINGS["changed in place"] else 1)
    assert architectures.same(result.h, h)


@pytest.mark.parametrize("head", MLPS.values(), ids=MLPS)
def test_a_gated_head(head):
    module, x, result = found(head)
    assert (result.kind, result.pooled_linear, result.residual) == (heads.MLP, False, None)
    torch.testing.assert_close(result.h, module.encoder(x).flatten(2))


def test_class_maps():
    module, x, result = found(lambda m, h, t: m.conv(h).relu().mean((2, 3)))
    assert (result.kind, result.pooled_linear) == (heads.CLASS_MAPS, False)
    torch.testing.assert_close(result.h.mean(2), module(x))


@pytest.mark.parametrize(("head", "why"), NOT.values(), ids=NOT)
def test_what_is_not_pooled_linear(head, why):
    *_, result = found(head)
    assert result.kind == heads.NOT and result.why.startswith(why) and not result.pooled_linear


def test_a_tuple_is_said():
    *_, result = found(lambda m, h, t: {"logits": m.fc(t.mean(1)), "h": h})
    assert (result.kind, result.why) == ("linear", "returns a dict")


def test_columns_of_batch_norm_are_folded():
    module, _, result = found(BATCH_NORMS["module"])
    bn, fc = module.batch_norm, module.fc
    a = bn.weight / (bn.running_var + bn.eps).sqrt()
    torch.testing.assert_close(result.c.float(), fc.weight * a, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        result.b.float(), fc.bias + fc.weight @ (bn.bias - a * bn.running_mean), rtol=1e-3, atol=1e-3
    )


def test_a_residual_is_that_of_other_columns():
    _, _, result = found(SPELLINGS["mean"])
    result.c = 1.01 * result.c
    linear = (result.y - result.b).abs().max() / result.y.abs().max()
    assert result.residual == pytest.approx(0.01 * float(linear), rel=1e-3)


# --- the sweep ----------------------------------------------------------------------------------------------------

ONE_OF_EACH = {
    "shufflenet_v2_x0_5": "linear",
    "timm/lcnet_035": "mlp head",
    "timm/efficientvit_m0": "linear after BatchNorm",
    "timm/efficientformerv2_s0": "two linear heads averaged",
    "timm/edgenext_xx_small": "layer norm head",
    "squeezenet1_1": "class maps averaged",
    "timm/deit_tiny_patch16_224": "not pooled-linear",
    "timm/mixer_s32_224": "linear",
    "timm/dla46_c": "linear",
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), ONE_OF_EACH.items())
def test_one_architecture_of_each_kind(name, kind):
    row = architectures.row(name)
    assert row["head kind"] == kind
    assert (row["pooled-linear"] == "yes") == (kind in heads.POOLED_LINEAR)
    if row["pooled-linear"] == "yes":
        assert float(row["residual (independent)"]) < 1e-5


def test_a_row_of_the_table():
    row = architectures.row("shufflenet_v2_x0_5")
    assert {key: row[key] for key in row if "residual" not in key and "seconds" not in key} == {
        "library": "torchvision",
        "network": "shufflenet_v2_x0_5",
        "family": "shufflenetv2",
        "million parameters": 1.4,
        "image size": "224 x 224",
        "head kind": "linear",
        "pooled-linear": "yes",
        "form": "linear",
        "y differs by": "0e+00",
        "h": "the same",
        "blocks end at": "maxpool, stage2, stage3, conv5",
        "channels and positions": "24 at 56 x 56, 48 at 28 x 28, 96 at 14 x 14, 1024 at 7 x 7",
        "head": "fc",
        "why not": "",
    }
    assert float(row["residual"]) < 1e-5 and float(row["residual (independent)"]) < 1e-5


def table(*rows):
    """Rows as a sweep writes them, empty where nothing is given."""
    return pd.DataFrame(rows, columns=architectures.COLUMNS).astype(object).fillna("")


def test_where_ours_and_the_check_disagree():
    right = {"pooled-linear": "yes", "form": "linear", "residual": "4e-07", "y differs by": "0e+00"}
    scaled = {**right, "pooled-linear": "no", "form": "scaled"}
    refused, none = {"pooled-linear": "no", "form": "refused"}, {**scaled, "form": "none", "residual": ""}
    unknown = {"head kind": "not known"}
    agree = [right, scaled, refused, none, unknown]
    differ = [
        {**right, "pooled-linear": "no"},
        {**right, "form": "refused"},
        {**right, "form": "scaled"},
        {**refused, "form": "fails"},
        {**none, "y differs by": "1e+00"},
        {**right, "y differs by": "1e+00"},
        {**scaled, "residual": "1e-02"},
        {**scaled, "residual": "nan"},
        {**right, "y differs by": "inf"},
        {**right, "h": "another", "residual": "1e-03"},
    ]
    assert architectures.disagrees(table(*agree, *differ)).tolist() == [False] * len(agree) + [True] * len(differ)


def test_a_row_a_family():
    linear = {"library": "timm", "family": "dla", "pooled-linear": "yes", "form": "linear", "y differs by": "0e+00"}
    refused = {**linear, "form": "refused", "y differs by": "", "why not": "no linear layer"}
    rows = [{**linear, "residual": "3e-07"}, {**linear, "residual": "2e-06"}, refused]
    (family,) = architectures.families(table(*rows)).to_dict("records")
    assert family == {
        "family": "timm dla",
        "networks": 3,
        "pooled-linear": 3,
        "accepted": "2 linear",
        "disagree": 1,
        "largest residual": "2e-06",
        "why not, for example": "no linear layer",
    }


def sweep(*arguments):
    """The script in a process of its own."""
    script = paths.ROOT / "benchmarks" / "architectures.py"
    environment = {**os.environ, "PYTHONPATH": str(paths.ROOT)}
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_stopped(tmp_path):
    csv = tmp_path / "networks.csv"
    kept = {"library": "torchvision", "network": "squeezenet1_1", "head kind": "kept", "pooled-linear": "no"}
    table(kept).to_csv(csv, index=False)
    done = sweep("squeezenet1_1", "shufflenet_v2_x0_5", "--csv", csv)
    assert done.returncode == 0, done.stderr
    written = architectures.read(csv)
    assert written["network"].tolist() == ["shufflenet_v2_x0_5", "squeezenet1_1"]
    assert written["head kind"].tolist() == ["linear", "kept"]
    assert "| shufflenet_v2_x0_5 | maxpool, stage2, stage3, conv5 | linear" in done.stdout
    families = sweep("--csv", csv, "--families")
    assert "| torchvision shufflenetv2 | 1          | 1 " in families.stdout
    assert "2 networks, ours and the independent check disagree on 0" in families.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limits", "why"),
    [({"seconds": 0.01}, "timeout: more than 0.01 s"), ({"memory": 2**28}, "does not run: ")],
    ids=["time", "memory"],
)
def test_a_network_beyond_its_limits_ends_no_sweep(limits, why):
    context = multiprocessing.get_context("forkserver")
    row = architectures.isolated(context, "timm/mixer_s32_224", **limits)
    assert (row["library"], row["network"], row["head kind"]) == ("timm", "timm/mixer_s32_224", "not known")
    assert row["why not"].startswith(why) and "\n" not in row["why not"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["resnet19"], "neither torchvision nor timm has 'resnet19': give torchvision's name, or timm/<name>"),
        (["timm/resnet19"], "neither torchvision nor timm has 'timm/resnet19'"),
        (
            ["resnet18", "--csv", paths.ROOT / "pyproject.toml"],
            "pyproject.toml is no table of this sweep: give another",
        ),
        (["--families"], "--families reads the file that a sweep wrote: give --csv FILE"),
    ],
    ids=["torchvision", "timm", "another file", "families"],
)
def test_bad_input_is_one_line(arguments, error, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["architectures.py", *map(str, arguments)])
    with pytest.raises(SystemExit, match="2"):
        architectures.main()
    assert error in capsys.readouterr().err.splitlines()[-1]


def test_the_check_imports_nothing_of_ours():
    assert "import kmex_utils" not in (source := Path(heads.__file__).read_text()) and "from kmex_utils" not in source
