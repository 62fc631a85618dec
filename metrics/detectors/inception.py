"""The network of the Frechet Inception distance as a detector."""

import torch

from dnnlib import UserError
from dnnlib.url import download
from dnnlib.util import hash_file, renamed_fields
from metrics.detectors.network import Network
from metrics.inception import InceptionV3, tensorflow
from torch_utils import distributed
from torch_utils.files.identify import identify
from torch_utils.files.weights import load_weights

INCEPTION_URL = ('https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/'
                 'pt_inception-2015-12-05-6726825d.pth')
# Its name ends in the first digits of its SHA-256; other copies of it have the same ending.
INCEPTION_FILE = 'inception-2015-12-05-6726825d.pth'


class Inception(Network):
    """FID Inception network; outputs as in `metrics.inception.InceptionV3`.

    `weights`: path or URL of `pt_inception-2015-12-05` as a state dictionary (torch or
    safetensors) or a TorchScript archive, of which only the tensors are read. `sha256`: what the
    file must have; a file of the published name must begin with what that says in any case. Raises
    UserError if there is no such file or its weights do not fit.
    """

    def __init__(self, weights: str | None = None, device='cpu', prepare=tensorflow,
                 sha256: str | None = None):
        weights = weights or INCEPTION_URL
        with distributed.rank0_first(), renamed_fields(sha256='inception_sha256'):
            path = download(weights, 'give a local copy of the weights', sha256)
        digits = INCEPTION_FILE[-12:-4]
        if weights.endswith(INCEPTION_FILE) and not hash_file(path).startswith(digits):
            raise UserError(f'{path}: its SHA-256 does not begin with {digits}, as its name says; '
                            'it is another file, or damaged: remove it', 'inception')
        net = InceptionV3(prepare)
        state = read_tensors(path)
        for name, value in net.state_dict().items():
            if name.endswith('num_batches_tracked'):  # some files leave these counters out
                state.setdefault(name, value)
        with renamed_fields(allow_nonfinite='inception'):
            load_weights(net, state, path)
        # The faster layout of convolutions in exact float32: on an H200 the usual one is, by 1.26.
        layout = torch.contiguous_format
        if torch.device(device).type == 'cpu':
            layout = torch.channels_last
        super().__init__(net.to(memory_format=layout), weights, device)

    def _features(self, images, outputs):
        return self.net(images, outputs)


def read_tensors(path: str) -> dict[str, torch.Tensor]:
    """Weights by name: a state dictionary (torch, safetensors) or a TorchScript archive.

    Nothing in the file is run. No weights where a file holds something else. Raises UserError,
    naming the file, if it is of no known kind.
    """
    return dict(identify(path).state or {})
