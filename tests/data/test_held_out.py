"""Training images that are put aside."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn

from qat.data.held_out import put_aside
from qat.data.imagenet import ImageNetDataModule
from qat.data.options import DataOptions
from qat.errors import QatError
from tests.training.runs import tiny_data, tiny_module


@pytest.mark.parametrize(("total", "count"), [(10, 0), (10, 3), (10, 9), (1000, 64)])
def test_every_image_is_used_or_put_aside(total, count):
    used, aside = put_aside(total, count)
    assert len(aside) == count
    assert sorted([*used, *aside]) == list(range(total))
    assert all(np.diff(used) > 0)
    assert all(np.diff(aside) > 0)


def test_the_choice_is_that_of_the_numbers_alone_and_spread_over_all():
    aside = put_aside(1000, 100)[1]
    assert aside.tolist() == put_aside(1000, 100)[1].tolist()
    assert all(np.sum((low <= aside) & (aside < low + 250)) >= 5 for low in range(0, 1000, 250))


def test_none_would_be_left():
    with pytest.raises(QatError, match=r"data.held_out is 4, and there are 4 training images"):
        put_aside(4, 4)


def data_module(images, held_out, fn=TrainerFn.FITTING):
    options = tiny_data(images).options
    preprocessing = options.preprocessing
    data = ImageNetDataModule(DataOptions(root=images, batch_size=4, held_out=held_out, workers=0,
                                          preprocessing=preprocessing))  # fmt: skip
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        current_epoch=0, global_rank=0, world_size=1, reload_dataloaders_every_n_epochs=1, training=True,
        state=SimpleNamespace(fn=fn),
    )  # fmt: skip
    return data


def names(loader):
    return [path for batch in loader for path in batch.paths]


def test_training_calibration_and_held_out_images_share_none(images):
    data = data_module(images, 5)
    trained, (val, held) = names(data.train_dataloader()), data.val_dataloader()
    aside = names(held)
    assert len(set(trained)) == 19
    assert len(set(aside)) == 5
    assert not set(trained) & set(aside)
    assert len(names(val)) == 12
    pixels = torch.cat(list(data.calibration_batches(19, 8, 0)))
    held_pixels = torch.cat([batch.images for batch in held])
    assert not any(torch.equal(x, y) for x in pixels for y in held_pixels)
    with pytest.raises(QatError, match=r"train has 19, and data.held_out takes 5 more, choose 1..19"):
        list(data.calibration_batches(20, 8, 0))


def test_only_training_is_validated_on_them(images):
    assert names(data_module(images, 5, TrainerFn.VALIDATING).val_dataloader()) == names(
        data_module(images, 0).val_dataloader()
    )


def test_a_run_that_resumes_holds_out_what_it_has_held_out(images):
    data_module(images, 5).load_state_dict({"held_out": 5})
    data_module(images, 0).load_state_dict({"epoch": 1})  # of an older version
    for state in ({"held_out": 3}, {"epoch": 1}):
        with pytest.raises(QatError, match=r"data.held_out is 5, but the run has held out \d images and was"):
            data_module(images, 5).load_state_dict(state)


def test_the_module_names_what_it_measures():
    assert tiny_module().held_out.names == ("held_out/loss", "held_out/top1")
