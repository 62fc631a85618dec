"""What a state dict without any description says of its network: class and constructor arguments,
from names and shapes.

What names and shapes leave open (heads, order of the attention's channels, image size, noise
schedule) is filled in as the published models have it, and reported, so that users can say
otherwise.
"""

import dataclasses

from torch_utils.files.identify import family
from torch_utils.files.pickles import ForeignPickleError
from training.data.dataset import resolution_of
from training.networks.adm import CHANNEL_MULT


@dataclasses.dataclass
class Architecture:
    """Class name and arguments of a network, those of its noising process (None for classifiers),
    and what of all this was assumed: {name: value}.
    """

    class_name: str
    kwargs: dict
    diffusion: dict | None = None
    assumed: dict = dataclasses.field(default_factory=dict)


def infer(state: dict, options: dict | None = None) -> Architecture:
    """The architecture behind the weights `state` ({name: tensor}); `options` overrides arguments
    by name.

    Raises ForeignPickleError for weights of no known kind, or that are incomplete, or unknown
    options.
    """
    kind = family(state)
    options = options or {}
    if kind not in READERS:
        raise ForeignPickleError('its weights belong to no network that is known here')
    try:
        result = READERS[kind](state, options)
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise ForeignPickleError(
            f'its weights are those of {kind}, but incomplete ({error})') from None
    tables = [result.kwargs, result.diffusion or {}]
    for name, value in options.items():
        table = next((table for table in tables if name in table), None)
        if table is None:
            raise ForeignPickleError(f'{name} is no argument of this network; there are '
                                     f'{", ".join(sorted(tables[0] | tables[1]))}')
        table[name] = value
        result.assumed.pop(name, None)
    return result


def _count(names, prefix: str) -> int:
    """How many children 0, 1, 2, ... there are below `prefix`."""
    found = {name[len(prefix):].partition('.')[0] for name in names if name.startswith(prefix)}
    return next(i for i in range(len(found) + 1) if str(i) not in found)


def _adm(state, options) -> Architecture:
    """Guided diffusion (also improved DDPM): blocks are counted, levels end where the decoder
    doubles the resolution.
    """
    width = state['time_embed.0.weight'].shape[1]
    in_channels = state['input_blocks.0.0.weight'].shape[1]
    blocks = _count(state, 'input_blocks.')
    # The layer that doubles the resolution is the second or third of its block; in guided
    # diffusion it is residual.
    ends = [(i, kind) for i in range(_count(state, 'output_blocks.')) for j in (1, 2)
            for kind in ('conv', 'in_layers.0')
            if f'output_blocks.{i}.{j}.{kind}.weight' in state]
    period = ends[0][0] + 1 if ends else blocks
    if blocks % period or period < 2:
        raise KeyError('numbers of blocks')
    firsts = range(1, blocks, period)
    mult = tuple(state[f'input_blocks.{i}.0.in_layers.2.weight'].shape[0] / width for i in firsts)
    factors = [2**level for level, i in enumerate(firsts)
               if f'input_blocks.{i}.1.qkv.weight' in state]
    updown = any(kind == 'in_layers.0' for _, kind in ends)
    learned = state['out.2.weight'].shape[0] == 2 * in_channels
    published = {widths: size for size, widths in CHANNEL_MULT.items()}.get(mult, 32)
    size = options.get('image_size') or (8 * max(factors) if factors else published)
    assumed = dict(image_size=size, num_heads=4, num_head_channels=-1, num_heads_upsample=-1,
                   use_new_attention_order=updown)
    if updown:
        assumed['num_head_channels'] = 64 if width >= 192 else 32
    kwargs = assumed | dict(
        num_channels=width, num_res_blocks=period - 1, img_channels=in_channels,
        learn_sigma=learned,
        class_cond='label_emb.weight' in state, resblock_updown=updown,
        use_scale_shift_norm=state['input_blocks.1.0.emb_layers.1.weight'].shape[0] == 2
        * round(mult[0] * width),
        # Twice the size is that of no level.
        attention_resolutions=','.join(str(size // factor) for factor in factors) or str(2 * size),
        channel_mult=','.join(f'{m:g}' for m in mult) if all(m == int(m) for m in mult) else '')
    if kwargs['class_cond']:
        kwargs['num_classes'] = len(state['label_emb.weight'])
    schedule = dict(schedule='linear' if size >= 128 else 'cosine', steps=1000, predict='epsilon')
    variance = 'learned_range' if learned else 'fixed_large'
    return Architecture(
        'ADMUNet', kwargs, schedule | dict(variance=variance, rescale_timesteps=False),
        assumed | schedule)


def _ddpm(state, options) -> Architecture:
    """The U-Net of class-balancing diffusion."""
    ch, in_channels = state['head.weight'].shape[:2]
    blocks = _count(state, 'downblocks.')
    ends = [i for i in range(blocks) if f'downblocks.{i}.main.weight' in state]
    firsts = [0, *(i + 1 for i in ends)]
    cond = 'label_embedding.weight' in state
    kwargs = dict(
        T=len(state['time_embedding.timembedding.0.weight']), ch=ch, num_res_blocks=firsts[1] - 1
        if ends else blocks,
        ch_mult=[len(state[f'downblocks.{i}.block1.2.weight']) // ch for i in firsts],
        attn=[level for level, i in enumerate(firsts)
              if f'downblocks.{i}.attn.proj_q.weight' in state],
        dropout=0.1, cond=cond, augm='augm_embedding.weight' in state,
        num_class=len(state['label_embedding.weight']) if cond else 1,
        img_resolution=options.get('img_resolution', 32), img_channels=in_channels)
    assumed = dict(schedule='linear_float32', variance='fixed_large')
    return Architecture('DDPMUNet', kwargs, dict(steps=kwargs['T']) | assumed,
                        dict(img_resolution=32) | assumed)


def _edm2(state, options) -> Architecture:
    """EDM2's U-Net, whose layers have names by the side of their images."""
    layers = [name.split('.')[2] for name in state if name.startswith('unet.enc.')]
    sizes = sorted({tuple(map(int, layer.partition('_')[0].split('x'))) for layer in layers},
                   reverse=True)
    height, width = sizes[0]
    resolution = resolution_of(height, width)
    blocks = [f'unet.enc.{rows}x{columns}_block' for rows, columns in sizes]
    width = len(state['unet.emb_fourier.freqs'])
    labels = state.get('unet.emb_label.weight')
    assumed = dict(channels_per_head=64, use_fp16=True)
    return Architecture('Precond', assumed | dict(
        img_resolution=resolution, img_channels=len(state['unet.out_conv.weight']),
        label_dim=0 if labels is None else labels.shape[1], model_channels=width,
        channel_mult=[len(state[f'{block}0.conv_res1.weight']) // width for block in blocks],
        channel_mult_emb=len(state['unet.emb_noise.weight']) // width,
        num_blocks=_count(state, blocks[0]),
        attn_resolutions=[min(size) for size, block in zip(sizes, blocks, strict=True)
                          if f'{block}0.attn_qkv.weight' in state],
        logvar_channels=len(state['logvar_fourier.freqs'])), assumed=assumed)


def _wrn(state, options) -> Architecture:
    """wrn-<depth>-<widen>."""
    prefix = '1.' if '0.mean' in state else ''
    classes, features = state[f'{prefix}fc.weight'].shape
    depth = 6 * _count(state, f'{prefix}block1.layer.') + 4
    return Architecture('WideResNet', dict(name=f'wrn-{depth}-{features // 64}',
                                           num_classes=classes,
                                           normalize_input=bool(prefix)))


READERS = {'adm': _adm, 'ddpm': _ddpm, 'edm2': _edm2, 'wrn': _wrn}
