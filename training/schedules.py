"""Learning rates and factors of averages: functions of the images before the step (`nimg`)."""

import functools
import math

# --- Learning rates: (nimg, batch, lr, settings) -> rate of the step ----------------------------


def _rampup(nimg, length):
    return min(nimg / length, 1) if length > 0 else 1


def edm2_lr(nimg, batch, lr, decay=70000, rampup_Mimg=10, drop=1):
    """EDM2: linear warm-up over `rampup_Mimg` million images, inverse square root decay after
    `decay` batches (arXiv 2312.02696, Eq. 67). `decay=0` or `rampup_Mimg=0` turns that part off.

    drop  the rate is divided by its square root at once when decay starts
    """
    if decay > 0 and nimg > decay * batch:
        lr = lr / math.sqrt(drop * nimg / (decay * batch))
    return lr * _rampup(nimg, rampup_Mimg * 1e6)


# The multi-source study (arXiv 2502.14583): it halves at once when decay starts.
multisource_lr = functools.partial(edm2_lr, drop=4)


def edm_lr(nimg, batch, lr, rampup_kimg=10000):
    """EDM (arXiv 2206.00364): linear warm-up over `rampup_kimg` thousand images, then constant."""
    return lr * min(nimg / max(rampup_kimg * 1000, 1e-8), 1)


def warmup_lr(nimg, batch, lr, warmup=5000):
    """DDPM and CBDM: linear warm-up over `warmup` steps (0: none); step 0 has rate 0."""
    return lr * _rampup(nimg / batch, warmup)


def anneal_lr(nimg, batch, lr, anneal_steps=0):
    """ADM: falls linearly to zero over `anneal_steps` steps; 0 turns it off.

    The rate is set after each step, from the number of that step, so steps 0 and 1 both have the
    full rate.
    """
    return lr * (1 - max(nimg // batch - 1, 0) / anneal_steps) if anneal_steps > 0 else lr


def cosine_lr(nimg, batch, lr, duration, rampup=0):
    """Half a cosine from `lr` to zero over `duration` images; linear warm-up over `rampup`
    images.
    """
    return lr / 2 * (1 + math.cos(math.pi * min(nimg / duration, 1))) * _rampup(nimg, rampup)


LR_SCHEDULES = {
    'edm2': edm2_lr, 'multisource': multisource_lr, 'edm': edm_lr, 'warmup': warmup_lr,
    'anneal': anneal_lr, 'cosine': cosine_lr, 'constant': lambda nimg, batch, lr: lr,
}


# --- Factors of averages: settings -> beta(nimg, batch), see training.ema -----------------------


def warmup_beta(decay):
    """beta = min(decay, (1 + step) / (10 + step)), so that the start is soon forgotten."""
    def beta(nimg, batch):
        step = nimg / batch
        return min(decay, (1 + step) / (10 + step))
    return beta


# The rules of the memorization study (arXiv 2310.02664): (h, batch, q, final) -> beta.
EMA_MODES = {
    'mode1': lambda h, batch, q, final: 0.5 ** (batch / h),
    'mode2': lambda h, batch, q, final: 0.5 ** (512 / h / q),
    'mode3': lambda h, batch, q, final: 0.5 ** (batch / 500_000),
    'mode4': lambda h, batch, q, final: final / 0.5 ** (batch / 500_000) * 0.5 ** (batch / h / q),
}


def memorization_beta(mode, halflife_kimg, data_ratio=1.0, final_ema=0.99929, rampup_ratio=0.05):
    """The rules of the memorization study, with h = min(half-life, rampup_ratio * images before
    the step) in images (rampup_ratio None or 0: the half-life), and q = `data_ratio`.

    mode1: EDM's rule; mode2: 0.5^(512 / h / q), whatever the batch; mode3: 0.5^(batch / 500,000),
    constant; mode4: final_ema / 0.5^(batch / 500,000) * 0.5^(batch / h / q).
    """
    def beta(nimg, batch):
        h = halflife_kimg * 1000
        if rampup_ratio:
            h = min(h, nimg * rampup_ratio)
        return EMA_MODES[mode](max(h, 1e-8), batch, data_ratio, final_ema)
    return beta


def memorization_scaling(num_images, duration=200, ema=0.5, rampup=10):
    """Lengths of a training run on `num_images` images, scaled so that each is seen as often as in
    the standard run on 50,000, for which `duration`, the EMA half-life `ema` and the learning-rate
    ramp are given in millions of images.
    """
    return dict(total_kimg=max(int(duration * num_images / 50), 1),
                ema_halflife_kimg=int(ema * num_images / 50),
                lr_rampup_kimg=int(rampup * num_images / 50), data_ratio=50_000 / num_images)
