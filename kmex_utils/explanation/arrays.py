"""Maps and attributions at the image's size, for what other libraries do with arrays: scikit-image, captum, Quantus."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ..networks.network import Target
from .explained import AnyImage, Explained
from .interpretation import enlarged

if TYPE_CHECKING:
    import pandas as pd

Targets = str | int | None | Sequence[int] | np.ndarray | torch.Tensor


class Labels(NamedTuple):
    """The segments of one image.

    ``labels`` int32 [S, S]: prototype + 1, as 0 is background to scikit-image and napari; ``attribution`` float32
    [S, S], or None where eq. 11 does not hold; ``table``: by label the ``prototype``, its ``class`` and its ``share``
    of the map's positions, largest first.
    """

    labels: np.ndarray
    attribution: np.ndarray | None
    table: "pd.DataFrame"


def labels(
    explained: Explained,
    image: AnyImage,
    start_block: int = 0,
    target: Target = "",
    attribution_start: str = "segments",
) -> Labels:
    """Map and attribution of an image, every position a block of pixels."""
    import pandas as pd

    picture, b = explained.picture(image), start_block or explained.start_blocks[-1]
    (part,) = explained.interpretations(picture, [b], target, 0, attribution_start)
    prototypes, counts = np.unique(part.map, return_counts=True)
    classes = np.array(explained.classes)[explained.explainers[b].prototypes.labels[prototypes]]
    columns = {"prototype": prototypes, "class": classes, "share": counts / part.map.size}
    table = pd.DataFrame(columns, index=pd.Index(prototypes + 1, name="label"))
    return Labels(
        enlarged(part.map + 1, picture.pixels.shape[1:]).astype(np.int32),
        None if part.attribution is None else enlarged(part.attribution, picture.pixels.shape[1:]),
        table.sort_values("share", ascending=False, kind="stable"),
    )


def attribute(
    explained: Explained,
    x: torch.Tensor,
    target: Targets = None,
    start_block: int = 0,
    attribution_start: str = "segments",
) -> np.ndarray:
    """att(b:) of network inputs x [N, 3, S, S], float32 [N, S, S], every position a block of pixels.

    ``target``: one class for all, by name or index, or an index for each image [N]; None: the predicted ones.
    """
    b = start_block or explained.start_blocks[-1]
    if b not in explained.explainers:
        raise ValueError(f"start_block must be one of {explained.start_blocks}, got {b}")
    for_all = target is None or isinstance(target, str | int)
    each = [target] if for_all else torch.as_tensor(target).flatten().tolist()
    if len(each) not in (1, len(x)):
        raise ValueError(f"target must be one class, or one for each of the {len(x)} images, got {len(each)}")
    seen = explained.see_inputs(x)
    att = torch.empty(seen.maps[b].shape)
    for j in set(each):
        by_block = explained.attributions(seen, j, attribution_start)
        if by_block is None:
            name, between = explained.network.name, explained.network.between
            raise ValueError(f"there are no attributions, as eq. 11 does not hold for {name}: {between}")
        wanted = torch.tensor([other == j for other in each]).expand(len(x))
        att[wanted] = by_block[b][wanted]
    return enlarged(att.numpy(), x.shape[2:])


def explain_func(
    explained: Explained, model: nn.Module, inputs: np.ndarray, targets: np.ndarray, device: Any = None, **options: Any
) -> np.ndarray:
    """att(b:) in the form that Quantus calls, [N, 1, S, S]; computed where the network is, whatever the ``device``."""
    network = explained.network
    if model is not network and model is not network.module:
        made_of = f"the prototypes are of {network.name}, the model given is another"
        raise ValueError(f"{made_of}: explain() it, and give the explain_func of that")
    x = torch.as_tensor(inputs, dtype=torch.float32, device=next(network.parameters()).device)
    return attribute(explained, x, targets, **options)[:, None]
