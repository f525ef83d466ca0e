"""Who may import what: the trainer's side stays light, and each library has one home."""

import ast
import importlib.util
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest

TARGETS, TRAIN = "occfeat_targets", "occfeat_train"
HOMES = {
    "nuscenes": {f"{TARGETS}/sources/nuscenes.py"},
    "distributed": {f"{TARGETS}/cluster.py"},
    "dask": {f"{TARGETS}/cluster.py"},
    "transformers": {
        f"{TARGETS}/teachers/dino.py",
        f"{TRAIN}/models/encoders.py",
        f"{TRAIN}/models/decoder.py",
    },
    "yaml": {f"{TARGETS}/store/settings.py"},
    "fsspec": {f"{TARGETS}/store/files.py"},
    "matplotlib": {
        f"{TARGETS}/view.py",
        f"{TARGETS}/outputs/masks.py",
        f"{TRAIN}/view.py",
    },
}


@pytest.fixture(scope="module")
def imports(pytestconfig):
    """All that each module of ours imports, in functions too: file to dotted names."""
    found = {}
    root = pytestconfig.rootpath
    for path in (*(root / TARGETS).rglob("*.py"), *(root / TRAIN).rglob("*.py")):
        names = found.setdefault(path.relative_to(root).as_posix(), set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                folder = root / node.module.replace(".", "/")
                modules = {a.name for a in node.names if (folder / f"{a.name}.py").exists()}
                names |= {f"{node.module}.{name}" for name in modules}
                if len(modules) < len(node.names):
                    names.add(node.module)
    return found


def _loaded_after(statement):
    code = f"import sys; {statement}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_the_contract_loads_without_the_offline_stage():
    loaded = _loaded_after("import occfeat_targets.store.reader, occfeat_targets.store.checksums")
    assert "zarr" in loaded
    heavy = {"dask", "distributed", "nuscenes", "torch", "transformers", "cv2", "PIL"}
    assert not loaded & heavy


def test_help_is_fast_because_it_loads_nothing():
    loaded = _loaded_after("import occfeat_targets.cli")
    assert not loaded & {"torch", "zarr", "numpy", "nuscenes", "distributed", "pydantic"}


def test_the_demo_world_needs_neither_torch_nor_the_devkit():
    loaded = _loaded_after("import occfeat_targets.demo_world")
    assert not loaded & {"torch", "nuscenes", "distributed", "zarr"}


@pytest.mark.parametrize("library", HOMES)
def test_each_library_has_one_home(library, imports):
    importers = {
        file for file, names in imports.items() if library in {n.split(".")[0] for n in names}
    }
    assert importers <= HOMES[library]


def test_the_contract_imports_nothing_of_ours_but_itself(imports):
    for file, names in imports.items():
        if file.startswith(f"{TARGETS}/store/"):
            ours = {name for name in names if name.startswith("occfeat_")}
            assert all(name.startswith(f"{TARGETS}.store") for name in ours), file


def test_no_import_runs_in_a_circle_or_upward(imports):
    """Of the offline side: commands above outputs, teachers and sources, and these above the
    contract. What the registries import by name comes late and is left out."""
    ours = {file.removesuffix(".py").removesuffix("/__init__").replace("/", "."): names
            for file, names in imports.items() if file.startswith(TARGETS)}  # fmt: skip
    graph = {module: {n for n in names if n in ours} for module, names in ours.items()}
    order = list(TopologicalSorter(graph).static_order())  # raises if there is a circle
    assert len(order) > 30
    low = {"geometry", "images", "sampling", "corruptions", "sources", "outputs", "teachers"}
    for module, names in graph.items():
        _, *room = module.split(".")
        if room and room[0] in low:
            rooms = {name.split(".")[1] for name in names}
            assert rooms <= low | {"store"}, module


def test_torchvision_is_not_in_the_environment():
    """A torchvision that does not match torch breaks every transformers import."""
    assert importlib.util.find_spec("torchvision") is None
