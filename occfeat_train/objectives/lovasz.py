"""The Lovász-softmax loss (Berman et al., CVPR 2018): a convex stand-in for mean IoU."""

import torch
from torch import Tensor
from torch.nn import functional as F


def lovasz_softmax(probability: Tensor, label: Tensor) -> Tensor:
    """The mean, over the classes that some item has, of the Lovász extension of 1 - IoU.

    ``probability`` float32 (M, C) and ``label`` int64 (M,), of all items at once; 0 without items.
    """
    if not len(label):
        return probability.sum()
    is_class = F.one_hot(label, probability.shape[1]).to(probability.dtype)
    errors, order = (is_class - probability).abs().sort(dim=0, descending=True)
    truth = is_class.gather(0, order)
    n = is_class.sum(dim=0)
    # If the items with the k largest errors were wrong, this were the classes' 1 - IoU.
    loss = 1 - (n - truth.cumsum(0)) / (n + (1 - truth).cumsum(0))
    steps = torch.cat([loss[:1], loss[1:] - loss[:-1]])
    return (errors * steps).sum(dim=0)[n > 0].mean()
