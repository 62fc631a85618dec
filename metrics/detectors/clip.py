"""CLIP (arXiv 2103.00020) as a detector."""

import torch

from dnnlib.util import renamed_fields
from metrics.detectors.network import Network, build_model, resized
from torch_utils import distributed
from torch_utils.files.models import load_model


class CLIP(Network):
    """Image tower of CLIP ViT-L/14 at 336 pixels, with its projection, as CMMD uses it.

    Output `features` [N, 768], not normalised. Images are resized to the network's size (bicubic,
    antialiased). `weights`: a folder of `transformers` (of the image tower or of both), or
    OWNER/NAME[@REVISION] on the hub. Raises UserError if it cannot be had.
    """

    NAME = 'openai/clip-vit-large-patch14-336'
    # What `load_model` takes of config.json, or of its part vision_config.
    FIELDS = dict(hidden_size=(1, 1 << 14), intermediate_size=(1, 1 << 16),
                  num_hidden_layers=(1, 200), num_attention_heads=(1, 1 << 10),
                  projection_dim=(1, 1 << 14), hidden_act={'quick_gelu', 'gelu'},
                  layer_norm_eps=(1e-12, 0.1), image_size=(56, 1 << 12), patch_size=(8, 56),
                  num_channels=(3, 3))
    # Means and deviations of the images that CLIP was trained on.
    MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]

    def __init__(self, weights: str | None = None, device='cpu'):
        weights = weights or self.NAME
        with distributed.rank0_first(), renamed_fields(allow_nonfinite='clip'):
            net = load_model('CLIP', weights, self._build, self.FIELDS, 'model.safetensors',
                             field='clip', rename=self._name, part='vision_config',
                             torch_weights='pytorch_model.bin')
        super().__init__(net, weights, device)

    @staticmethod
    def _build(values, state, source):
        import transformers  # here, since it takes seconds
        config = transformers.CLIPVisionConfig(**values)
        return build_model(transformers.CLIPVisionModelWithProjection, config, state, source)

    @staticmethod
    def _name(name):
        """Nothing of the text tower, nor counters of positions."""
        is_ours = name.startswith(('vision_model.', 'visual_projection.'))
        return name if is_ours and not name.endswith('position_ids') else None

    def _features(self, images, outputs):
        x = resized(images, self.net.config.image_size, self.MEAN, self.STD)
        return {'features': self.net(pixel_values=x).image_embeds}
