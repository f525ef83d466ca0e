"""Instance normalisation whose gradient is right for a single sample too."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class InstanceNorm(nn.Module):
    """Each channel of each sample to mean 0 and variance 1, as ``nn.InstanceNorm2d`` without state.

    By group normalisation with one group a channel, of a contiguous copy. Two faults of torch (seen
    in 2.13 and 2.15, on a CPU) are behind this, both silent: ``nn.InstanceNorm2d`` returns a wrong
    gradient for a batch of one sample, if the gradient it gets is channels-last (as before any
    convolution of a channels-last network); and group normalisation of a channels-last input loses
    the variance of a channel whose mean is much larger.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, X, Y), in its dtype; half precision is summed up in float32."""
        with torch.autocast(x.device.type, enabled=False):  # which on a GPU would return float32
            return F.group_norm(x.contiguous(), x.shape[1])
