"""Loss scaling for float16 gradients that finds its own scale, as in guided diffusion."""

import dataclasses

import torch


@dataclasses.dataclass
class DynamicLossScale:
    """The loss is multiplied by 2^lg: lg grows by `growth` with every good step, and falls by 1
    when gradients overflow.
    """

    lg: float = 20.0
    growth: float = 0.001

    @property
    def value(self) -> float:
        """2^lg."""
        return 2.0 ** self.lg

    def update(self, grads: list[torch.Tensor], norms_of=torch._foreach_norm) -> bool:
        """Whether the scaled gradients have a finite norm; the next step's scale follows from it.

        Processes whose gradients are equal (after their exchange) decide alike. Waits for the
        device.
        """
        # float64: the squares of finite gradients may overflow float32.
        norms = norms_of(grads, dtype=torch.float64)
        finite = bool(torch.isfinite(torch.stack(norms)).all())
        self.lg += self.growth if finite else -1
        return finite
