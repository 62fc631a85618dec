"""The presets of EDM2's recipe: what train_edm2.py sets for each, and the networks."""

import re

from dnnlib.util import format_count, format_time

EDM_LABELS = 9  # numbers that EDM's augmentation tells the network
# Width of the network and dropout for each size.
SIZES = {'xxs': (64, 0.0), 'xs': (128, 0.0), 's': (192, 0.0), 'm': (256, 0.1), 'l': (320, 0.1),
         'xl': (384, 0.1), 'xxl': (448, 0.1)}


def _preset(size: str, duration: int, lr: float, decay: int, **others) -> dict:
    """Settings for `duration` images; `others` are those that differ from most presets'."""
    channels, dropout = SIZES[size]
    return dict(
        duration=duration, batch=2048, channels=channels, dropout=dropout, lr=lr, decay=decay,
        lr_schedule='edm2', rampup_Mimg=10, ema_stds=[0.05, 0.10], P_mean=-0.4, P_std=1.0,
        xflip=False, augment=0.0, status=128 << 10, snapshot=8 << 20, checkpoint=128 << 20,
        network={}) | others


LEAST_RAMPUP = 0.05  # share of a run shorter than its preset's


def rampup(preset: str, duration: int) -> float:
    """Millions of images over which the learning rate of a preset grows from zero in a run of
    `duration` images: as many as in the preset, but of a shorter run at most the preset's share,
    or LEAST_RAMPUP if that is more.
    """
    whole, published = (PRESETS[preset][key] for key in ('rampup_Mimg', 'duration'))
    return min(whole, max(whole * (duration / published), LEAST_RAMPUP * duration / 1e6))


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


# --- One's own photographs: 200 to 50,000 of them, with or without classes -----------------------


def _photos(lr: float, channels: int, P_mean: float, P_std: float, dropout: float,
            augment: float, **network) -> dict:
    """Settings for photographs, from the nearest published recipes:

    batch       256: an eighth of EDM2's, in memory and in images for the same number of steps
    lr          EDM2's of such a width, by the root of the batch (an eighth: 0.35 times)
    duration    65,536 steps; the rate rises in 3% of them and decays after 8%, as in EDM2
    dropout     EDM's of small sets, in which a network would soon know each image
    augment     EDM's; it mirrors half of the images and tells the network, so that none is made
                mirrored, which `xflip` would do. Latents cannot be changed so, and have neither
    P_mean, P_std  levels of the noise: EDM's for 32 pixels, EDM2's for 64 and for latents; twice
                the side needs twice the noise (arXiv 2301.11093)
    ema_stds    EDM2's, between and around which reconstruct_phema.py makes all others
    """
    return _preset('xs', 16 << 20, lr, 5000, channels=channels, batch=256, dropout=dropout,
                   augment=augment, P_mean=P_mean, P_std=P_std, rampup_Mimg=0.5,
                   status=64 << 10, snapshot=2 << 20, checkpoint=4 << 20, network=network)


PRESETS |= {
    'photos-32': _photos(0.006, 96, -1.2, 1.2, 0.13, 0.12, channel_mult=[1, 2, 2], num_blocks=2),
    'photos-64': _photos(0.005, 96, -0.8, 1.6, 0.15, 0.15, num_blocks=2),
    'photos-128': _photos(0.006, 64, -0.1, 1.6, 0.15, 0.15, channel_mult=[1, 2, 3, 4, 4],
                          num_blocks=2),
    # The network of EDM2-XS, so that it can start from a published one.
    'photos-256': _photos(0.004, 128, -0.4, 1.0, 0.10, 0.0, attn_resolutions=[8, 4]),
}
# Of their networks: million parameters, GFLOP of a training step of an image (a multiplication and
# its addition are one), GiB of weights, gradients, optimizer and averages, MiB of each image at a
# time in float16, by the calculation of a dry run.
COSTS = {
    'photos-32': (15.9, 12.28, 0.356, 18.3),
    'photos-64': (54.3, 60.25, 1.214, 71.6),
    'photos-128': (35.6, 105.9, 0.795, 183.4),
    'photos-256': (124.2, 33.52, 2.776, 29.9),
}
# What is assumed of machines, in multiplications with additions a second: an H100 does matrices of
# 16 bits at 700 TFLOP/s, and training gets 40% of it; two cores 250 GFLOP/s and 50%.
RATES = {'H100': 700e12 / 2 * 0.4, 'two cores': 250e9 / 2 * 0.5}


def photos_table() -> list[str]:
    """What the presets for photographs take, by calculation: lines of a table."""
    rows = ['| preset | learns | parameters | GPU memory, 256 images at a time (32) | '
            f'{" | ".join(f"{name}: images/s, 16Mi" for name in RATES)} |',
            '| --- ' * (4 + len(RATES)) + '|']
    for preset, (parameters, gflop, fixed, each) in COSTS.items():
        whole, few = (fixed + count * each / 1024 for count in (256, 32))
        speeds = [rate / (gflop * 1e9) for rate in RATES.values()]
        speeds = [f'{speed:,.{int(speed < 10)}f}, {format_time((16 << 20) / speed)}'
                  for speed in speeds]
        rows.append(f'| `{preset}` | {_images(network_of(preset))} | {parameters}M | '
                    f'{whole:.1f} GiB ({few:.1f}) | {" | ".join(speeds)} |')
    return rows


def _images(network: dict) -> str:
    side = network['img_resolution']
    latents = network['img_channels'] == 4
    return f'{side * 8 if latents else side} pixels' + f' as {side}x{side} latents' * latents


def listing() -> list[str]:
    """A line on each preset, and what those for photographs take."""
    lines = []
    for preset, settings in PRESETS.items():
        network = network_of(preset)
        lines.append(
            f'{preset:24} {_images(network)}, {network["label_dim"] or "any"} classes: '
            f'{format_count(settings["duration"])} images of batch {settings["batch"]}, width '
            f'{settings["channels"]}, lr {settings["lr"]:g}, dropout {settings["dropout"]:g}, '
            f'augment {settings["augment"]:g}')
    return [*lines, '', *photos_table()]


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
    side = re.search(r'(?:img|photos-)(\d+)', preset)
    classes = re.search(r'-(\d+)c-', preset)
    side = int(side[1]) if side else 8
    latents = side > 128                   # an eighth of the side
    labels = 0 if 'photos' in preset else 1000 if side > 8 else 10
    return augmented(settings, dict(
        class_name='Precond', model_channels=settings['channels'], **settings['network'],
        img_resolution=side // 8 if latents else side, img_channels=4 if latents else 3,
        label_dim=int(classes[1]) if classes else labels))


def augmented(settings: dict, network: dict) -> dict:
    """Arguments of a network, which is told of the augmentations of its training, if any."""
    return network | ({'augment_dim': EDM_LABELS} if settings['augment'] else {})
