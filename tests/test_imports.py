"""Imports go down and never in a circle, and a library is known only where it belongs."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import qat

ROOT = Path(qat.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

LEVELS = [  # docs/architecture.md has the same table; there is no exception
    {"errors"},
    {"ranges"},
    {"locking", "model_args", "preprocessing", "progress"},
    {"quantizers", "data", "runs"},
    {"recipe"},
    {"sites"},
    {"models"},
    {"ptq", "checkpoint"},
    {"export", "integer", "official", "training"},
    {"callbacks", "labeling"},
    {"cli"},
    {"__main__"},
]
FRONT = "__init__"  # of the package: names for notebooks, loaded when first used
LEVEL = {FRONT: len(LEVELS)} | {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
KNOWS = {
    "timm": {"models", "data"},
    "lightning": {"training", "callbacks", "data", "runs", "labeling", "cli"},
    "jsonargparse": {"cli"},
    "h5py": {"data"},
    "onnx": {"export"},
    "onnxruntime": {"export"},
}


def room(path: Path) -> str:
    """The file or folder directly below the package."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path) for path in FILES}


def imported(path: Path) -> set[str]:
    """Dotted names of every import of a file, wherever it stands; of ours, the file that the name comes from."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                names.add(whole if whole in MODULES else node.module)
    return names


def ours(path: Path) -> set[str]:
    return {name for name in imported(path) if name in MODULES and name != "qat"}


def test_every_room_of_the_package_has_a_level():
    assert {room(path) for path in FILES} - {"recipes"} == LEVEL.keys(), "add the new room to LEVELS and to the docs"


def test_imports_go_down():
    for path in FILES:
        for name in ours(path):
            target = name.split(".")[1]
            assert target == room(path) or LEVEL[target] < LEVEL[room(path)], f"{path} imports {name}"


def test_no_files_import_each_other_in_a_circle():
    graph = {module_name(path): ours(path) - {module_name(path)} for path in FILES}
    in_order = set(TopologicalSorter(graph).static_order())  # CycleError names the files
    assert in_order == MODULES


def test_data_stands_on_the_ground_alone():
    for path in FILES:
        if room(path) == "data":
            below = {"data", "errors", "preprocessing", "progress", "locking", "ranges"}
            assert {name.split(".")[1] for name in ours(path)} <= below, path


def test_a_library_is_known_only_where_it_belongs():
    for path in FILES:
        for library, rooms in KNOWS.items():
            if any(name.split(".")[0] == library for name in imported(path)):
                assert room(path) in rooms, f"{path} imports {library}"


def test_the_front_of_the_package_loads_torch_only_when_it_is_used():
    code = "import sys, qat; assert 'torch' not in sys.modules; assert all(getattr(qat, name) for name in qat.__all__)"
    subprocess.run([sys.executable, "-c", code], check=True)
