"""Outputs of a unit, and what reaches its sites."""

import pytest
import torch
from torch import nn

from qat.ptq.capture import capture
from qat.sites.family import Unit


def test_outputs_and_inputs_of_every_batch():
    layers = nn.Sequential(nn.ReLU(), nn.Linear(2, 2), nn.Tanh())
    tensors = [torch.randn(3, 2), torch.randn(1, 2)]
    sites = {"first": layers[0], "last": layers[2], "elsewhere": nn.Identity()}
    outputs, found = capture(Unit("unit", layers), tensors, sites, lambda name, x: x if name == "first" else x[:1])
    assert all(torch.equal(out, layers(x)) for out, x in zip(outputs, tensors, strict=True))
    assert found.keys() == {"first", "last"}
    assert all(torch.equal(seen, x) for seen, x in zip(found["first"], tensors, strict=True))
    assert [len(seen) for seen in found["last"]] == [1, 1]


def test_no_hook_stays_after_an_error():
    layer = nn.ReLU()

    def fail(name, x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture(Unit("unit", layer), [torch.zeros(1, 2)], {"site": layer}, fail)
    assert not layer._forward_pre_hooks
