"""Every number of ProtoPNet, with the default of the authors' code, and the order of its phases.

The code is github.com/cfchen-duke/ProtoPNet, ``settings.py`` and ``main.py``.

=========  =====================================================  ==========================================
phase      trained                                                when
=========  =====================================================  ==========================================
``warm``   add-on and prototypes                                  the first epochs
``joint``  features, add-on and prototypes                        the epochs after them
``push``   nothing: each prototype becomes the nearest training   after every tenth epoch from the tenth on,
           patch of its class                                     and after the last
``last``   the last layer, with L1 on other classes' weights      20 passes after each push
=========  =====================================================  ==========================================
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """The numbers.

    ``depth`` D' and ``size`` s of a prototype [D', s, s]; rates are of Adam; ``weight_decay`` is of the features and
    the add-on; ``rate_factor`` multiplies the joint rates at every ``rate_step``-th joint epoch; epochs count from 0
    through both phases; ``cross_entropy`` … ``l1`` weigh the terms of the loss. ``frozen_features`` says how the phases
    that do not train the features see them: ``anew``, as the authors do, with augmentation and batch normalisation in
    training mode; or ``once``, computed in evaluation mode and kept in memory. ``affine`` rotates by up to 15° or
    shears by up to 10°.
    """

    depth: int = 128
    size: int = 1
    epsilon: float = 1e-4
    wrong_class: float = -0.5
    warm_epochs: int = 5
    joint_epochs: int = 16  # authors: up to 1,000, stopped by hand; after 16 the rates have fallen to a thousandth
    push_start: int = 10
    push_every: int = 10
    last_passes: int = 20
    batch_size: int = 80
    features_rate: float = 1e-4
    add_on_rate: float = 3e-3
    prototypes_rate: float = 3e-3
    last_rate: float = 1e-4
    weight_decay: float = 1e-3
    rate_step: int = 5
    rate_factor: float = 0.1
    cross_entropy: float = 1.0
    cluster: float = 0.8
    separation: float = -0.08
    l1: float = 1e-4
    frozen_features: str = "anew"
    affine: bool = False

    def __post_init__(self) -> None:
        for name in ("depth", "size", "warm_epochs", "push_every", "batch_size", "rate_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("joint_epochs", "push_start", "last_passes", "weight_decay", "l1"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("epsilon", "features_rate", "add_on_rate", "prototypes_rate", "last_rate", "rate_factor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.frozen_features not in ("anew", "once"):
            raise ValueError(f"frozen_features must be 'anew' or 'once', got {self.frozen_features!r}")

    def joint_rate(self, epoch: int) -> float:
        """The factor of the joint rates in an epoch; the authors count a joint epoch before it is trained."""
        factor: float = self.rate_factor ** ((epoch - self.warm_epochs + 1) // self.rate_step)
        return factor

    def plan(self) -> list[tuple[str, int, int]]:
        """The whole schedule: (phase, epoch, pass)."""
        steps, epochs = [], self.warm_epochs + self.joint_epochs
        for epoch in range(epochs):
            steps.append(("warm" if epoch < self.warm_epochs else "joint", epoch, 0))
            if epoch + 1 == epochs or (epoch >= self.push_start and epoch % self.push_every == 0):
                steps.append(("push", epoch, 0))
                steps += [("last", epoch, i) for i in range(self.last_passes)]
        return steps


OPTIONS = {
    # Seconds on one core instead of hours on a GPU: joint_epochs 1 (16), so one push (2); features kept while they are
    # frozen (authors: anew). Chosen on 2,000 other training digits.
    "mnist-mini": Options(joint_epochs=1, frozen_features="once"),
}
