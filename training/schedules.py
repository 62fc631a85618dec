"""Learning rates and EMA factors as functions of the number of training images seen before the step (`nimg`)."""

import math


def edm2_lr(nimg, batch, lr, decay=70000, rampup_Mimg=10):
    """EDM2: linear warm-up over `rampup_Mimg` million images, inverse square root decay after `decay` batches.

    arXiv 2312.02696, Eq. 67. `decay=0` or `rampup_Mimg=0` turns that part off.
    """
    if decay > 0:
        lr = lr / math.sqrt(max(nimg / (decay * batch), 1))
    return lr * _rampup(nimg, rampup_Mimg)


def multisource_lr(nimg, batch, lr, decay=70000, rampup_Mimg=10):
    """The rule of the multi-source study (arXiv 2502.14583): as EDM2, but the rate halves at once when decay starts."""
    if decay > 0 and nimg / (decay * batch) > 1:
        lr = lr / math.sqrt(4 * nimg / (decay * batch))
    return lr * _rampup(nimg, rampup_Mimg)


def _rampup(nimg, rampup_Mimg):
    return min(nimg / (rampup_Mimg * 1e6), 1) if rampup_Mimg > 0 else 1


def edm_lr(nimg, batch, lr, rampup_kimg=10000):
    """EDM (arXiv 2206.00364): linear warm-up over `rampup_kimg` thousand images, constant after it."""
    return lr * min(nimg / max(rampup_kimg * 1000, 1e-8), 1)


def warmup_lr(nimg, batch, lr, warmup=5000):
    """DDPM and CBDM: linear warm-up over the first `warmup` steps; step 0 has rate 0. `warmup=0` turns it off."""
    return lr * min(nimg / batch / warmup, 1) if warmup > 0 else lr


def anneal_lr(nimg, batch, lr, anneal_steps=0):
    """ADM: falls linearly to zero over `anneal_steps` steps; 0 turns it off. The rate is set after each step, from the
    number of that step, so steps 0 and 1 both have the full rate.
    """
    return lr * (1 - max(nimg // batch - 1, 0) / anneal_steps) if anneal_steps > 0 else lr


LR_SCHEDULES = {
    'edm2': edm2_lr, 'multisource': multisource_lr, 'edm': edm_lr, 'warmup': warmup_lr, 'anneal': anneal_lr,
}


# --- EMA factors: functions beta(nimg, batch) for `training.ema.TraditionalEMA` ---------------------------------------


def edm_beta(halflife_kimg=500, rampup_ratio=0.05):
    """EDM: beta = 0.5^(batch / h), h = min(halflife, rampup_ratio * images before the step); None: no ramp-up."""
    def beta(nimg, batch):
        return 0.5 ** (batch / max(_halflife(nimg, halflife_kimg, rampup_ratio), 1e-8))
    return beta


def memorization_beta(mode, halflife_kimg, data_ratio=1.0, final_ema=0.99929, rampup_ratio=0.05):
    """The rules of the memorization study (arXiv 2310.02664), with h as in `edm_beta` and q = `data_ratio`:

    mode1: EDM's rule; mode2: 0.5^(512 / h / q), whatever the batch; mode3: 0.5^(batch / 500,000), constant;
    mode4: final_ema / 0.5^(batch / 500,000) * 0.5^(batch / h / q).
    Raises ValueError for another mode.
    """
    def beta(nimg, batch):
        h = max(_halflife(nimg, halflife_kimg, rampup_ratio), 1e-8)
        constant = 0.5 ** (batch / 500_000)
        if mode == 'mode1':
            return 0.5 ** (batch / h)
        if mode == 'mode2':
            return 0.5 ** (512 / h / data_ratio)
        if mode == 'mode3':
            return constant
        return final_ema / constant * 0.5 ** (batch / h / data_ratio)

    if mode not in EMA_MODES:
        raise ValueError(f'EMA mode {mode!r} is unknown; choose {", ".join(EMA_MODES)}')
    return beta


EMA_MODES = ('mode1', 'mode2', 'mode3', 'mode4')


def _halflife(nimg, halflife_kimg, rampup_ratio):
    h = halflife_kimg * 1000
    return h if rampup_ratio is None else min(h, nimg * rampup_ratio)


def memorization_scaling(num_images, duration=200, ema=0.5, rampup=10):
    """Lengths of a training run on `num_images` images, scaled so that each image is seen as often as in the standard
    run on 50,000 for which `duration`, the EMA half-life `ema` and the learning-rate ramp are given in millions of images.
    """
    return dict(total_kimg=max(int(duration * num_images / 50), 1), ema_halflife_kimg=int(ema * num_images / 50),
                lr_rampup_kimg=int(rampup * num_images / 50), data_ratio=50_000 / num_images)
