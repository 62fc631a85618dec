"""What a state dict without any description says of its network: class and constructor arguments, from names and shapes.

What names and shapes leave open (heads, order of the attention's channels, image size, noise schedule) is filled in as
the published models have it, and reported, so that users can say otherwise.
"""

import dataclasses

from torch_utils.files.identify import family
from torch_utils.files.pickles import ForeignPickleError

# Widths of the levels of guided diffusion in base widths -> image size.
_SIZE_OF_MULT = {(1, 2, 2, 2): 32, (1, 2, 3, 4): 64, (1, 1, 2, 3, 4): 128, (1, 1, 2, 2, 4, 4): 256,
                 (0.5, 1, 1, 2, 2, 4, 4): 512}


@dataclasses.dataclass
class Architecture:
    """Class name and arguments of a network, those of its noising process (None for classifiers), and what of all this
    was assumed: {name: value}."""

    class_name: str
    kwargs: dict
    diffusion: dict | None = None
    assumed: dict = dataclasses.field(default_factory=dict)


def infer(state: dict, options: dict | None = None) -> Architecture:
    """The architecture behind the weights `state` ({name: tensor}); `options` overrides arguments by name.

    Raises ForeignPickleError for weights of no known kind, or that are incomplete, or unknown options.
    """
    kind = family(state)
    if kind not in ('adm', 'ddpm', 'wrn'):
        raise ForeignPickleError('its weights belong to no network that is known here')
    try:
        found = {'adm': _adm, 'ddpm': _ddpm, 'wrn': _wrn}[kind](state, dict(options or {}))
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise ForeignPickleError(f'its weights are those of {kind}, but incomplete ({error})') from None
    for name, value in (options or {}).items():
        table = next((t for t in (found.kwargs, found.diffusion or {}) if name in t), None)
        if table is None:
            known = ', '.join(sorted({*found.kwargs, *(found.diffusion or {})}))
            raise ForeignPickleError(f'{name} is no argument of this network; there are {known}')
        table[name] = value
        found.assumed.pop(name, None)
    return found


def _count(names, prefix: str) -> int:
    """How many children 0, 1, 2, ... there are below `prefix`."""
    found = {name[len(prefix):].partition('.')[0] for name in names if name.startswith(prefix)}
    return next(i for i in range(len(found) + 1) if str(i) not in found)


def _adm(state, options) -> Architecture:
    """Guided diffusion (also improved DDPM): blocks are counted, levels end where the decoder doubles the resolution."""
    width, in_channels = state['time_embed.0.weight'].shape[1], state['input_blocks.0.0.weight'].shape[1]
    blocks = _count(state, 'input_blocks.')
    ups = [i for i in range(_count(state, 'output_blocks.')) for j in (1, 2)
           if f'output_blocks.{i}.{j}.conv.weight' in state or f'output_blocks.{i}.{j}.in_layers.0.weight' in state]
    period = ups[0] + 1 if ups else blocks
    levels = blocks // period
    if levels * period != blocks or period < 2:
        raise ForeignPickleError('its weights are those of guided diffusion, but incomplete')
    firsts = [1 + level * period for level in range(levels)]
    mult = tuple(state[f'input_blocks.{i}.0.in_layers.2.weight'].shape[0] / width for i in firsts)
    factors = [2**level for level, i in enumerate(firsts) if f'input_blocks.{i}.1.qkv.weight' in state]
    updown = any(f'output_blocks.{i}.{j}.in_layers.0.weight' in state for i in ups for j in (1, 2))
    scale_shift = state['input_blocks.1.0.emb_layers.1.weight'].shape[0] == 2 * round(mult[0] * width)
    learned = state['out.2.weight'].shape[0] == 2 * in_channels

    size = options.get('image_size') or (8 * max(factors) if factors else _SIZE_OF_MULT.get(mult, 32))
    assumed = dict(image_size=size)
    if updown:      # guided diffusion
        assumed |= dict(num_heads=4, num_head_channels=64 if width >= 192 else 32, use_new_attention_order=True)
    else:           # improved DDPM
        assumed |= dict(num_heads=4, num_head_channels=-1, use_new_attention_order=False)
    assumed['num_heads_upsample'] = -1
    kwargs = assumed | dict(
        num_channels=width, num_res_blocks=period - 1, img_channels=in_channels, learn_sigma=learned,
        class_cond='label_emb.weight' in state, use_scale_shift_norm=scale_shift, resblock_updown=updown,
        attention_resolutions=','.join(str(size // factor) for factor in factors) or str(2 * size),  # none of them: no level
        channel_mult=','.join(f'{m:g}' for m in mult) if all(m == int(m) for m in mult) else '')
    if kwargs['class_cond']:
        kwargs['num_classes'] = state['label_emb.weight'].shape[0]
    schedule = dict(schedule='linear' if size >= 128 else 'cosine', steps=1000)
    return Architecture('ADMUNet', kwargs, schedule | dict(variance='learned_range' if learned else 'fixed_large'),
                        assumed | schedule)


def _ddpm(state, options) -> Architecture:
    """The U-Net of class-balancing diffusion."""
    ch, in_channels = state['head.weight'].shape[:2]
    blocks = _count(state, 'downblocks.')
    downs = [i for i in range(blocks) if f'downblocks.{i}.main.weight' in state]
    firsts = [0, *(i + 1 for i in downs)]
    count = downs[0] if downs else blocks
    kwargs = dict(
        T=state['time_embedding.timembedding.0.weight'].shape[0], ch=ch, num_res_blocks=count,
        ch_mult=[state[f'downblocks.{i}.block1.2.weight'].shape[0] // ch for i in firsts],
        attn=[level for level, i in enumerate(firsts) if f'downblocks.{i}.attn.proj_q.weight' in state],
        dropout=0.1, cond='label_embedding.weight' in state, augm='augm_embedding.weight' in state,
        num_class=state['label_embedding.weight'].shape[0] if 'label_embedding.weight' in state else 1,
        img_resolution=options.get('img_resolution', 32), img_channels=in_channels)
    diffusion = dict(schedule='linear_float32', steps=kwargs['T'], variance='fixed_large')
    return Architecture('DDPMUNet', kwargs, diffusion,
                        dict(img_resolution=32, schedule='linear_float32', variance='fixed_large'))


def _wrn(state, options) -> Architecture:
    """wrn-<depth>-<widen>."""
    prefix = '1.' if '0.mean' in state else ''
    classes, features = state[f'{prefix}fc.weight'].shape
    depth = 6 * _count(state, f'{prefix}block1.layer.') + 4
    return Architecture('WideResNet', dict(name=f'wrn-{depth}-{features // 64}', num_classes=classes,
                                           normalize_input=bool(prefix)))
