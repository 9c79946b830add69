"""Imports go down, and a library is known only where it belongs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import qat

ROOT = Path(qat.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

LEVELS = [
    {"errors", "preprocessing", "progress", "recipe", "losses", "schedules", "finite"},
    {"quantizers"},
    {"insert", "describe", "family"},
    {"models"},
    {"ptq", "regularizers", "oscillation", "checkpoint", "teacher", "official"},
    {"module", "data", "callbacks", "agreement", "length", "metrics", "runs"},
    {"trainer", "cli", "labelplan", "labeling"},
    {"__main__", "tool"},
]
FRONT = "__init__"  # of the package: names for notebooks, loaded when first used
LEVEL = {FRONT: len(LEVELS)} | {unit: level for level, units in enumerate(LEVELS) for unit in units}
SIDEWAYS = {
    ("describe", "insert"),
    ("insert", "family"),
    ("teacher", "checkpoint"),
    ("official", "checkpoint"),
    ("module", "data"),
    ("callbacks", "module"),
    ("callbacks", "data"),
    ("callbacks", "metrics"),
    ("callbacks", "runs"),
    ("module", "length"),
    ("cli", "trainer"),
    ("labeling", "labelplan"),
}
HELPERS = {  # what the other files of a folder may import
    "quantizers": {"base", "fitting", "integers", "kernels", "lsq", "uniform"},
    "models": {"attention", "build", "layers", "sret_float"},
    "ptq": {"base", "capture", "in_order", "norms", "observers", "operands", "products", "quantiles", "search"},
    "regularizers": {"base"},
    "callbacks": set(),
    "data": {"check", "crops", "decode", "folder", "images", "labelreader", "labelwriter", "order", "softlabels"},
}
KNOWS = {
    "timm": {"models", "data"},
    "lightning": {"module", "callbacks", "data", "length", "metrics", "runs", "trainer", "cli", "labeling"},
    "jsonargparse": {"cli", "tool"},
    "h5py": {"data"},
}
WITHOUT_TORCH = {"errors", "recipe", "schedules"}


def unit(path: Path) -> str:
    """The file or folder directly below the package."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Dotted names of every import of a file, wherever it stands."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" if node.module == "qat" else node.module for alias in node.names}
    return names


def ours(path: Path) -> set[str]:
    return {name for name in imported(path) if name.startswith("qat.")}


every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def test_every_part_of_the_package_has_a_level():
    units = {unit(path) for path in FILES} - {"recipes"}
    assert units == LEVEL.keys(), "add the new part to LEVELS, and to the documentation of the layers"


@every_file
def test_imports_go_down(path):
    source = unit(path)
    for name in ours(path):
        target = name.split(".")[1]
        below = LEVEL[target] < LEVEL[source]
        assert below or target in (source, "errors") or (source, target) in SIDEWAYS, f"{source} imports {name}"


@every_file
def test_data_stands_on_the_ground_alone(path):
    if unit(path) == "data":
        assert {name.split(".")[1] for name in ours(path)} <= {"data", *LEVELS[0]}


@every_file
def test_siblings_import_only_the_helpers_of_their_folder(path):
    folder = unit(path)
    if path.name == "__init__.py" or folder not in HELPERS:
        return
    siblings = {name.split(".")[2] for name in ours(path) if name.startswith(f"qat.{folder}.")}
    assert siblings <= HELPERS[folder]


@every_file
@pytest.mark.parametrize("library", KNOWS)
def test_a_library_is_known_only_where_it_belongs(path, library):
    if any(name.split(".")[0] == library for name in imported(path)):
        assert unit(path) in KNOWS[library]


@every_file
def test_a_recipe_can_be_read_without_torch(path):
    if unit(path) in WITHOUT_TORCH:
        assert not {"torch", "torchvision"} & {name.split(".")[0] for name in imported(path)}


def test_the_front_of_the_package_loads_torch_only_when_it_is_used():
    code = "import sys, qat; assert 'torch' not in sys.modules; assert all(getattr(qat, name) for name in qat.__all__)"
    subprocess.run([sys.executable, "-c", code], check=True)
