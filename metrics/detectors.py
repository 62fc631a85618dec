"""What turns images into features: the FID Inception network, DINOv2, or nothing (the pixels).

A detector takes images uint8 [N, C, H, W] and names of outputs, and gives {name: float32 [N, D]}.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch.nn import functional as F

from dnnlib import UserError
from dnnlib.url import download
from dnnlib.util import hash_file, renamed_fields
from metrics.inception import InceptionV3, half_pixel, tensorflow
from metrics.inception_score import chunks, equal_parts
from torch_utils import distributed
from torch_utils.files.identify import identify
from torch_utils.files.models import load_model
from torch_utils.files.weights import fingerprint, load_weights, refuse_differences

INCEPTION_URL = ('https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/'
                 'pt_inception-2015-12-05-6726825d.pth')
# Its name ends in the first digits of its SHA-256; other copies of it have the same ending.
INCEPTION_FILE = 'inception-2015-12-05-6726825d.pth'
DINOV2_NAME = 'facebook/dinov2-large'
MAX_MISSING = 50_000_000  # weights, that are looked for by name
MAX_PIXELS = 64 * 64 * 3  # numbers an image: the covariance has the square of it


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a family of publications measures.

    prepare    resizing and scaling: what Inception sees of images
    probs      space of the class probabilities of the Inception Score
    parts      number of images -> bounds of the parts whose scores are averaged
    k, strict  balls of precision and recall: neighbours, and whether they are without boundary
    manifold   reference images of precision and recall
    num        generated images
    unbiased   whether the spread of the Inception Score is divided by one part less
    """

    prepare: Callable
    probs: str
    parts: Callable
    k: int
    strict: bool
    manifold: int
    num: int = 50000
    unbiased: bool = False


# EDM and EDM2, whose own measure is FID; guided diffusion's suite; class-balancing diffusion.
PROTOCOLS = {
    'edm': Protocol(tensorflow, 'softmax_nobias', chunks, 3, strict=False, manifold=10000),
    'adm': Protocol(tensorflow, 'softmax_nobias', chunks, 3, strict=False, manifold=10000),
    'cbdm': Protocol(half_pixel, 'softmax', equal_parts, 5, strict=True, manifold=50000),
}


class Pixels:
    """The pixels themselves, values 0..255, in one output `features` [N, C H W]."""

    weights = fingerprint = None

    def __init__(self, weights=None, device='cpu'):
        self.device = torch.device(device)

    def __call__(self, images: torch.Tensor, outputs=('features',)) -> dict[str, torch.Tensor]:
        dim = images[0].numel()
        if dim > MAX_PIXELS:
            raise UserError(f'images of {list(images.shape[1:])} have {dim} pixel values, too '
                            f'many for the pixel metrics (at most {MAX_PIXELS}, that is 64x64 '
                            'RGB); use fid or fd_dinov2')
        return {'features': images.to(self.device).flatten(1).to(torch.float32)}


class _Network:
    """Common to detectors with weights: RGB input on the right device, a fingerprint."""

    def __init__(self, net: torch.nn.Module, weights: str, device):
        self.device = torch.device(device)
        self.weights = weights
        self.net = net.eval().requires_grad_(False).to(self.device)
        self.fingerprint = fingerprint(sorted(net.state_dict().items()))

    @torch.inference_mode()
    @distributed.exact_float32()
    def __call__(self, images: torch.Tensor, outputs=('features',)) -> dict[str, torch.Tensor]:
        images = images.to(self.device)
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        return self._features(images, outputs)


class Inception(_Network):
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


class DINOv2(_Network):
    """DINOv2 ViT-L/14 of `transformers`: the class token after the last norm.

    Output `features` [N, 1024]. Images are resized to 224x224 (bicubic, antialiased). `weights`:
    a folder that `save_pretrained` wrote, or OWNER/NAME[@REVISION] on the hub. Raises UserError if
    it cannot be had.
    """

    SIZE = 224
    # What `load_model` takes of config.json.
    FIELDS = dict(hidden_size=(1, 1 << 14), num_hidden_layers=(1, 200),
                  num_attention_heads=(1, 1 << 10), mlp_ratio=(1, 64), hidden_act={'gelu'},
                  layer_norm_eps=(1e-12, 0.1), image_size=(56, 1 << 12), patch_size=(8, 56),
                  num_channels=(3, 3), qkv_bias=bool, use_swiglu_ffn=bool)
    # Means and deviations of ImageNet.
    MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]

    def __init__(self, weights: str | None = None, device='cpu'):
        weights = weights or DINOV2_NAME
        with distributed.rank0_first(), renamed_fields(allow_nonfinite='dinov2'):
            net = load_model('DINOv2', weights, self._build, self.FIELDS, 'model.safetensors',
                             field='dinov2', rename=self._name)
        self._fit_positions(net)
        super().__init__(net, weights, device)

    @staticmethod
    def _build(values, state, source):
        import transformers  # here, since it takes seconds
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        # The token stands for masked patches, in training; some files leave it out.
        config = transformers.Dinov2Config(
            **values, use_mask_token='embeddings.mask_token' in state)
        if config.hidden_size % config.num_attention_heads:
            raise ValueError('hidden_size in its config.json is no multiple of '
                             'num_attention_heads')
        with torch.device('meta'):  # without memory, whatever the sizes
            net = transformers.Dinov2Model(config)
        missing = sum(x.numel() for x in net.parameters()) - sum(x.numel() for x in state.values())
        if missing > MAX_MISSING:
            raise ValueError(f'its files lack {missing} of the weights that its config.json asks '
                             'for')
        # Without a folder it reads no file; it knows older names of weights.
        net, info = net.from_pretrained(
            None, config=config, state_dict=state, dtype=torch.float32, attn_implementation='sdpa',
            trust_remote_code=False, use_safetensors=True, ignore_mismatched_sizes=True,
            output_loading_info=True)
        refuse_differences({
            'lacks': sorted(info['missing_keys']), 'has unknown': sorted(info['unexpected_keys']),
            'has another shape of': sorted(key for key, *_ in info['mismatched_keys'])}, source)
        return net

    @staticmethod
    def _name(name):
        """Of a classifier on DINOv2 the name without its prefix, and nothing of the classifier."""
        return None if name.startswith('classifier.') else name.removeprefix('dinov2.')

    @classmethod
    @torch.no_grad()
    def _fit_positions(cls, net):
        """Position embeddings for 224x224, once, by the rule of the original code of DINOv2.

        It interpolates by the factor (16 + 0.1) / 37, not to the size 16 as `transformers` does,
        which moves the sampling positions and so the features a little.
        """
        positions = net.embeddings.position_embeddings
        have = round((positions.shape[1] - 1) ** 0.5)
        want = cls.SIZE // net.config.patch_size
        if have != want:
            grid = positions[:, 1:].mT.unflatten(2, [have, have])
            grid = F.interpolate(grid, scale_factor=(want + 0.1) / have, mode='bicubic')
            positions = torch.cat([positions[:, :1], grid.flatten(2).mT], dim=1)
            net.embeddings.position_embeddings = torch.nn.Parameter(positions)
            net.config.image_size = cls.SIZE

    def _features(self, images, outputs):
        x = F.interpolate(images.float(), size=(self.SIZE, self.SIZE), mode='bicubic',
                          antialias=True, align_corners=False)
        x = (x / 255 - self.MEAN.to(x)) / self.STD.to(x)
        return {'features': self.net(pixel_values=x).last_hidden_state[:, 0]}


DETECTORS = {'inception': Inception, 'dinov2': DINOv2, 'pixels': Pixels}


def read_tensors(path: str) -> dict[str, torch.Tensor]:
    """Weights by name: a state dictionary (torch, safetensors) or a TorchScript archive.

    Nothing in the file is run. No weights where a file holds something else. Raises UserError,
    naming the file, if it is of no known kind.
    """
    return dict(identify(path).state or {})
