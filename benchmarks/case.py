"""A case of `ptq.py`."""

from __future__ import annotations

from typing import Any, NamedTuple

from qat.ptq.base import PTQMethod


class Case(NamedTuple):
    """A recipe, the method that fills it, widths, and the number of calibration images.

    Args:
        label: takes the place of recipe and method in the name.
        rules: come after those of the recipe.
    """

    recipe: str
    method: PTQMethod
    w_bits: int
    a_bits: int
    images: int
    label: str = ""
    rules: tuple[dict[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """Recipe, method, widths and images, as `--only` matches them."""
        kind = getattr(self.method, "observer", type(self.method).__name__)
        return f"{self.label or f'{self.recipe} {kind}'} W{self.w_bits}A{self.a_bits} {self.images}"


def by_head(site: str) -> dict[str, Any]:
    """A rule for one step per head."""
    return {"match": site, "spec": {"class_path": "Uniform", "init_args": {"bits": "a_bits", "granularity": "head"}}}
