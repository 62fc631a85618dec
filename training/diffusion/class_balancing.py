"""Class-balancing diffusion models (CBDM, arXiv 2305.00562): training on long-tailed classes, and guided sampling.

Shapes: images x [N,C,H,W] in [-1, 1], steps t [N], labels y [N, classes] (one-hot, zeros for "no label").
"""

import dnnlib
from torch_utils.random import GlobalRandom
from training.diffusion.gaussian import guided_output, run_chain

SAMPLE_METHODS = ('cfg', 'cond', 'uncond')


def cbdm_sampler(net, noise, labels=None, method='cfg', omega=0.0, random=None, ddim_steps=None, eta=0.0):
    """CBDM's sampler for a DiscreteDenoiser: noise [N,C,H,W] -> images in [-1, 1].

    `method` 'cond' uses the labels [N, classes], 'uncond' ignores them, 'cfg' moves the noise from
    the unconditional one by 1 + omega: eps + omega (eps - eps_unconditional). Ancestral over all steps, or DDIM over
    `ddim_steps`. Predicted images are not clipped before the last. Noise is drawn in every step but the last.
    """
    if method not in SAMPLE_METHODS:
        raise dnnlib.UserError(f'sample_method: {method!r} is not one of {", ".join(SAMPLE_METHODS)}')
    random = random or GlobalRandom(noise.device)
    diffusion = net.diffusion if ddim_steps is None else net.diffusion.respaced(ddim_steps)
    output_of = guided_output(net, None if method == 'uncond' else labels, guidance=1 + omega if method == 'cfg' else 1,
                              augm=noise.new_zeros([len(noise), 9]))
    x = run_chain(diffusion, output_of, noise, random, ddim=ddim_steps is not None, eta=eta, clip=False)
    return x.clamp(-1, 1)
