"""Hooks on named modules that last as long as a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

Before = Callable[[str, tuple[Any, ...]], None]  # name of a module, its arguments
After = Callable[[str, tuple[Any, ...], Any], None]  # name of a module, its arguments, its output


@contextmanager
def watching(
    modules: Mapping[str, nn.Module], before: Before | None = None, after: After | None = None
) -> Iterator[None]:
    """Call ``before`` and ``after`` around every forward of the named modules inside the block."""
    hooks = []
    try:
        for name, module in modules.items():
            if before is not None:
                hooks.append(module.register_forward_pre_hook(lambda _, args, name=name: before(name, args)))
            if after is not None:
                hooks.append(module.register_forward_hook(lambda _, args, out, name=name: after(name, args, out)))
        yield
    finally:
        for hook in hooks:
            hook.remove()
