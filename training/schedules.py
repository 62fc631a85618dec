"""Learning rates as functions of the number of training images seen before the step (`nimg`)."""

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


LR_SCHEDULES = {'edm2': edm2_lr, 'multisource': multisource_lr}
