"""The network of a job or run, and the weights it starts with or has learned."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from occfeat_targets.store.reader import TargetStore
from occfeat_train.models.encoder_weights import load_encoder_weights
from occfeat_train.network import Network
from occfeat_train.runs.job import Job
from occfeat_train.runs.run import Run, RunError, check_same_grid

BEV_NET = "bev_net."
"""What the names of a BEV network's tensors begin with in a checkpoint."""


def bev_net_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """The BEV network's tensors of a network's, by its own names."""
    return {k.removeprefix(BEV_NET): v for k, v in state.items() if k.startswith(BEV_NET)}


def build_network(job: Job, store: TargetStore, load_weights: bool) -> tuple[Network, str]:
    """The job's network with its starting weights, and a report of where they came from.

    Raises:
        RunError: the run to start from does not fit.
        StoreError: the store lacks what the task needs.
        WeightsError: from ``load_encoder_weights``.
    """
    network = Network(job.config.model, job.objective(store))
    if not load_weights:
        return network, ""
    if job.init:
        return network, copy_bev_net(network, Run(Path(job.init)), store)
    encoder = network.bev_net.encoder
    return network, "encoder: " + load_encoder_weights(encoder, job.config.model.encoder_weights)


def trained_network(job: Job, run: Run, store: TargetStore) -> tuple[Network, dict]:
    """The network of a run's newest checkpoint, on the CPU, and its position.

    Raises:
        RunError: the run is of another grid, has no checkpoint, or one of another network.
        StoreError: the store lacks what the task needs.
    """
    check_same_grid(run, store)
    network = build_network(job, store, load_weights=False)[0]
    state, position = run.load()
    load_same_tensors(network, state["network"], run.path)
    return network, position


def copy_bev_net(network: Network, run: Run, store: TargetStore) -> str:
    """Copy encoder, lifting and decoder from a run; the objective stays fresh.

    Returns what was loaded, what is fresh and what was not used, by part, or RunError: the run is
    of another grid, or a tensor is missing or of another shape.
    """
    check_same_grid(run, store)
    state = run.load()[0]["network"]
    theirs = bev_net_state(state)
    load_same_tensors(network.bev_net, theirs, run.path)
    fresh = network.objective.state_dict()
    return (
        f"loaded from {run.path}: {_by_part(theirs)}; fresh: {_by_part(fresh)}; "
        f"not used: {len(state) - len(theirs)} tensors of its {run.description()['kind']} head"
    )


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
