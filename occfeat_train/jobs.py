"""What a run is asked to do, as one plain description that its directory keeps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from occfeat_common.settings import from_plain, to_plain
from occfeat_targets.store.schema import TargetStore
from occfeat_train import runs
from occfeat_train.config import FinetuneConfig, PretrainConfig, TrainConfig
from occfeat_train.models.encoder_weights import load_encoder_weights
from occfeat_train.objectives import OBJECTIVES, Network
from occfeat_train.runs import Run, RunError


@dataclass(frozen=True)
class Job:
    """One pretraining or finetuning."""

    kind: str
    """``pretrain`` or ``finetune``."""
    store: str
    config: TrainConfig
    fraction: float = 1.0
    """Share of the training frames."""
    fraction_unit: str = "scene"
    init: str | None = None
    """Run directory whose network this one starts from; None starts from encoder weights."""
    task: str | None = None
    """What a finetuning learns, one of :data:`config.TASKS`; None for a pretraining."""

    @property
    def plan(self) -> PretrainConfig | FinetuneConfig:
        """The settings of its kind: epochs, batch, rates."""
        return getattr(self.config, self.kind)

    @property
    def objective(self) -> str:
        """What it learns, a key of :data:`objectives.OBJECTIVES`."""
        return self.task or self.config.pretrain.objective

    @property
    def title(self) -> str:
        """For people: ``occfeat pretraining``, ``map segmentation``."""
        return f"{self.objective} {'segmentation' if self.task else 'pretraining'}"

    def describe(self, store: TargetStore) -> dict:
        """For ``run.json``."""
        return {
            "kind": self.kind,
            "task": self.task,
            "created": runs.timestamp(),
            "store": self.store,
            "store_identity": runs.identity(store),
            "fraction": self.fraction,
            "fraction_unit": self.fraction_unit,
            "init": self.init,
            "config": to_plain(self.config),
            "versions": runs.versions(),
        }

    @classmethod
    def of_run(cls, run: Run, store: str | None = None) -> Job:
        """The job of an existing run; ``store`` if it has moved."""
        said = run.description()
        return cls(
            said["kind"],
            store or said["store"],
            from_plain(TrainConfig, said["config"]),
            said["fraction"],
            said["fraction_unit"],
            said["init"],
            # Runs of before there was a choice are of vehicles.
            said.get("task", "vehicle" if said["kind"] == "finetune" else None),
        )


def split_names(name: str, role: str) -> tuple[str, ...]:
    """Splits to use for ``train`` or ``val``: a store holds those of one nuScenes version."""
    return (role, f"mini_{role}") if name == "auto" else (name,)


def build_network(job: Job, store: TargetStore, load_weights: bool) -> tuple[Network, str]:
    """The job's network with its starting weights, and a report of where they came from.

    Raises:
        RunError: the run to start from does not fit.
        StoreError: the store lacks what the task needs.
        WeightsError: from ``load_encoder_weights``.
    """
    network = Network(job.config, OBJECTIVES[job.objective](job.config, store))
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
    runs.check_same_grid(run, store)
    network = build_network(job, store, load_weights=False)[0]
    state, position = run.load()
    require_same_tensors(network.state_dict(), state["network"], str(run.path))
    network.load_state_dict(state["network"])
    return network, position


def copy_bev_net(network: Network, run: Run, store: TargetStore) -> str:
    """Copy encoder, lifting and decoder from a run; the objective stays fresh.

    Returns:
        What was loaded, what is fresh and what was not used, by part.

    Raises:
        RunError: the run is of another grid, or a tensor is missing or of another shape.
    """
    runs.check_same_grid(run, store)
    state = run.load()[0]["network"]
    prefix = "bev_net."
    theirs = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    require_same_tensors(network.bev_net.state_dict(), theirs, str(run.path))
    network.bev_net.load_state_dict(theirs)
    unused = [k for k in state if not k.startswith(prefix)]
    fresh = network.objective.state_dict()
    return (
        f"loaded from {run.path}: {_by_part(theirs)}; fresh: {_by_part(fresh)}; "
        f"not used: {len(unused)} tensors of its {run.description()['kind']} head"
    )


def require_same_tensors(ours: dict[str, Any], theirs: dict[str, Any], where: str) -> None:
    """Refuse weights whose names or shapes differ from the network's.

    Raises:
        RunError: naming the first few.
    """
    wrong = [f"{k} is missing" for k in ours if k not in theirs]
    wrong += [f"{k} is unknown" for k in theirs if k not in ours]
    for k in ours.keys() & theirs.keys():
        a, b = (getattr(tensors[k], "shape", None) for tensors in (ours, theirs))
        if a != b:
            wrong.append(f"{k} is {tuple(b)}, should be {tuple(a)}")
    if wrong:
        raise RunError(
            f"the network in {where} is another one ({'; '.join(sorted(wrong)[:3])}; {len(wrong)} "
            "in all): use the model settings it was trained with"
        )


def _by_part(state: dict[str, Any]) -> str:
    parts: dict[str, int] = {}
    for name in state:
        part = name.split(".")[0]
        parts[part] = parts.get(part, 0) + 1
    return ", ".join(f"{part} {n}" for part, n in parts.items())
