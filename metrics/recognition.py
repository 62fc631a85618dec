"""How many generated images are recognised by a classifier that was trained on the real ones.

Recognised as the class they were generated for; or, where they were generated for none, clearly as
one of the classes.
"""

import functools

import numpy as np

from dnnlib import UserError


class Recognizer:
    """A support vector machine (RBF kernel) on the pixels of small labelled images.

    Args:
        images: Real images uint8 [N,C,H,W], or their values [N,D].
        labels: Their classes, int [N].

    Raises UserError for fewer than two classes.
    """

    def __init__(self, images, labels):
        from sklearn.svm import SVC
        self._labels = np.asarray(labels)
        if len(np.unique(self._labels)) < 2:
            raise UserError('recognition needs reference images of at least two classes')
        self._real = _features(images)
        # gamma: one over the expected squared distance of images, as scikit-learn's 'scale', but
        # fixed by the real images.
        gamma = 1 / (self._real.shape[1] * self._real.var())
        self._svc = SVC(C=10, gamma=gamma, decision_function_shape='ovo')
        self._svc.fit(self._real, self._labels)

    def predict(self, images) -> np.ndarray:
        """Classes int [N] of images uint8 [N,C,H,W]."""
        return self._svc.predict(_features(images))

    def recognised(self, images, labels) -> np.ndarray:
        """bool [N]: which images are taken for the class they were generated for."""
        return self.predict(images) == np.asarray(labels)

    def recognised_clearly(self, images, share: float = 0.95) -> np.ndarray:
        """bool [N]: which images are clearly of one class, whichever.

        The class that wins must beat every other one by the margin that `share` of the real images
        reach when the machine has not been trained on them (five-fold cross-validation). Raises
        UserError if a class has fewer than five images.
        """
        margins = _least_margin(self._svc.decision_function(_features(images)))
        return margins >= np.quantile(self._unseen_margins, 1 - share)

    @functools.cached_property
    def _unseen_margins(self):
        from sklearn.base import clone
        from sklearn.model_selection import StratifiedKFold, cross_val_predict
        if np.unique(self._labels, return_counts=True)[1].min() < 5:
            raise UserError('clear recognition needs at least five reference images of each class')
        folds = StratifiedKFold(5, shuffle=True, random_state=0)
        return _least_margin(cross_val_predict(
            clone(self._svc), self._real, self._labels, cv=folds, method='decision_function'))


def _features(images):
    return np.asarray(images).reshape(len(images), -1).astype(np.float32) / 255


def _least_margin(decisions: np.ndarray) -> np.ndarray:
    """The least decision value of the winning class against another, [N].

    0 or less if no class beats all others. decisions [N, K (K - 1) / 2]: one for each pair of
    classes i < j in order, positive for i; or [N] for two classes.
    """
    if decisions.ndim == 1:
        return np.abs(decisions)
    K = round((1 + (1 + 8 * decisions.shape[1]) ** 0.5) / 2)
    first, second = np.triu_indices(K, 1)
    against = np.full((len(decisions), K, K), np.inf)
    against[:, first, second] = decisions
    against[:, second, first] = -decisions
    return against.min(axis=2).max(axis=1)
