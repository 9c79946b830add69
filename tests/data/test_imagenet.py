"""The data module: passes, determinism, the evaluation transform, calibration images, unreadable images."""

import logging
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from timm.data import create_transform
from torchvision import transforms

from qat.data.folder import find_images
from qat.data.imagenet import ImageNetDataModule
from qat.data.images import Batch
from qat.data.options import DataOptions
from qat.errors import QatError

IMAGENET = Path(__file__).parents[3] / "shared" / "data" / "imagenet"
PREPROCESSING = {"size": 16, "resize": 20, "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3}
TRAIN, VAL = 10, 7  # images


def save_noise(path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = rng.integers(18, 60, 2)
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def root(tmp_path):
    for i in range(TRAIN):
        save_noise(tmp_path / "train" / "ab"[i % 2] / f"{i}.{('png', 'JPEG')[i % 3 == 0]}", i)
    for i in range(VAL):
        save_noise(tmp_path / "val" / "ab"[i % 2] / f"{i}.png", 100 + i)
    return tmp_path


def module(root, epoch=0, rank=0, world_size=1, training=True, **options):
    options = {"root": root, "batch_size": 4, "workers": 0, "preprocessing": PREPROCESSING, "crop_epochs": 2} | options
    data = ImageNetDataModule(DataOptions(**options))
    data.trainer = SimpleNamespace(current_epoch=epoch, global_rank=rank, world_size=world_size, training=training)
    return data


def train(root, **options) -> list[Batch]:
    return list(module(root, **options).train_dataloader())


def equal(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and a.paths == b.paths
        for a, b in zip(left, right, strict=True)
    )


def paths(batches) -> list[str]:
    return [path for batch in batches for path in batch.paths]


# ---- passes and order


def test_announced_and_real_steps_agree(root):
    options = {"crops_per_image": 2, "crop_epochs": 5, "batch_size": 6}
    for world_size in (1, 3):
        data = module(root, world_size=world_size, **options)
        assert data.passes == [2, 2, 1]
        loaders = [module(root, e, 0, world_size, **options).train_dataloader() for e in range(3)]
        assert sum(data.batches_per_pass(world_size)) == sum(map(len, loaders)) == sum(len(list(x)) for x in loaders)


def test_the_default_batch_has_256_crops(root):
    data = module(root, batch_size=None)
    assert (data.batch_size, data.val_batch_size) == (256, 256)
    assert data.plan_batches(8, None) == 1
    assert data.plan_batches(8, 3) == 3
    assert data.batch_size == 256


def test_a_global_batch_is_shared_by_the_processes(root):
    options = {"global_batch_size": 8, "batch_size": None, "crops_per_image": 2}
    data = module(root, **options)
    assert (data.batch_size, data.val_batch_size) == (8, 8)  # one process, until the number is known
    for processes, accumulate, size in ((1, None, 8), (2, None, 4), (4, 1, 2), (2, 2, 2)):
        assert data.plan_batches(processes, accumulate) == (accumulate or 1)
        assert data.batch_size == data.val_batch_size == size
        data.trainer.world_size = processes
        assert {len(batch.paths) for batch in list(data.train_dataloader())[:-1]} == {size // 2}
        assert len(list(data.train_dataloader())) == data.batches_per_pass(processes)[0]
    assert module(root, **options, val_batch_size=3).val_batch_size == 3
    with pytest.raises(QatError, match="global_batch_size is 8, which cannot be split over the 3 processes"):
        data.plan_batches(3, None)


def test_setup_finds_the_batch_size_of_the_trainer(root):
    data = module(root, world_size=2, global_batch_size=8, batch_size=2)
    data.trainer.accumulate_grad_batches = 1
    data.setup("fit")
    assert (data.batch_size, data.trainer.accumulate_grad_batches) == (2, 2)
    assert data._order(0)["batch_size"] == 2


def test_a_step_has_the_same_number_of_crops_in_every_pass(root):
    options = {"crops_per_image": 4, "crop_epochs": 5, "batch_size": 8}
    for epoch, images in ((0, 2), (1, 8), (7, 2)):  # four crops, one crop, and past the end four again
        batch = train(root, epoch=epoch, **options)[0]
        assert batch.images.shape == (8, 3, 16, 16)
        assert batch.images.dtype == torch.uint8
        assert len(batch.paths) == images
        assert batch.labels.shape == (8,)
        assert batch.labels.dtype == torch.int64
        assert batch.labels.tolist() == ["ab".index(p[0]) for p in batch.paths for _ in range(8 // images)]


def test_every_image_once_per_pass_and_ranks_share_them(root):
    assert sorted(paths(train(root))) == sorted(find_images(root / "train"))
    shares = [paths(train(root, rank=r, world_size=3)) for r in range(3)]
    assert [len(s) for s in shares] == [4, 4, 4]  # 10 images padded to 12
    assert {path for share in shares for path in share} == set(find_images(root / "train"))


def test_training_batches_do_not_depend_on_workers_or_the_global_generator(root):
    options = {"epoch": 1, "crops_per_image": 2, "crop_epochs": 8}
    here = train(root, **options)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert equal(here, train(root, workers=2, **options))
    assert torch.equal(state, torch.get_rng_state())


def test_crops_differ_between_crops_epochs_and_seeds(root):
    def view(**options):
        batches = train(root, crops_per_image=2, batch_size=20, crop_epochs=8, **options)
        return batches[0].images[2 * batches[0].paths.index("a/4.png") :][:2]

    first = view()
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, view(epoch=1))
    assert not torch.equal(first, view(seed=1))


# ---- evaluation


def test_evaluation_transform_is_timms_and_torchvisions_to_the_bit(root):
    torchvision = transforms.Compose(
        [
            transforms.Resize(20, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(16),
            transforms.PILToTensor(),
        ]
    )
    timm = create_transform(16, interpolation="bicubic", crop_pct=16 / 20, normalize=False)
    batches = list(module(root).val_dataloader())
    assert paths(batches) == list(find_images(root / "val"))
    for image, path in zip(torch.cat([b.images for b in batches]), paths(batches), strict=True):
        pil = Image.open(root / "val" / path).convert("RGB")
        assert torch.equal(image, torchvision(pil))
        assert torch.equal(image, timm(pil))


def test_ranks_see_every_validation_image_exactly_once(root):
    seen = [paths(module(root, rank=r, world_size=3, val_batch_size=2).val_dataloader()) for r in range(3)]
    assert sorted(path for share in seen for path in share) == sorted(find_images(root / "val"))


def test_validation_alone_needs_no_training_image(root):
    for image in (root / "train").glob("*/*"):
        image.unlink()
    data = module(root)
    data.setup("validate")
    assert data.classes == ["a", "b"]
    assert len(list(data.val_dataloader())) == 2
    with pytest.raises(QatError, match="has no image"):
        data.setup("fit")


def test_prediction_reads_a_loose_folder_without_labels(root, tmp_path):
    for i in range(3):
        save_noise(tmp_path / "loose" / "deep" / f"{i}.png", i)
    data = module(None, images=tmp_path / "loose")
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert batch.paths == ("deep/0.png", "deep/1.png", "deep/2.png")
    assert batch.labels.tolist() == [-1] * 3
    assert len(paths(module(root).predict_dataloader())) == VAL  # root/val when no folder is named


@pytest.mark.real_data
@pytest.mark.skipif(not IMAGENET.is_dir(), reason=f"needs the ImageNet sample in {IMAGENET}")
def test_a_subset_of_imagenet_gets_the_labels_of_the_whole():
    data = module(IMAGENET)
    dataset = data.val_dataloader().dataset
    index = next(i for i, path in enumerate(dataset.source.names) if path.startswith("n02123045/"))
    assert data.num_classes == 1000
    assert dataset.__getitems__([index]).labels.tolist() == [281]


# ---- calibration


def test_calibration_is_a_seeded_subset_of_train_in_the_evaluation_transform(root):
    def take(data, seed=0):
        return torch.cat(list(data.calibration_batches(5, 2, seed)))

    first = take(module(root))
    assert first.shape == (5, 3, 16, 16)
    assert first.dtype == torch.uint8
    assert torch.equal(first, take(module(root, epoch=3, rank=1, world_size=2, workers=1)))
    assert not torch.equal(first, take(module(root), seed=1))
    (root / "val").rename(root / "elsewhere")
    (root / "train").rename(root / "val")  # the evaluation transform of all training images
    pool = torch.cat([b.images for b in module(root).val_dataloader()])
    hits = (first[:, None] == pool[None]).flatten(2).all(2)
    assert hits.sum(1).tolist() == [1] * 5
    assert hits.sum(0).max() == 1


def test_more_calibration_images_than_there_are_is_an_error_at_once(root):
    with pytest.raises(QatError, match=r"calibration\.images is 11: .* has 10"):
        module(root).calibration_batches(11, 4, 0)


# ---- unreadable images


def spoil(path: Path) -> Path:
    path.write_bytes(b"not an image")
    return path


def truncate(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:400])
    return path


def transferred(data, loader) -> list[Batch]:
    return [data.on_before_batch_transfer(batch, 0) for batch in loader]


@pytest.mark.parametrize(("harm", "workers"), [(spoil, 1), (truncate, 0), (Path.unlink, 0)])
def test_an_unreadable_image_stops_the_run_with_its_path(root, harm, workers):
    data = module(root, workers=workers)
    data.setup("fit")
    for split, image in (("train", "b/3.JPEG"), ("val", "b/3.png")):
        harm(root / split / image)
        loader = data.train_dataloader() if split == "train" else data.val_dataloader()
        with pytest.raises(QatError, match=f"{split}/{image}: .+on_bad_image: skip"):
            transferred(data, loader)
    with pytest.raises(QatError, match=r"train/b/3\.JPEG"):
        list(data.calibration_batches(TRAIN, 4, 0))


def test_skip_replaces_in_training_leaves_out_in_validation_and_counts(root, caplog):
    bad = [spoil(root / "train" / "b/3.JPEG"), spoil(root / "val" / "b/3.png")]
    data = module(root, on_bad_image="skip", crops_per_image=2)
    with caplog.at_level(logging.WARNING):
        first = transferred(data, data.train_dataloader())
        assert equal(first, transferred(data, data.train_dataloader()))
        seen = transferred(data, data.val_dataloader())
    assert sum(len(b.images) for b in first) == 2 * TRAIN
    assert sorted(paths(first)).count("b/5.png") == 2  # the image after the bad one, in its place
    assert len(paths(seen)) == VAL - 1
    assert sum(len(b.images) for b in seen) == sum(len(b.labels) for b in seen) == VAL - 1
    assert dict(data.unreadable.counts) == {f"{bad[0]}: not an image": 2, f"{bad[1]}: not an image": 1}
    assert len(caplog.records) == 2  # one warning per file, not per visit
    assert sum(map(len, data.calibration_batches(TRAIN, 4, 0))) == TRAIN


def test_a_batch_without_any_readable_image(root):
    for image in (root / "val").glob("*/*"):
        spoil(image)
    data = module(root, on_bad_image="skip", training=False)
    batches = transferred(data, data.val_dataloader())
    assert [b.images.shape for b in batches] == [(0, 3, 16, 16)] * 2
    assert sum(len(b.bad) for b in batches) == VAL
    for image in (root / "train").glob("*/*"):
        spoil(image)
    data = module(root, on_bad_image="skip")
    with pytest.raises(QatError, match="whole batch"):
        transferred(data, data.train_dataloader())


# ---- settings and the real Trainer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 6, "crops_per_image": 4}, "batch_size 6 is not a multiple of crops_per_image 4"),
        ({"crops_per_image": 3}, "batch_size 256 is not a multiple of crops_per_image 3"),
        (
            {"global_batch_size": 10, "crops_per_image": 4},
            "global_batch_size 10 is not a multiple",
        ),
        ({"global_batch_size": 10, "batch_size": 4}, "global_batch_size is 10, which cannot be split"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"global_batch_size": 0}, "global_batch_size is 0"),
        ({"crop_epochs": 0}, "crop_epochs is 0"),
        ({"on_bad_image": "hide"}, "on_bad_image is 'hide'"),
        ({"train_interpolation": "cubic"}, "train_interpolation is 'cubic'"),
        ({"crop_scale": (0.5, 2.0)}, "data.crop_scale"),
    ],
)
def test_bad_settings_are_refused_when_the_module_is_made(options, message):
    with pytest.raises(QatError, match=message):
        ImageNetDataModule(DataOptions(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"root": None}, "data.root is not set"),
        ({"root": Path("nowhere")}, "nowhere is not a folder"),
        ({"preprocessing": None}, "data.preprocessing is not set"),
        ({"preprocessing": {"size": 3}}, "data.preprocessing is .*missing"),
    ],
)
def test_setup_names_what_is_missing(root, options, message):
    with pytest.raises(QatError, match=message):
        module(**({"root": root} | options)).setup("fit")


class Recorder(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(1)), []

    def training_step(self, batch, _):
        self.seen.append((self.current_epoch, len(batch.paths), batch.images.double().mean().item()))
        return batch.images.float().mean() * self.weight.sum()

    def validation_step(self, batch, _):
        assert isinstance(batch, Batch)

    def predict_step(self, batch, _):
        return list(batch.paths)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder, epochs, **options):
    options = {"reload_dataloaders_every_n_epochs": 1} | options
    return L.Trainer(
        max_epochs=epochs, use_distributed_sampler=False, accelerator="cpu", logger=False, default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip


def fit(root, folder, checkpoint=None, **options):
    model, data = Recorder(), module(root, crops_per_image=2, crop_epochs=5)
    data.trainer = None
    run = trainer(folder, 3, **options)
    run.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=False)
    return model.seen, run, data


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_runs_the_passes(root, tmp_path):
    seen, run, data = fit(root, tmp_path / "run")
    assert [(e, n) for e, n, _ in seen] == [(0, 2)] * 5 + [(1, 2)] * 5 + [(2, 4)] * 2 + [(2, 2)]
    predicted = run.predict(Recorder(), datamodule=data)
    assert [path for batch in predicted for path in batch] == list(find_images(root / "val"))


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_accumulates_the_global_batch(root, tmp_path):
    data, run, model = module(root, global_batch_size=8, batch_size=4), trainer(tmp_path, 1), Recorder()
    data.trainer = None
    run.fit(model, datamodule=data)
    assert [images for _, images, _ in model.seen] == [4, 4, 2]
    assert (run.accumulate_grad_batches, run.global_step) == (2, 2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.filterwarnings("error:You're resuming")
@pytest.mark.parametrize("limit_val_batches", [0, 2])
def test_a_run_resumed_after_any_step_sees_the_batches_that_were_left(root, tmp_path, limit_val_batches):
    save = ModelCheckpoint(tmp_path / "steps", "{step}", every_n_train_steps=1, save_top_k=-1)
    at_end = ModelCheckpoint(tmp_path / "passes", "{step}", save_top_k=-1, every_n_epochs=1)
    options = {"limit_val_batches": limit_val_batches}
    whole, *_ = fit(root, tmp_path, callbacks=[save, at_end], **options)
    points = [(name, step) for name, steps in (("steps", (1, 5, 8, 12)), ("passes", (5, 10))) for step in steps]
    for name, step in points:
        rest, *_ = fit(root, tmp_path, tmp_path / name / f"step={step}.ckpt", **options)
        assert rest == whole[step:], (name, step)


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_that_keeps_its_loader_is_refused(root, tmp_path):
    data, run = module(root), trainer(tmp_path, 1, reload_dataloaders_every_n_epochs=0)
    data.trainer = None
    with pytest.raises(QatError, match="reload_dataloaders_every_n_epochs"):
        run.fit(Recorder(), datamodule=data)


# ---- images and folders as people have them


def test_an_animation_is_mentioned_once(root, caplog):
    frames = [Image.new("RGB", (30, 30), colour) for colour in ("red", "blue")]
    for name in ("moving", "again"):
        frames[0].save(root / "val" / "a" / f"{name}.png", save_all=True, append_images=frames[1:])
    data = module(root, training=False)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            transferred(data, data.val_dataloader())
    (record,) = caplog.records
    assert "a/again.png has 2 images, of which the first is used" in record.message


def test_training_and_validation_turn_images_only_when_told_to(root):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    for split in ("train", "val"):
        path = root / split / "a" / "4.png"
        with Image.open(path) as image:
            image.convert("RGB").save(path, format="PNG", exif=exif)

    def first(split: str, **options: object) -> torch.Tensor:
        data = module(root, **options)
        dataset = (data.train_dataloader() if split == "train" else data.val_dataloader()).dataset
        return dataset.__getitems__([dataset.source.names.index("a/4.png")]).images

    turned = first("val", exif_orientation=True)
    assert torch.equal(first("val"), first("val", exif_orientation=False))
    assert not torch.equal(turned, first("val"))
    assert not torch.equal(first("train"), first("train", exif_orientation=True))


def test_validation_images_in_one_folder_have_the_labels_of_their_file(root):
    lines = []
    for path in sorted((root / "val").glob("*/*")):
        lines.append(f"{path.name} {'ab'.index(path.parent.name)}")
        path.rename(root / "val" / path.name)
    for folder in ("a", "b"):
        (root / "val" / folder).rmdir()
    (root / "val.txt").write_text("\n".join(lines))
    (batch,) = module(root, val_batch_size=VAL).val_dataloader()
    assert batch.paths == tuple(f"{i}.png" for i in range(VAL))
    assert batch.labels.tolist() == [i % 2 for i in range(VAL)]


def test_labels_follow_the_classes_of_the_model(root):
    data = ImageNetDataModule(DataOptions(root=root, batch_size=4, workers=0, preprocessing=PREPROCESSING), "zba")
    assert data.classes == ["z", "b", "a"]
    assert data.val_dataloader().dataset.__getitems__([0]).labels.tolist() == [2]
