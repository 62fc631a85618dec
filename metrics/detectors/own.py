"""A classifier of the training data as a detector."""

from dnnlib import UserError
from metrics.detectors.network import Network


class Own(Network):
    """The input of the last layer of a wide residual network (train_classifier.py).

    For small domains, where features that were learned on photographs mean little. Output
    `features` [N, D]. `weights`: its file; `open_network(path, device)` opens it, as
    `training.snapshot.load_snapshot` does. Raises UserError for a file of something else, and for
    images whose sides are no multiples of 4.
    """

    def __init__(self, weights: str | None = None, device='cpu', open_network=None):
        if weights is None or open_network is None:
            raise UserError('needs the file of a classifier of such images, as '
                            'train_classifier.py makes it', 'own')
        net = open_network(weights, device).net
        if getattr(net, 'class_name', None) != 'WideResNet':
            raise UserError('is no classifier of train_classifier.py', 'own', weights)
        super().__init__(net, weights, device)

    def _features(self, images, outputs):
        height, width = images.shape[2:]
        if height % 4 or width % 4:
            raise UserError(f'takes images with sides that are multiples of 4, and these have '
                            f'{width}x{height}', 'own', self.weights)
        return {'features': self.net(images.float() / 255, return_prelogit=True)[1]}
