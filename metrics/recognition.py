"""How many generated images a classifier, trained on the real ones, recognises as the class they were made for."""

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
        self._svc = SVC(C=10, gamma=1 / (features.shape[1] * features.var())).fit(features, labels)

    @staticmethod
    def _features(images):
        return np.asarray(images).reshape(len(images), -1).astype(np.float32) / 255

    def predict(self, images) -> np.ndarray:
        """Classes int [N] of images uint8 [N,C,H,W]."""
        return self._svc.predict(self._features(images))

    def recognised(self, images, labels) -> np.ndarray:
        """bool [N]: which images are taken for the class they were made for."""
        return self.predict(images) == np.asarray(labels)
