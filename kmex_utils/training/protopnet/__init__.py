"""ProtoPNet (Chen et al. 2019), the paper's baseline: its network, losses, alternating schedule, push and views.

The equations of h, sim and proj are in :class:`kmex_utils.method.explainers.ProtoPNet`; here is what trains them.
"""

from .model import TrainableProtoPNet, evaluate, latents, load, start
from .options import OPTIONS, Options
from .schedule import train
from .views import BOXES, faded, most_activated, prototype_source

__all__ = ["BOXES", "OPTIONS", "Options", "TrainableProtoPNet", "evaluate", "faded", "latents", "load"]
__all__ += ["most_activated", "prototype_source", "start", "train"]
