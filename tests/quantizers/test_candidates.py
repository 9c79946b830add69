"""The best row of a table of candidates. Shapes: G groups, n values in a group, K candidates."""

import torch

from qat.quantizers import Uniform, candidates
from qat.quantizers.layout import Layout


def test_every_group_gets_its_own_best_row():
    quantizer = Uniform(2, zero="none").build(Layout(0, 2, batched=False))
    steps = torch.tensor([3.0, 1.0, 0.5, 0.5, 1.0, 7.0, 8.0, 9.0, 2.0, 2.0])[:, None].expand(-1, 2)
    x = torch.tensor([[0.0, 0.5, 1.0, 1.5], [0.0, 2.0, 4.0, 6.0]])  # (G, n): the grids of 0.5 and 2
    table = {"step": steps, "zero_point": torch.zeros_like(steps)}
    found = candidates.least_error(quantizer, table, x)
    assert found["step"].tolist() == [0.5, 2.0]
    assert found["zero_point"].tolist() == [0, 0]


def test_many_samples_are_thinned_to_some_of_all_channels_and_the_same_in_every_group(monkeypatch):
    monkeypatch.setattr(candidates, "FIT_VALUES", 200)
    few = torch.arange(200.0).view(2, 100)
    assert candidates.thinned(few) is few
    many = torch.arange(2**13).view(2, -1)  # (G, n): 64 rows of 64 channels
    found = candidates.thinned(many)
    assert found.shape == (2, 100)
    assert torch.equal(found[1] - found[0], torch.full((100,), 2**12))
    assert (found[0] % 64).unique().numel() > 40  # 51 are expected
    assert torch.equal(found, candidates.thinned(many))
