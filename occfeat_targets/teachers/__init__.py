"""Teachers: one module per family of image models. ``base`` says what a teacher must offer."""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from occfeat_targets.store.registry import Registry
from occfeat_targets.store.settings import ConfigError

if TYPE_CHECKING:
    from occfeat_targets.teachers.base import Teacher, TeacherSettings

TEACHERS = Registry(
    "teacher",
    {
        "none": "occfeat_targets.teachers.base:NoTeacher",
        "random": "occfeat_targets.teachers.vit:random_teacher",
        "hub": "occfeat_targets.teachers.hub:pretrained",
        "efficientnet-lite0": "occfeat_targets.teachers.efficientnet:EfficientNetTeacher",
    },
)
"""What makes a teacher of its settings, by what stands before a name's colon (else: ``hub``)."""


def load_teacher(settings: TeacherSettings) -> Teacher:
    """The teacher that settings name, checked against the input size. Raises ConfigError if the
    name makes no sense, a plug-in can't be imported, or the input size is no multiple of the patch;
    TeacherError if weights can't be loaded, or a plug-in is no teacher."""
    from occfeat_targets.teachers.base import TeacherError

    family, colon, _ = settings.name.partition(":")
    if family in TEACHERS.names:
        teacher = TEACHERS(family)(settings)
    elif colon:
        teacher = TEACHERS(settings.name)()
        if lacking := [n for n in ("name", "dim", "patch_size") if not hasattr(teacher, n)]:
            raise TeacherError(f"plug-in teacher {settings.name!r} has no attribute {lacking[0]!r}")
    else:
        teacher = TEACHERS("hub")(settings)
    size = settings.size_for(teacher)
    if any(side % teacher.patch_size for side in size):
        raise ConfigError(
            f"teacher.input_size {list(size)} must be multiples of the patch size "
            f"{teacher.patch_size} of {settings.name}"
        )
    return teacher


_load_once: Any = lru_cache(maxsize=1)(load_teacher)
_load_lock = threading.Lock()


def shared_teacher(settings: TeacherSettings) -> Teacher:
    """This process's one instance of a teacher, loaded on first use. Torch is held to one thread:
    workers are the parallelism, and a result then can't depend on a machine's number of threads."""
    import torch

    with _load_lock:  # lru_cache alone would load twice when two threads ask at once
        torch.set_num_threads(1)
        return _load_once(settings)
