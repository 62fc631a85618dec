"""The presets of EDM2's recipe: what train_edm2.py sets for each, and the networks."""

import re

# Width of the network and dropout for each size.
SIZES = {'xxs': (64, 0.0), 'xs': (128, 0.0), 's': (192, 0.0), 'm': (256, 0.1), 'l': (320, 0.1),
         'xl': (384, 0.1), 'xxl': (448, 0.1)}


def _preset(size: str, duration: int, lr: float, decay: int, **others) -> dict:
    """Settings for `duration` images; `others` are those that differ from most presets'."""
    channels, dropout = SIZES[size]
    return dict(
        duration=duration, batch=2048, channels=channels, dropout=dropout, lr=lr, decay=decay,
        lr_schedule='edm2', rampup_Mimg=10, ema_stds=[0.05, 0.10], P_mean=-0.4, P_std=1.0,
        status=128 << 10, snapshot=8 << 20, checkpoint=128 << 20, network={}) | others


# Published EDM2 (arXiv 2312.02696, Table 6): latents of 512x512, then pixels of 64x64.
PRESETS = {f'edm2-img512-{size}': _preset(size, mimg << 20, lr, 70000) for size, mimg, lr in [
    ('xxs', 2048, 0.0170),
    ('xs', 2048, 0.0120),
    ('s', 2048, 0.0100),
    ('m', 2048, 0.0090),
    ('l', 1792, 0.0080),
    ('xl', 1280, 0.0070),
    ('xxl', 896, 0.0065),
]} | {f'edm2-img64-{size}': _preset(size, mimg << 20, lr, 35000, P_mean=-0.8, P_std=1.6)
      for size, mimg, lr in [
    ('xs', 1024, 0.0120),
    ('s', 1024, 0.0100),
    ('m', 2048, 0.0090),
    ('l', 1024, 0.0080),
    ('xl', 640, 0.0070),
]}
# Multi-source study (arXiv 2502.14583): latents of 256x256; classes, images of each class.
PRESETS |= {f'edm2-img256-xs-{data}': _preset('xs', mimg << 20, lr, decay,
                                              lr_schedule='multisource')
            for data, mimg, lr, decay in [
    ('1c-100', 48, 0.004, 4000),
    ('1c-500', 128, 0.004, 2000),
    ('1c-1000', 176, 0.005, 2500),
    ('3c-100', 64, 0.002, 2000),
    ('3c-500', 64, 0.002, 2500),
    ('3c-1000', 64, 0.002, 2500),
    ('5c-100', 64, 0.004, 4000),
    ('5c-500', 128, 0.006, 4000),
    ('5c-1000', 96, 0.006, 4000),
    ('10c-100', 64, 0.003, 3000),
    ('10c-500', 96, 0.003, 3000),
    ('10c-1000', 384, 0.006, 3000),
    ('10c-1000-nlr', 1536, 0.004, 6000),
]}
# A network for 8x8 digits that a CPU trains in minutes (bash_files/quickstart.sh).
PRESETS['digits'] = _preset(
    'xxs', 72 << 10, 0.0150, 300, batch=64, channels=32, P_std=1.2, rampup_Mimg=0.02,
    status=8 << 10, snapshot=72 << 10, checkpoint=24 << 10,
    network=dict(channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], channels_per_head=32))


def multiples() -> dict[str, int]:
    """{beginning of presets' names: what the side of the images must be a multiple of}."""
    result = {}
    for preset in PRESETS:
        network = network_of(preset)
        levels = len(network.get('channel_mult', range(4)))    # as Precond has by default
        pixels = 8 if network['img_channels'] == 4 else 1      # of a latent
        result[re.match(r'edm2-img\d+|.*', preset)[0]] = pixels << levels - 1
    return result


def network_of(preset: str) -> dict:
    """Arguments of `build_network` for a preset, with the images and classes of its name."""
    settings = PRESETS[preset]
    side = re.search(r'img(\d+)', preset)
    classes = re.search(r'-(\d+)c-', preset)
    side = int(side[1]) if side else 8
    latents = side > 64                    # an eighth of the side
    return dict(
        class_name='Precond', model_channels=settings['channels'], **settings['network'],
        img_resolution=side // 8 if latents else side, img_channels=4 if latents else 3,
        label_dim=int(classes[1]) if classes else 1000 if side > 8 else 10)
