"""KMEx for scikit-learn: a classifier on any matrix of embeddings, without a network."""

from typing import Any, Self

import numpy as np
import torch

from .kmex import fit_kmex

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, ClassNamePrefixFeaturesOutMixin, TransformerMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError:
    raise ImportError("KMExClassifier needs scikit-learn 1.6 or newer: pip install 'kmex-utils[sklearn]'") from None


class KMExClassifier(ClassNamePrefixFeaturesOutMixin, ClassifierMixin, TransformerMixin, BaseEstimator):
    """Class-wise k-means prototypes of embeddings z [N, D]; a sample has the class of the closest (section 3.2).

    There are no probabilities: the similarities exp(-||z - p||) do not estimate any. All is computed in float32.

    Parameters
    ----------
    prototypes_per_class
        K/C.
    restarts
        Of k-means.
    random_state
        An integer is the ``seed`` of :func:`~kmex_utils.method.explainers.fit_kmex`; a ``RandomState`` or None (NumPy's
        own) draws one.

    Attributes
    ----------
    classes_, n_features_in_
        The C labels, sorted, and D.
    prototypes_, prototype_labels_
        p [K, D], float32, class after class, and the label of each [K].
    kmex_
        The :class:`~kmex_utils.method.explainers.KMEx` itself.
    """

    def __init__(self, prototypes_per_class: int = 5, *, restarts: int = 10, random_state: Any = 0) -> None:
        self.prototypes_per_class = prototypes_per_class
        self.restarts = restarts
        self.random_state = random_state

    def fit(self, z: Any, y: Any) -> Self:
        """Embeddings z [N, D] and labels y [N]; a ValueError if a class has fewer than K/C of them."""
        for name in ("prototypes_per_class", "restarts"):
            if not isinstance(getattr(self, name), int | np.integer):
                raise TypeError(f"{name} must be an integer, got {getattr(self, name)!r}")
        z, y = validate_data(self, z, y, dtype=np.float32)
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        drawn = not isinstance(self.random_state, int | np.integer)
        seed = check_random_state(self.random_state).randint(2**31 - 1) if drawn else int(self.random_state)
        self.kmex_ = fit_kmex(
            torch.tensor(z),
            torch.from_numpy(labels),
            [str(label) for label in self.classes_],
            int(self.prototypes_per_class),
            seed=seed,
            restarts=int(self.restarts),
        )
        self.prototypes_ = self.kmex_.prototypes.vectors.numpy()
        self.prototype_labels_ = self.classes_[self.kmex_.prototypes.labels.numpy()]
        self._n_features_out = len(self.prototypes_)
        return self

    def predict(self, z: Any) -> np.ndarray:
        """Label of the closest prototype, [N]."""
        z = self._checked(z)
        return self.prototype_labels_[self.kmex_.nearest(z).numpy()]

    def transform(self, z: Any) -> np.ndarray:
        """Similarity exp(-||z - p||) to every prototype, float64 [N, K]."""
        z = self._checked(z)
        return self.kmex_.sim(z).numpy()

    def _checked(self, z: Any) -> torch.Tensor:
        check_is_fitted(self)
        return torch.tensor(validate_data(self, z, dtype=np.float32, reset=False))
