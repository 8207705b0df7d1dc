"""att(b:) as an attribution of captum, for captum's metrics and beside its other methods."""

import torch

from .arrays import Targets, attribute
from .explained import Explained

try:
    from captum.attr import Attribution
except ImportError:
    raise ImportError("captum is not installed: pip install captum") from None


class BlockAttribution(Attribution):
    """att(b:) of network inputs; ``start_block`` and ``attribution_start`` as in :meth:`Explained.captum`."""

    def __init__(self, explained: Explained, start_block: int = 0, attribution_start: str = "segments") -> None:
        super().__init__(explained.network)
        self.explained, self.start_block, self.attribution_start = explained, start_block, attribution_start

    def attribute(
        self, inputs: torch.Tensor | tuple[torch.Tensor], target: Targets = None
    ) -> torch.Tensor | tuple[torch.Tensor]:
        """Like inputs, [N, 3, S, S] or a tuple with that: every channel has its pixel's value.

        ``target``: one class for all, by name or index, or an index for each image [N]; None: the predicted ones.
        """
        x = inputs[0] if isinstance(inputs, tuple) else inputs
        att = attribute(self.explained, x, target, self.start_block, self.attribution_start)
        like_x = torch.from_numpy(att).to(x)[:, None].repeat(1, x.shape[1], 1, 1)
        return (like_x,) if isinstance(inputs, tuple) else like_x
