"""How many generated images a classifier, trained on the real ones, recognises: as the class they were made for, or, where
they were made for none, clearly as one of the classes."""

import numpy as np

from dnnlib import UserError

MAX_VALUES = 64 * 64 * 3  # pixel values of an image that a support vector machine handles in reasonable time


class Recognizer:
    """A support vector machine (RBF kernel) on the pixels of small labelled images.

    Args:
        images: Real images uint8 [N,C,H,W].
        labels: Their classes, int [N].

    Raises UserError for images that are too large, and for fewer than two classes.
    """

    def __init__(self, images, labels):
        from sklearn.svm import SVC
        labels = np.asarray(labels)
        if np.prod(np.shape(images)[1:]) > MAX_VALUES:
            raise UserError(f'recognition works on small images, not on {tuple(np.shape(images)[1:])}')
        if len(np.unique(labels)) < 2:
            raise UserError('recognition needs reference images of at least two classes')
        features = self._features(images)
        # gamma: one over the expected squared distance of images, as scikit-learn's 'scale' but fixed by the real images
        self._svc = SVC(C=10, gamma=1 / (features.shape[1] * features.var()), decision_function_shape='ovo')
        self._svc.fit(features, labels)
        self._real = features, labels
        self._thresholds = {}

    @staticmethod
    def _features(images):
        return np.asarray(images).reshape(len(images), -1).astype(np.float32) / 255

    def predict(self, images) -> np.ndarray:
        """Classes int [N] of images uint8 [N,C,H,W]."""
        return self._svc.predict(self._features(images))

    def recognised(self, images, labels) -> np.ndarray:
        """bool [N]: which images are taken for the class they were made for."""
        return self.predict(images) == np.asarray(labels)

    def recognised_clearly(self, images, share: float = 0.95) -> np.ndarray:
        """bool [N]: which images are clearly of one class, whichever.

        The class that wins must beat every other one by the margin that `share` of the real images reach when the machine
        has not been trained on them (five-fold cross-validation). Raises UserError if a class has fewer than five images.
        """
        if share not in self._thresholds:
            self._thresholds[share] = self._threshold(share)
        return _least_margin(self._svc.decision_function(self._features(images))) >= self._thresholds[share]

    def _threshold(self, share):
        from sklearn.base import clone
        from sklearn.model_selection import StratifiedKFold, cross_val_predict
        features, labels = self._real
        if np.unique(labels, return_counts=True)[1].min() < 5:
            raise UserError('clear recognition needs reference images with at least five of each class')
        folds = StratifiedKFold(5, shuffle=True, random_state=0)
        unseen = cross_val_predict(clone(self._svc), features, labels, cv=folds, method='decision_function')
        return float(np.quantile(_least_margin(unseen), 1 - share))


def _least_margin(decisions: np.ndarray) -> np.ndarray:
    """The least decision value of the winning class against another, [N]; 0 or less if no class beats all others.

    decisions [N, K (K - 1) / 2]: one for each pair of classes i < j in order, positive for i; or [N] for two classes.
    """
    if decisions.ndim == 1:
        return np.abs(decisions)
    K = round((1 + (1 + 8 * decisions.shape[1]) ** 0.5) / 2)
    first, second = np.triu_indices(K, 1)
    against = np.full((len(decisions), K, K), np.inf)
    against[:, first, second], against[:, second, first] = decisions, -decisions
    return against.min(axis=2).max(axis=1)
