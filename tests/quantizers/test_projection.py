"""The projection of many quantizers at once is that of each, in fewer launches."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qat.quantizers import LSQ, LogIntSoftmax, LogSqrt2, LSQQuantizer, Quantizer, Uniform
from qat.quantizers.layout import Layout
from qat.quantizers.projection import Projection

LAYOUT = Layout(0, 1, batched=True)


class Launches(TorchDispatchMode):
    """Counts the calls of operators that change or make a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class AtMostOne(LSQQuantizer):
    """A kind with a limit of its own."""

    @torch.no_grad()
    def project_(self) -> None:
        self.step.clamp_(0.5, 1.0)


def made() -> list[Quantizer]:
    """Quantizers with two limits and a ``project_``, whose steps are out of bounds or not."""
    specs = [LSQ(4), Uniform(4), LogSqrt2(4), LogIntSoftmax(4), LogIntSoftmax(4)]
    found = [spec.build(LAYOUT) for spec in specs] + [AtMostOne(LSQ(4), LAYOUT) for _ in range(3)]
    with torch.no_grad():
        for quantizer, step in zip(found, (-1.0, 0.3, 0.0, 1e-5, 0.2, -3.0, 0.7, 9.0), strict=True):
            quantizer.step.fill_(step)
    return found


def test_it_does_what_each_would_do() -> None:
    together, each = made(), made()
    Projection(together)()
    for quantizer in each:
        quantizer.project_()
    steps = [quantizer.step.item() for quantizer in together]
    assert steps == [quantizer.step.item() for quantizer in each]
    expected = torch.tensor([1e-6, 0.3, 1e-6, 2**-10, 0.2, 0.5, 0.7, 1.0])  # as float32, like the steps
    assert steps == expected.tolist()


def test_there_is_one_launch_for_each_limit_and_each_kind_of_its_own() -> None:
    project = Projection(made())
    with Launches() as launches:
        project()
    assert sorted(launches.names) == ["aten._foreach_clamp_min_.Scalar"] * 2 + ["aten.clamp_.default"] * 3


def test_it_projects_the_parameters_that_an_optimizer_changes() -> None:
    quantizer = LSQ(4).build(LAYOUT)
    with torch.no_grad():
        quantizer.step.fill_(0.1)
    project = Projection([quantizer])
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=1.0)
    quantizer.step.sum().backward()
    optimizer.step()
    assert quantizer.step.item() < 0
    project()
    assert quantizer.step.item() == torch.tensor(1e-6).item()
