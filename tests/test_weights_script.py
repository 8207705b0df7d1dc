"""The script that makes a ResNet's weights of ONNX files, on small graphs of the form in which CNTK writes them."""

import hashlib
import importlib.util
import json
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from kmex_utils import paths
from kmex_utils.data import IMAGENET_MEAN, IMAGENET_STD

onnx = pytest.importorskip("onnx", reason="the script reads ONNX files by the package onnx: pip install onnx")
from onnx.reference import ReferenceEvaluator  # noqa: E402

BGR = [2, 1, 0]
MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("make_resnet_weights", paths.DATA / "make_resnet_weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def resnet(widths=(4, 8, 16, 32), blocks=(2, 2, 2, 3)):
    """torchvision's ResNet without fc, narrower: its widths cannot be chosen there."""
    width = widths[0]
    parts = OrderedDict(conv1=nn.Conv2d(3, width, 7, 2, 3, bias=False), bn1=nn.BatchNorm2d(width), relu=nn.ReLU())
    parts["maxpool"] = nn.MaxPool2d(3, 2, 1)
    for i, (planes, count) in enumerate(zip(widths, blocks, strict=True), 1):
        down = nn.Sequential(nn.Conv2d(width, planes, 1, 2, bias=False), nn.BatchNorm2d(planes)) if i > 1 else None
        first = BasicBlock(width, planes, 2 if i > 1 else 1, down)
        parts[f"layer{i}"] = nn.Sequential(first, *(BasicBlock(planes, planes) for _ in range(count - 1)))
        width = planes
    return nn.Sequential(OrderedDict(**parts, avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten()))


@pytest.fixture
def original():
    """A random network that takes BGR in 0 … 255 less a mean; float16 holds its convolutions, but for the first one."""
    generator = torch.Generator().manual_seed(0)
    network = resnet().eval()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            scale = (2 / module.weight[0].numel()) ** 0.5
            module.weight.data = (scale * torch.randn(module.weight.shape, generator=generator)).half().float()
        if isinstance(module, nn.BatchNorm2d):
            for name, low, high in (
                ("weight", 0.5, 1),
                ("bias", -1, 1),
                ("running_mean", -1, 1),
                ("running_var", 1, 2),
            ):
                values = low + (high - low) * torch.rand(module.num_features, generator=generator)
                getattr(module, name).data = values
    # of the converted conv1, W 255 std, float16 leaves nothing out either
    network.conv1.weight.data = (network.conv1.weight / (255 * STD))[:, BGR].detach()
    return network


class Graph:
    """An ONNX graph as CNTK names it: operations by number, parameters as initializers, in either way they are kept."""

    def __init__(self):
        self.nodes, self.initializers = [], []

    def parameter(self, values):
        name, values = f"Parameter{len(self.initializers)}", np.asarray(values, np.float32)
        raw = len(self.initializers) % 2
        kept = values.tobytes() if raw else values.ravel().tolist()
        tensor = onnx.helper.make_tensor(name, onnx.TensorProto.FLOAT, values.shape, kept, raw=bool(raw))
        self.initializers.append(tensor)
        return name

    def add(self, op, *inputs, **attributes):
        name = f"{op}{len(self.nodes)}_Output_0"
        self.nodes.append(onnx.helper.make_node(op, inputs, [name], **attributes))
        return name

    def convolution(self, x, conv, bn):
        (k, _), (stride, _), (pad, _) = conv.kernel_size, conv.stride, conv.padding
        shape = dict(kernel_shape=[k] * 2, strides=[stride] * 2, pads=[pad] * 4)
        x = self.add("Conv", x, self.parameter(conv.weight.detach()), **shape)
        values = bn.weight.detach(), bn.bias.detach(), bn.running_mean, bn.running_var
        return self.add("BatchNormalization", x, *map(self.parameter, values), epsilon=1e-5)

    def block(self, x, block, shortcut_first):
        short = self.convolution(x, *block.downsample) if block.downsample and shortcut_first else x
        y = self.convolution(self.add("Relu", self.convolution(x, block.conv1, block.bn1)), block.conv2, block.bn2)
        if block.downsample and not shortcut_first:
            short = self.convolution(x, *block.downsample)
        return self.add("Relu", self.add("Add", *((short, y) if shortcut_first else (y, short))))

    def saved(self, shape):
        ends = (("x", shape), (self.nodes[-1].output[0], None))
        x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, of) for name, of in ends)
        graph = onnx.helper.make_graph(self.nodes, "CNTKGraph", [x], [y], self.initializers)
        return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 15)]).SerializeToString()


@pytest.fixture
def graphs(original):
    """Network and preprocessing, and the mean image's mean (BGR), far from ImageNet's so that the fold shows."""
    image = np.random.default_rng(0).uniform(-20, 20, (3, 32, 32)) + np.reshape([90, 140, 110], (3, 1, 1))
    first, graph = Graph(), Graph()
    first.add("Sub", "x", first.parameter(image))
    x = graph.add("Relu", graph.convolution("x", original.conv1, original.bn1))
    x = graph.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    for i in range(1, 5):
        for block in original.get_submodule(f"layer{i}"):
            x = graph.block(x, block, shortcut_first=i == 3)
    graph.add("GlobalAveragePool", x)
    files = graph.saved([1, 3, 32, 32]), first.saved([1, 3, 32, 32])
    return files, torch.tensor(image.mean((1, 2)), dtype=torch.float32).view(3, 1, 1)


def test_the_graph_is_the_network(graphs, original):
    """What the tests below rest on, by onnx's own evaluator."""
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 255 - 120
    evaluator = ReferenceEvaluator(onnx.load_model_from_string(graphs[0][0]))
    (result,) = evaluator.run(None, {"x": x.numpy()})
    np.testing.assert_allclose(result[..., 0, 0], original(x).detach(), rtol=1e-4, atol=1e-4)


@pytest.fixture
def package(graphs, script, tmp_path, monkeypatch):
    """The package with these graphs, whose checksums the script knows."""
    names = ("ResNet18Onnx/ResNet18.onnx", "ResNetPrepOnnx/ResNetPreprocess.onnx")
    with zipfile.ZipFile(tmp_path / "a.nupkg", "w") as archive:
        archive.writestr("ResNet18.nuspec", "")
        for name, content in zip(names, graphs[0], strict=True):
            archive.writestr(f"tools/DnnImageModels/{name}", content)
    known = [hashlib.sha256(content).hexdigest() for content in graphs[0]]
    monkeypatch.setattr(script, "FILES", dict(zip(script.FILES, known, strict=True)))
    return tmp_path / "a.nupkg"


def test_the_same_features(package, script, original, graphs, tmp_path, capsys):
    """Of RGB, normalised, as of BGR less the mean; beyond the border, where zeros are, lies ImageNet's mean colour."""
    script.main(str(package), str(tmp_path / "w.safetensors"))
    network = resnet().eval()
    network.load_state_dict(load_file(tmp_path / "w.safetensors"), strict=True)
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    features = network((pixels - MEAN) / STD)
    padded = (255 * MEAN)[BGR].expand(2, 3, 70, 70).clone()
    padded[:, :, 3:-3, 3:-3] = 255 * pixels[:, BGR]
    original.conv1.padding = (0, 0)
    torch.testing.assert_close(features, original(padded - graphs[1]), rtol=1e-3, atol=1e-3)
    assert features.std() > 0.1
    out, err = capsys.readouterr()
    assert out.strip() == hashlib.sha256((tmp_path / "w.safetensors").read_bytes()).hexdigest()
    assert "the file differs from the weights used here" in err


def test_names_types_and_order(package, script, tmp_path):
    """Names and ranks are torchvision's, tensors in safetensors' own order, the metadata always in the same."""
    script.main(str(package), str(tmp_path / "w.safetensors"))
    content = (tmp_path / "w.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert list(header.pop("__metadata__")) == ["network", "input", "source"] and length % 8 == 0
    with torch.device("meta"):
        expected = ResNet(BasicBlock, [2, 2, 2, 3]).state_dict()
    assert set(header) == {name for name in expected if not name.startswith("fc.")}
    kind = {4: "F16", 1: "F32", 0: "I64"}
    assert all(entry["dtype"] == kind[expected[name].ndim] for name, entry in header.items())
    assert list(header) == sorted(header, key=lambda name: (-int(header[name]["dtype"][1:]), name))
    save_file(load_file(tmp_path / "w.safetensors"), tmp_path / "again")
    assert (tmp_path / "again").read_bytes().endswith(content[8 + length :])
    script.main(str(package), str(tmp_path / "twice"))
    assert (tmp_path / "twice").read_bytes() == content


def test_a_folder_of_the_files(package, script, tmp_path):
    with zipfile.ZipFile(package) as archive:
        archive.extractall(tmp_path / "unpacked")
    for source, name in ((package, "a"), (tmp_path / "unpacked", "b")):
        script.main(str(source), str(tmp_path / name))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_what_is_not_the_package_is_refused(script, graphs, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is neither a .nupkg nor a folder: give the package Microsoft"):
        script.main(str(tmp_path / "nowhere"))
    (tmp_path / "ResNet18.onnx").write_bytes(graphs[0][1])
    with pytest.raises(ValueError, match="has no ResNet18.onnx of SHA-256 .*: give the package Microsoft"):
        script.main(str(tmp_path))
    with pytest.raises(ValueError, match=r"has 19 \+ 3 \(1 x 1\) convolutions, not 0 \+ 0"):
        script.state(graphs[0][1], graphs[0][1], torch.float64)
