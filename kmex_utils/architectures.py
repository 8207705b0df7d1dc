"""The network that notebook 1 trains, by name: a ResNet of torchvision, or any chain of modules of torchvision or timm.

Blocks are cut as :mod:`kmex_utils.networks` finds them in a network that is only explained: the last output at each of
the deepest four resolutions. A network to train is also *rebuilt* from its modules, so these must be a chain, each the
input of the next up to the average pool; EfficientNets, MobileNetV2, RegNets and MNASNets are, DenseNets are not.
"""

from pathlib import Path

import torch
from torch import nn

from . import paths
from .backbones import Backbone, resnet, resnet_names, weights_entry
from .checkpoints import fit_head, is_timm, load_into, of_timm, of_torchvision, read_state
from .store import load_settings, load_tensors
from .watch import Watched


def build(
    arch: str = "resnet34", classes: int = 10, weights: str = "scratch", seed: int = 0, bias: bool = False
) -> Backbone:
    """A network by name as blocks B1 … B4 with a fresh classifier.

    Parameters
    ----------
    arch
        A name of torchvision (``resnet34``, ``efficientnet_b0`` …) or timm (``timm/tf_efficientnet_lite0``). A dropout
        before the head is left out: eq. 2 has none.
    weights
        ``imagenet`` (the library's, downloaded on first use), ``scratch``, a file with a state dict of the library's
        network, or the ``backbone.safetensors`` of another training: its blocks, and its classifier where the shapes
        agree.
    seed, bias
        As of :func:`~kmex_utils.backbones.resnet`.

    Raises
    ------
    ValueError, FileNotFoundError, ConnectionError, ImportError
        One line that says what to change: an unknown name, weights that do not fit or cannot be had, a network whose
        head is not average pool and one linear layer, or that is no chain of modules.
    """
    path = None if weights in ("imagenet", "scratch") else _existing(weights, arch)
    if path and _of_a_training(path):
        return _go_on(build(arch, classes, seed=seed, bias=bias), path, arch)
    if path is None and arch in resnet_names():
        return resnet(arch, classes, weights, seed, bias)
    return _cut(arch, classes, weights, path, seed, bias)


def unloaded(arch: str, classes: int, bias: bool = False) -> Backbone:
    """The network whose weights are still to be loaded; a ResNet's are not even drawn (PyTorch's meta device)."""
    if arch not in resnet_names():
        return build(arch, classes, bias=bias)
    with torch.device("meta"):
        return resnet(arch, classes, bias=bias)


@torch.no_grad()
def channels(arch: str) -> tuple[int, ...]:
    """D_1 … D_B of a network by name."""
    backbone = unloaded(arch, 2).eval()
    x = torch.zeros(1, 3, 64, 64, device=backbone.c.device)
    return tuple(u.shape[1] for u in backbone.activations(x))


def weights_file(arch: str) -> tuple[Path, float]:
    """Where the library keeps a network's ImageNet weights once they are downloaded, and about how many bytes."""
    if not is_timm(arch):
        entry = weights_entry(arch)
        return Path(torch.hub.get_dir()) / "checkpoints" / entry.url.rsplit("/", 1)[1], entry.meta["_file_size"] * 2**20
    module, _ = of_timm(arch, "random")
    from huggingface_hub.constants import HF_HUB_CACHE  # comes with timm

    name = module.pretrained_cfg.get("hf_hub_id") or arch
    folder = Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    return folder, 4.0 * sum(value.numel() for value in module.state_dict().values())


def _existing(weights: str, arch: str) -> Path:
    path = paths.resolve(weights)
    if not path.suffix:
        raise ValueError(
            "weights must be 'imagenet', 'scratch', a backbone.safetensors of notebook 01_train or a file with a "
            f"state dict of {arch}, got {weights!r}"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: weights is 'imagenet', 'scratch' or a file")
    return path


def _of_a_training(path: Path) -> bool:
    try:
        return path.suffix == ".safetensors" and "arch" in load_settings(path)
    except (KeyError, TypeError):  # no settings: written by someone else
        return False


def _cut(arch: str, classes: int, weights: str, path: Path | None, seed: int, bias: bool) -> Backbone:
    """The library's network, its weights from ``path`` if there is one, cut into blocks."""
    library = of_timm if is_timm(arch) else of_torchvision
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module, preset = library(arch, "imagenet" if weights == "imagenet" else "random")
        watched = Watched(module.eval(), preset["image_size"], arch)
        head = watched.head("")
        classifier = nn.Linear(module.get_submodule(head).in_features, classes, bias=bias)
    if path:
        state = read_state(path)
        fit_head(module, state, head, (), path)
        load_into(module, state, arch, path)
    if hasattr(module, "transform_input"):
        module.transform_input = False  # the data set's normalisation stands
    backbone = Backbone(_chain(module, watched, head, arch), classifier)
    return backbone.train().to(memory_format=torch.channels_last)


def _chain(module: nn.Module, watched: Watched, head: str, arch: str) -> list[nn.Module]:
    """The modules up to the average pool, in blocks that end at the last output of a resolution."""
    pool = watched.pool(head)
    if between := watched.between(pool, head):
        raise ValueError(f"{arch} is not of the paper's form (eq. 1, 2): {between}")
    ends = [(tap.name, tap.call) for tap in watched.blocks((), pool)]
    blocks: list[list[nn.Module]] = [[]]
    for call in sorted(watched.trunk(pool), key=lambda call: call.start):
        blocks[-1].append(module.get_submodule(call.name))
        if (call.name, call.call) in ends:
            blocks.append([])
    parts = [block[0] if len(block) == 1 else nn.Sequential(*block) for block in blocks]
    x = torch.randn(2, 3, watched.image_size, watched.image_size, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            y = module.get_submodule(head)(nn.Sequential(*parts).eval()(x).mean((2, 3)))
            agrees = torch.allclose(y, module(x), rtol=1e-3, atol=1e-4 * float(y.abs().max()))
    except (RuntimeError, TypeError, NotImplementedError):
        agrees = False
    if not agrees:
        raise ValueError(
            f"{arch} is not a chain of modules, its own forward does more: notebook 1 cannot cut it into blocks to "
            "train. Train it elsewhere and explain it with notebook 12, or take a ResNet, EfficientNet, MobileNetV2 …"
        )
    return parts


def _go_on(backbone: Backbone, path: Path, arch: str) -> Backbone:
    state, _ = load_tensors(path)
    own = backbone.state_dict()
    fitting = {name: value for name, value in state.items() if name in own and value.shape == own[name].shape}
    lacking = [name for name in own if name not in fitting and not name.startswith("classifier")]
    if lacking:
        raise ValueError(f"{path} does not fit {arch}: it lacks {lacking[0]} or has it in another shape; check arch")
    backbone.load_state_dict(fitting, strict=False)
    return backbone
