"""The order in which stored crops are used, the labels that are recovered, and the replay of both."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from qat.data.crops import Crop, replay
from qat.data.softlabels.reader import SoftLabels
from qat.data.softlabels.replay import ReplayView, next_crops, recover
from qat.errors import QatError
from qat.training.losses import sparse_soft_cross_entropy
from tests.data.softlabels.stores import header, labels_of, write

WORKED = np.array([[3, 7, 0, 9, 2]], np.uint16), np.array([[0.62, 0.15, 0.08, 0.05, 0.02]], np.float16)


@pytest.fixture
def labels(tmp_path: Path) -> SoftLabels:
    write(tmp_path / "labels.h5")
    return SoftLabels(tmp_path / "labels.h5")


# ---- which crops


@pytest.mark.parametrize(("crops", "visits"), [(11, [4, 4, 4, 1, 1, 4, 4]), (8, [4] * 6), (3, [4, 4, 1])])
def test_no_crop_comes_again_before_all_were_used(crops: int, visits: list[int]) -> None:
    seen, before = [], 0
    for count in visits:
        seen += next_crops(5, 2, crops, before, count).tolist()
        before += count
    for turn in range(0, len(seen), crops):
        part = seen[turn : turn + crops]
        assert max(Counter(part).values()) == 1
        assert turn + crops > len(seen) or sorted(part) == list(range(crops))


def test_the_order_depends_on_seed_image_and_what_was_used_alone() -> None:
    first = next_crops(0, 0, 500, 8, 4).tolist()
    assert first == next_crops(0, 0, 500, 8, 4).tolist()
    assert first == next_crops(0, 0, 500, 0, 12)[8:].tolist()
    assert first not in [
        next_crops(*key, 500, before, 4).tolist() for *key, before in ((1, 0, 8), (0, 1, 8), (0, 0, 12))
    ]
    assert next_crops(0, 0, 500, 8, 4).tolist() != next_crops(0, 0, 500, 508, 4).tolist()


# ---- labels


def test_marginal_smoothing_and_its_loss_by_hand() -> None:
    recovered = recover(header(num_classes=10, top_k=5), *WORKED)
    logits = torch.tensor([[0.1, -0.4, 0.3, 2.0, 0.0, -1.0, 0.5, 1.2, -0.2, 0.7]])
    assert recovered.classes.tolist() == [[3, 7, 0, 9, 2]]
    # half precision rounds the probabilities by up to 1.2e-4
    assert sparse_soft_cross_entropy(logits, recovered).item() == pytest.approx(1.5283861555, abs=3e-4)


def test_marginal_renorm_by_hand() -> None:
    recovered = recover(header(num_classes=10, top_k=5, label_type="marginal_renorm"), *WORKED)
    expected = torch.tensor([[0.6739130, 0.1630435, 0.0869565, 0.0543478, 0.0217391]])
    torch.testing.assert_close(recovered.probs, expected, atol=2e-4, rtol=0)  # half precision
    assert recovered.probs.sum().item() == pytest.approx(1, abs=1e-6)


def test_hard_labels_are_one_class() -> None:
    made = header(num_classes=10, top_k=1, label_type="hard")
    recovered = recover(made, WORKED[0][:, :1], WORKED[1][:, :1])
    logits = torch.randn(1, 10)
    loss = sparse_soft_cross_entropy(logits, recovered)
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, torch.tensor([3])).item(), abs=1e-6)


@pytest.mark.parametrize("k", [1, 3])
def test_one_class_and_all_classes_are_stored_too(k: int, tmp_path: Path) -> None:
    made = write(tmp_path / "labels.h5", top_k=k)
    stored = SoftLabels(tmp_path / "labels.h5").read(4)
    assert np.array_equal(stored.probs, labels_of(4, made).probs)
    assert recover(made, stored.classes, stored.probs).probs.shape == (11, k)


# ---- replay


def test_replay_gives_the_stored_crops_with_their_labels(labels: SoftLabels) -> None:
    image = torch.randint(0, 256, (3, 40, 44), dtype=torch.uint8)
    view = ReplayView(labels, np.array([7, 3]), 16, "bilinear", 4, seed=1, before=8)
    out = torch.empty(4, 3, 16, 16, dtype=torch.uint8)
    soft_labels = view(image, 1, out)
    stored, order = labels_of(3, header()), next_crops(1, 3, 11, 8, 4)
    for place, crop in enumerate(order):
        box = Crop(*stored.boxes[crop].tolist(), bool(stored.flips[crop]))
        assert torch.equal(out[place], replay(image, [box], 16, "bilinear")[0])
    assert soft_labels.classes.tolist() == stored.classes[order].tolist()
    assert soft_labels.probs.tolist() == stored.probs[order].astype(np.float32).tolist()
    with pytest.raises(QatError, match="50 x 40 pixels, but its soft labels were made on 44 x 40"):
        view(torch.zeros(3, 40, 50, dtype=torch.uint8), 0, out)


@pytest.mark.parametrize("column", [2, 4, 6])
def test_damaged_labels_are_not_trained_on(tmp_path: Path, column: int) -> None:
    import h5py

    write(tmp_path / "labels.h5")
    with h5py.File(tmp_path / "labels.h5", "r+") as file:
        crops = file["crops"][0]
        crops[:, column] = {2: 0, 4: 3, 6: 0x7E00}[column]  # no height, no such class, NaN
        file["crops"][0] = crops
    view = ReplayView(SoftLabels(tmp_path / "labels.h5"), np.arange(10), 16, "bilinear", 4, 0, 0)
    with pytest.raises(QatError, match="its soft labels are damaged"):
        view(torch.zeros(3, 40, 44, dtype=torch.uint8), 0, torch.empty(4, 3, 16, 16, dtype=torch.uint8))
