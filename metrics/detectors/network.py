"""Common to detectors that are networks."""

import torch
from torch.nn import functional as F

from dnnlib.image_io import as_rgb
from torch_utils import distributed
from torch_utils.files.weights import fingerprint, refuse_differences

MAX_MISSING = 50_000_000  # weights, that are looked for by name


class Network:
    """RGB input on the right device (gray is repeated, what is transparent lies on white), exact
    products, a fingerprint of the weights.

    Subclasses have `_features(images uint8 [N, 3, H, W], outputs) -> {output: [N, D]}`.
    """

    def __init__(self, net: torch.nn.Module, weights: str, device):
        self.device = torch.device(device)
        self.weights = weights
        self.net = net.eval().requires_grad_(False).to(self.device)
        self.fingerprint = fingerprint(sorted(net.state_dict().items()))

    @torch.inference_mode()
    @distributed.exact_float32()
    def __call__(self, images: torch.Tensor, outputs=('features',)) -> dict[str, torch.Tensor]:
        return self._features(as_rgb(images.to(self.device)), outputs)


def build_model(model_class, config, state: dict, source: str) -> torch.nn.Module:
    """A model of `transformers` with exactly these weights, for `load_model`.

    Raises ValueError for sizes that make no sense, UserError for weights that do not fit.
    """
    import transformers  # here, since it takes seconds
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    if config.hidden_size % config.num_attention_heads:
        raise ValueError('hidden_size in its config.json is no multiple of num_attention_heads')
    with torch.device('meta'):  # without memory, whatever the sizes
        net = model_class(config)
    missing = sum(x.numel() for x in net.parameters()) - sum(x.numel() for x in state.values())
    if missing > MAX_MISSING:
        raise ValueError(f'its files lack {missing} of the weights that its config.json asks for')
    # Without a folder it reads no file; it knows older names of weights.
    net, info = net.from_pretrained(
        None, config=config, state_dict=state, dtype=torch.float32, attn_implementation='sdpa',
        trust_remote_code=False, use_safetensors=True, ignore_mismatched_sizes=True,
        output_loading_info=True)
    refuse_differences({
        'lacks': sorted(info['missing_keys']), 'has unknown': sorted(info['unexpected_keys']),
        'has another shape of': sorted(key for key, *_ in info['mismatched_keys'])}, source)
    return net


def resized(images: torch.Tensor, size: int, mean, std) -> torch.Tensor:
    """Images [N, 3, H, W], 0..255, as [N, 3, size, size] (bicubic, antialiased), with the mean and
    deviation of each channel (of values 0..1) taken out.
    """
    x = F.interpolate(images.float(), size=(size, size), mode='bicubic', antialias=True,
                      align_corners=False)
    return (x / 255 - mean.to(x)) / std.to(x)
