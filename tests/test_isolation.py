"""Who may import what: the trainer's side stays light, and each library has one home."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("occfeat_targets", "occfeat_train")
HOMES = {
    "nuscenes": {"sources/nuscenes.py"},
    "distributed": {"cluster.py"},
    "dask": {"cluster.py"},
    "transformers": {
        *("teachers/vit.py", "teachers/hub.py", "store/pretrained.py"),
        *("models/encoders.py", "models/decoder.py"),
    },
    "yaml": {"store/settings.py"},
    "fsspec": {"store/files.py"},
    "matplotlib": {
        *("view.py", "query.py", "voxel_picture.py", "outputs/masks.py", "report/pictures.py"),
    },
    "plotly": {"report/page.py", "report/pictures.py", "report/report.py"},
}


def _imports(path):
    """Names of what a file imports anywhere in it, but for type checkers alone."""
    todo = [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        todo += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.fixture(scope="module")
def graph():
    """Module of the two packages -> those of them that it imports."""
    files = {_module_of(p): p for package in PACKAGES for p in (ROOT / package).rglob("*.py")}

    def known(name):
        return name if name in files else name.rpartition(".")[0]

    return {
        module: {known(name) for name in _imports(path)} & files.keys() - {module}
        for module, path in files.items()
    }


def test_no_import_runs_in_a_circle(graph):
    rest = {module: set(imported) for module, imported in graph.items()}
    while free := [module for module, imported in rest.items() if not imported & rest.keys()]:
        for module in free:
            del rest[module]
    assert not rest, {module: imported & rest.keys() for module, imported in rest.items()}


def test_the_trainer_imports_the_contract_alone(graph):
    for module, imported in graph.items():
        theirs = {name for name in imported if name.startswith("occfeat_targets")}
        if module.startswith("occfeat_train"):
            assert all(name.startswith("occfeat_targets.store") for name in theirs), module
        if module.startswith("occfeat_targets.store"):
            assert all(name.startswith("occfeat_targets.store") for name in imported), module


def test_no_import_runs_back_up(graph):
    """The lower of two rooms knows nothing of the upper; nothing knows of the pipelines."""
    rooms = ("models", "data", "objectives", "tasks", "runs")
    above = ("cli", "config", "train", "evaluate", "robustness", "view", "export", "rig", "predict")
    for module, imported in graph.items():
        _, _, place = module.partition("occfeat_train.")
        room = place.split(".")[0]
        if room in rooms:
            upper = {*above, *rooms[rooms.index(room) + 1 :]} - (
                {"config"} if room == "runs" else set()
            )
            wrong = {
                n for n in imported if n.startswith("occfeat_train.") and n.split(".")[1] in upper
            }
            assert not wrong, (module, wrong)
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            assert not [n for n in _imports(path) if n.startswith("occfeat_pipelines")], path


def test_no_import_of_the_offline_side_runs_back_up(graph):
    """Outputs, teachers, sources and what they share know nothing of builds and commands."""
    low = {"geometry", "images", "corruptions", "sources", "outputs", "teachers"}
    for module, imported in graph.items():
        package, *room = module.split(".")
        if package == "occfeat_targets" and room and room[0] in low:
            assert {name.split(".")[1] for name in imported} <= low | {"store"}, module


@pytest.mark.parametrize("package", [*PACKAGES, "pipelines"])
def test_modules_and_functions_stay_small(package):
    """400 lines, 60 lines, 7 arguments: the house's rule of what one can hold in one's head."""
    for path in (ROOT / package).rglob("*.py"):
        text = path.read_text()
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                assert node.end_lineno - node.lineno < 60, (path, node.name)
                names = [argument.arg for argument in arguments if argument.arg != "self"]
                assert len(names) <= 7, (path, node.name)


def _loaded_after(statement):
    code = f"import sys; {statement}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_the_contract_loads_without_the_offline_stage():
    loaded = _loaded_after("import occfeat_targets.store.reader")
    assert "zarr" in loaded
    heavy = {"dask", "distributed", "nuscenes", "torch", "transformers", "cv2", "PIL"}
    assert not loaded & heavy


@pytest.mark.parametrize("package", PACKAGES)
def test_help_is_fast_because_it_loads_nothing(package):
    loaded = _loaded_after(f"import {package}.cli")
    assert not loaded & {"torch", "zarr", "numpy", "nuscenes", "distributed"}


def test_the_demo_world_needs_neither_torch_nor_the_devkit():
    loaded = _loaded_after("import occfeat_targets.demo_world")
    assert not loaded & {"torch", "nuscenes", "distributed", "zarr"}


@pytest.mark.parametrize("library", HOMES)
def test_each_library_has_one_home(library):
    importers = {
        str(path.relative_to(ROOT / package))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if library in {name.split(".")[0] for name in _imports(path)}
    }
    assert importers and importers <= HOMES[library]


def test_torchvision_is_not_in_the_environment():
    """A torchvision that does not match torch breaks every transformers import."""
    assert importlib.util.find_spec("torchvision") is None
