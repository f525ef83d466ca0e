"""What is trained: a backbone with an objective on top; and its first or learned weights."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from occfeat_targets.store.reader import TargetStore, open_store
from occfeat_train.data.dataset import FrameDataset
from occfeat_train.objectives.base import Batch, Loss, Objective, Targets
from occfeat_train.runs.job import Job
from occfeat_train.runs.run import Run, RunError, check_same_grid
from occfeat_train.sensors.base import Sensor


class Network(nn.Module):
    """One module for DDP; its submodules are the backbone, by its sensor's name for it (such as
    ``bev_net``), and ``objective``."""

    def __init__(self, sensor: Sensor, objective: Objective, frozen: bool = False):
        super().__init__()
        self.sensor, self.frozen = sensor, frozen
        self.add_module(sensor.backbone_name, sensor.backbone(objective.grid))
        self.objective = objective
        self.freeze_batch_norm = sensor.freeze_batch_norm
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.backbone.requires_grad_(not frozen)

    @property
    def backbone(self) -> nn.Module:
        """What is pretrained."""
        return self.get_submodule(self.sensor.backbone_name)

    def forward(
        self, inputs: Batch, targets: Targets, counts: Sequence[float], share: float
    ) -> Loss:
        """Loss and terms of a micro-batch, see :meth:`Objective.forward`."""
        return self.objective(self.backbone(**inputs), targets, counts, share)

    def train(self, mode: bool = True) -> Self:
        """As usual, but a frozen backbone, or frozen batch norms, stay in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        if self.freeze_batch_norm:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


def build_network(job: Job, store: TargetStore, load_weights: bool) -> tuple[Network, str]:
    """The job's network with its starting weights, and a report of where they came from.

    From a run it takes the backbone; the objective stays fresh. The report then says what was
    loaded, what is fresh and what was not used, by part. Raises RunError: the run to start from is
    of another grid or backbone; StoreError: the store lacks what the task needs; WeightsError: from
    :meth:`Sensor.load_first_weights`.
    """
    frozen = job.task is not None and job.config.finetune.freeze_backbone
    network = Network(job.sensor, job.objective(store), frozen)
    if not load_weights:
        return network, ""
    if not job.init:
        return network, job.sensor.load_first_weights(network.backbone)
    run = Run(Path(job.init))
    check_same_grid(run, store)
    state = run.load()[0]["network"]
    name = job.sensor.backbone_name
    theirs = backbone_state(state, name)
    if not theirs:
        raise RunError(f"{run.path} has no {name}, with which a {job.title} begins: name another")
    load_same_tensors(network.backbone, theirs, run.path)
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
    return job.sensor.prepare(batch, network.objective, epoch, device)


def frames_for(
    job: Job, network: Network, frames: Sequence[int], arrays: Sequence[str], training: bool = False
) -> FrameDataset:
    """Frames of the job's store as its network wants them read, with some ``arrays`` besides."""
    sensor = job.sensor
    work = sensor.work(open_store(job.store), network.objective, training)
    check = job.config.data.check_reads if training else True
    return FrameDataset(job.store, frames, (*sensor.arrays, *arrays), check, work)


def backbone_state(state: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The tensors of the backbone ``name`` of a network's, by its own names."""
    prefix = f"{name}."
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
