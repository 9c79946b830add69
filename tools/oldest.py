"""Print a constraints file with the oldest version of every package that pyproject.toml allows.

    python tools/oldest.py >oldest.txt && pip install -e '.[dev]' -c oldest.txt

Needs Python alone. A requirement without a lower bound is an error: nobody could say what it has been tested with.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
NAME = re.compile(r"([A-Za-z0-9._-]+)\s*(?:\[[^]]*\])?")


def oldest(requirements: Iterable[str], own: str) -> list[str]:
    """Lines ``name==version``, in the order of the requirements.

    Args:
        requirements: as in pyproject.toml, for example ``torch>=2.8,<3``.
        own: name of the package itself, which may require its own extras.

    Raises:
        ValueError: for a requirement without a lower bound.
    """
    lines = []
    for requirement in requirements:
        name = NAME.match(requirement)
        assert name is not None, requirement
        if name[1] == own:
            continue
        bound = re.search(r">=\s*([0-9][0-9A-Za-z.]*)", requirement)
        if bound is None:
            raise ValueError(f"{requirement!r} has no lower bound: give one with >=")
        lines.append(f"{name[1]}=={bound[1]}")
    return lines


def requirements_of(pyproject: Path) -> tuple[str, list[str]]:
    """The name of the package, and all that it requires, extras included."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    extras = project.get("optional-dependencies", {}).values()
    return project["name"], [*project["dependencies"], *(word for words in extras for word in words)]


def main() -> None:
    """Print the file."""
    own, requirements = requirements_of(PYPROJECT)
    try:
        print("\n".join(oldest(requirements, own)))
    except ValueError as error:
        print(f"oldest: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
