"""The constraints with which the oldest allowed versions are installed."""

from __future__ import annotations

import re

import pytest

from tools.oldest import PYPROJECT, oldest, requirements_of


def test_lower_bounds_become_exact_versions():
    requirements = [
        "torch>=2.8,<3",
        "jsonargparse[signatures]>=4.51,<5",
        "qat[demo]",
        "types-PyYAML>=6",
        "a.b <2, >= 1.5",
    ]
    lines = oldest(requirements, "qat")
    assert lines == ["torch==2.8", "jsonargparse==4.51", "types-PyYAML==6", "a.b==1.5"]


def test_a_requirement_without_a_lower_bound_is_refused():
    with pytest.raises(ValueError, match=r"'rich<16' has no lower bound"):
        oldest(["torch>=2.8", "rich<16"], "qat")


def test_every_requirement_of_the_project_has_a_line():
    own, requirements = requirements_of(PYPROJECT)
    lines = oldest(requirements, own)
    assert own == "qat"
    assert all(re.fullmatch(r"[\w.-]+==[\d.]+", line) for line in lines)
    assert {"torch", "timm", "lightning", "pytest", "scikit-learn"} <= {line.partition("==")[0] for line in lines}
