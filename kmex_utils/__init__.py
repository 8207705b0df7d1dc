"""Post-hoc self-explanation of CNNs, after the paper of that name.

    import kmex_utils as kmex

    network = kmex.network("resnet50", weights="imagenet")  # or an nn.Module of one's own
    explained = kmex.explain(network, "photos")
    explained.panel("photos/cat/IMG_0012.jpg")
    explained.save("explained")  # and later: kmex.load("explained")

===============  ============================================================================================
``data``         images in, from the paper's data sets or a folder: one reader, one rule for held-out images
``networks``     any CNN that ends in average pool and linear head, as blocks x(1) … x(B), y
``method``       the paper: composite, k-means, explainers, attribution, measures
``training``     the paper's trainings, resumable: the network, ProtoPNet
``explanation``  a network explained: prototypes, panels, report, export, explorer
``paper``        the reproduction: run folders, tables, figures, claims, its batch
``cli``          ``kmex`` from the shell
===============  ============================================================================================

Beside them the ground: ``paths``, ``store`` (files, whole or absent), ``hardware``, ``parameters`` (of notebooks) and
``drawing``.
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .explanation.explained import Explained
    from .explanation.fit import explain
    from .networks.network import Network, network

    load = Explained.load
    __version__: str

__all__ = ["Explained", "Network", "__version__", "explain", "load", "network"]

_MODULES = {
    "Explained": "explanation.explained",
    "Network": "networks.network",
    "explain": "explanation.fit",
    "network": "networks.network",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for, when it is: ``import kmex_utils`` itself takes no time."""
    if name == "__version__":
        return metadata.version("kmex-utils")
    if name == "load":
        return __getattr__("Explained").load
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """With what is imported when it is asked for, so that an editor completes it."""
    return sorted({*globals(), *__all__})
