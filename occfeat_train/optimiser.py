"""What changes the weights: optimisers and their rates over a training."""

import math
from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from occfeat_targets.store.settings import ConfigError
from occfeat_train.network import Network
from occfeat_train.optimiser_settings import OptimiserSettings


def make_optimiser(
    network: Network, settings: OptimiserSettings, lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """The optimiser of a network's weights that learn. ConfigError: its backbone has no layers."""
    make = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    more = {} if settings.name != "sgd" else settings.model_dump(include={"momentum", "dampening"})
    groups = parameter_groups(network, settings, lr, weight_decay)
    return make[settings.name](groups, lr=lr, weight_decay=weight_decay, **more)


def parameter_groups(
    network: Network, settings: OptimiserSettings, lr: float, weight_decay: float
) -> list[dict]:
    """Parameters that share a rate. One group, unless layers or the head have their own."""
    learning = [p for p in network.parameters() if p.requires_grad]
    if settings.layer_decay == 1 and settings.head_lr_factor == 1:
        return [{"params": learning}]
    backbone = [network.backbone]
    if settings.layer_decay < 1:
        layers = getattr(network.backbone, "in_layers", None)
        if layers is None:
            raise ConfigError("optimiser.layer_decay is for lidar networks: leave it at 1")
        backbone = layers()
    groups = []
    for i, module in enumerate([*backbone, network.objective]):
        is_head = i == len(backbone)
        factor = settings.head_lr_factor if is_head else settings.layer_decay ** (len(backbone) - i)
        for is_vector in (False, True):
            chosen = [
                p for p in module.parameters() if p.requires_grad and (p.ndim <= 1) == is_vector
            ]
            decay = 0.0 if is_vector and settings.layer_decay < 1 else weight_decay
            if chosen:
                groups.append({"params": chosen, "lr": lr * factor, "weight_decay": decay})
    return groups


def make_schedule(
    optimiser: torch.optim.Optimizer,
    settings: OptimiserSettings,
    lr: float,
    total_steps: int,
    epochs: int,
) -> LRScheduler | None:
    """Rates over the steps of so many epochs, all groups' in proportion; None: constant."""
    if settings.schedule == "onecycle":
        return OneCycleLR(
            optimiser,
            [group["lr"] for group in optimiser.param_groups],
            total_steps + 1,  # it is stepped once more after the last step
            pct_start=max(0.05, 1.5 / (total_steps + 1)),  # torch wants more than one step up
            anneal_strategy="linear",
            cycle_momentum=False,
        )
    if settings.schedule == "cosine":
        warmup = settings.warmup_epochs * total_steps / epochs
        return LambdaLR(optimiser, cosine(total_steps, warmup, settings.min_lr / lr))
    return None


def cosine(total: int, warmup: float, least: float) -> Callable[[int], float]:
    """Part of the rate at each step: from 0 linearly up over ``warmup`` steps, then by a cosine
    down to ``least`` (WI ``utils/scheduler.py``)."""

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        share = (step - warmup) / max(1e-9, total - warmup)
        return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))

    return factor
