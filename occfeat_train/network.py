"""What is trained: a BEV network with an objective on top; and its first or learned weights."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from occfeat_targets.store.reader import TargetStore
from occfeat_train.augment import draw, network_inputs
from occfeat_train.models.bev_net import BEVNet, ModelSettings
from occfeat_train.models.encoder_weights import load_encoder_weights
from occfeat_train.objectives.base import Batch, Loss, Objective, Targets
from occfeat_train.runs.job import Job
from occfeat_train.runs.run import Run, RunError, check_same_grid


class Network(nn.Module):
    """One module for DDP; its submodules are ``bev_net`` and ``objective``."""

    def __init__(self, model: ModelSettings, objective: Objective):
        super().__init__()
        self.bev_net = BEVNet(model, objective.grid)
        self.objective = objective
        self.freeze_batch_norm = model.freeze_batch_norm
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def forward(
        self, inputs: Batch, targets: Targets, counts: Sequence[float], share: float
    ) -> Loss:
        """Loss and terms of a micro-batch, see :meth:`Objective.forward`."""
        return self.objective(self.bev_net(**inputs), targets, counts, share)

    def train(self, mode: bool = True) -> Self:
        """As usual, but frozen batch norms stay in evaluation mode."""
        super().train(mode)
        if self.freeze_batch_norm:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


def build_network(job: Job, store: TargetStore, load_weights: bool) -> tuple[Network, str]:
    """The job's network with its starting weights, and a report of where they came from.

    From a run it takes encoder, lifting and decoder; the objective stays fresh. The report then
    says what was loaded, what is fresh and what was not used, by part. Raises RunError: the run to
    start from is of another grid or BEV network; StoreError: the store lacks what the task needs;
    WeightsError: from ``load_encoder_weights``.
    """
    network = Network(job.config.model, job.objective(store))
    if not load_weights:
        return network, ""
    if not job.init:
        encoder = network.bev_net.encoder
        report = load_encoder_weights(encoder, job.config.model.encoder_weights)
        return network, f"encoder: {report}"
    run = Run(Path(job.init))
    check_same_grid(run, store)
    state = run.load()[0]["network"]
    theirs = bev_net_state(state)
    load_same_tensors(network.bev_net, theirs, run.path)
    fresh = network.objective.state_dict()
    return network, (
        f"loaded from {run.path}: {_by_part(theirs)}; fresh: {_by_part(fresh)}; "
        f"not used: {len(state) - len(theirs)} tensors of its {run.description()['kind']} head"
    )


def trained_network(job: Job, run: Run, store: TargetStore) -> tuple[Network, dict]:
    """The network of a run's newest checkpoint, on the CPU, and its position.

    Raises RunError: the run is of another grid, has no checkpoint, or one of another network;
    StoreError: the store lacks what the task needs.
    """
    check_same_grid(run, store)
    network, _ = build_network(job, store, load_weights=False)
    state, position = run.load()
    load_same_tensors(network, state["network"], run.path)
    return network, position


def prepare(
    batch: Batch, job: Job, network: Network, epoch: int, device: torch.device
) -> tuple[Batch, Targets]:
    """A collated batch moved to the device and augmented: network inputs and targets."""
    config = job.config
    frames, n_cameras = batch["frame"], batch["K"].shape[1]
    draws = draw(config.augment, config.run.seed, epoch, frames, n_cameras)
    batch = {name: values.to(device, non_blocking=True) for name, values in batch.items()}
    batch["seed"] = draws.seed
    size, shift, objective = config.model.image_size, config.augment.shift, network.objective
    with torch.no_grad():
        inputs = network_inputs(batch, draws, size, shift, objective.frame(batch))
        return inputs, objective.targets(batch, draws.angle)


def bev_net_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """The BEV network's tensors of a network's, by its own names."""
    prefix = "bev_net."
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def load_same_tensors(module: nn.Module, theirs: Mapping[str, Any], where: Path) -> None:
    """Load weights, or RunError: names or shapes differ from the module's; it names a few."""
    ours = module.state_dict()
    wrong = [f"{k} is missing" for k in ours if k not in theirs]
    wrong += [f"{k} is unknown" for k in theirs if k not in ours]
    for k in ours.keys() & theirs.keys():
        a, b = (getattr(tensors[k], "shape", ()) for tensors in (ours, theirs))
        if a != b:
            wrong.append(f"{k} is {tuple(b)}, should be {tuple(a)}")
    if wrong:
        raise RunError(
            f"the network in {where} is another one ({'; '.join(sorted(wrong)[:3])}; {len(wrong)} "
            "in all): use the model settings it was trained with"
        )
    module.load_state_dict(theirs)


def _by_part(state: Mapping[str, Any]) -> str:
    parts = Counter(name.split(".")[0] for name in state)
    return ", ".join(f"{part} {n}" for part, n in parts.items())
