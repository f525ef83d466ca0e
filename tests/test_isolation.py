"""Who may import what: the trainer's side stays light, and each library has one home."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

HOMES = {
    "nuscenes": {"nuscenes_source.py"},
    "distributed": {"cluster.py"},
    "dask": {"cluster.py"},
    "transformers": {"teacher.py", "encoders.py", "decoder.py"},
    "yaml": {"settings.py"},
    "fsspec": {"schema.py"},
    "matplotlib": {"view.py"},
}


def _loaded_after(statement):
    code = f"import sys; {statement}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_the_contract_loads_without_the_offline_stage():
    loaded = _loaded_after("import occfeat_targets.store.schema, occfeat_targets.store.grid")
    assert "zarr" in loaded
    heavy = {"dask", "distributed", "nuscenes", "torch", "transformers", "cv2", "PIL"}
    assert not loaded & heavy


def test_help_is_fast_because_it_loads_nothing():
    loaded = _loaded_after("import occfeat_targets.cli")
    assert not loaded & {"torch", "zarr", "numpy", "nuscenes", "distributed"}


def test_the_demo_world_needs_neither_torch_nor_the_devkit():
    loaded = _loaded_after("import occfeat_targets.demo_world")
    assert not loaded & {"torch", "nuscenes", "distributed", "zarr"}


@pytest.mark.parametrize("library", HOMES)
def test_each_library_has_one_home(library, pytestconfig):
    importers = set()
    for path in pytestconfig.rootpath.glob("occfeat_*/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            if library in {name.split(".")[0] for name in names}:
                importers.add(Path(path).name)
    assert importers <= HOMES[library]


def test_torchvision_is_not_in_the_environment():
    """A torchvision that does not match torch breaks every transformers import."""
    assert importlib.util.find_spec("torchvision") is None
