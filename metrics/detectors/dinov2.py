"""DINOv2 (arXiv 2304.07193) as a detector."""

import torch
from torch.nn import functional as F

from dnnlib.util import renamed_fields
from metrics.detectors.network import Network, build_model, resized
from torch_utils import distributed
from torch_utils.files.models import load_model


class DINOv2(Network):
    """DINOv2 ViT-L/14 of `transformers`: the class token after the last norm.

    Output `features` [N, 1024]. Images are resized to 224x224 (bicubic, antialiased). `weights`:
    a folder that `save_pretrained` wrote, or OWNER/NAME[@REVISION] on the hub. Raises UserError if
    it cannot be had.
    """

    NAME = 'facebook/dinov2-large'
    FIELD = 'dinov2'  # the option of its weights
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
        weights = weights or self.NAME
        with distributed.rank0_first(), renamed_fields(allow_nonfinite=self.FIELD):
            net = load_model('DINOv2', weights, self._build, self.FIELDS, 'model.safetensors',
                             field=self.FIELD, rename=self._name)
        self._fit_positions(net)
        super().__init__(net, weights, device)

    @staticmethod
    def _build(values, state, source):
        import transformers  # here, since it takes seconds
        # The token stands for masked patches, in training; some files leave it out.
        config = transformers.Dinov2Config(
            **values, use_mask_token='embeddings.mask_token' in state)
        return build_model(transformers.Dinov2Model, config, state, source)

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
        x = resized(images, self.SIZE, self.MEAN, self.STD)
        return {'features': self.net(pixel_values=x).last_hidden_state[:, 0]}


class DINOv2Base(DINOv2):
    """DINOv2 ViT-B/14: features [N, 768]."""

    NAME = 'facebook/dinov2-base'
    FIELD = 'dinov2_base'
