"""Any CNN that ends in average pool and one linear layer, seen as blocks: x(1) … x(B), y."""

from .network import Network, for_training, load, network, theorem1_residual

__all__ = ["Network", "for_training", "load", "network", "theorem1_residual"]
