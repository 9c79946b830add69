"""Images in tars: the list and the pixels of the folder that the tar was made of, and the classes of timm's reader."""

import gzip
import io
import tarfile
from pathlib import Path

import pytest
import torch
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch.utils.data import DataLoader

from qat.data.classes import Tree, forget_listings
from qat.data.decode import decode
from qat.data.source import Source
from qat.errors import QatError
from tests.conftest import write_images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_images(tmp_path / "folder" / "train", 3, seed=0)
    write_images(tmp_path / "folder" / "val", 2, seed=1)
    return tmp_path / "folder"


def one_tar(split: Path, out: Path) -> None:
    with tarfile.open(out, "w", format=tarfile.USTAR_FORMAT) as tar:  # one header each, as ImageNet's own tars have
        tar.add(split, split.name)  # the class folders lie in train/


def tar_of_tars(split: Path, out: Path) -> None:
    with tarfile.open(out, "w") as tar:
        for folder in sorted(split.iterdir(), reverse=True):
            content = io.BytesIO()
            with tarfile.open(fileobj=content, mode="w") as inner:
                for file in folder.iterdir():
                    inner.add(file, file.name)
            info = tarfile.TarInfo(f"{folder.name}.tar")
            info.size = len(content.getvalue())
            tar.addfile(info, io.BytesIO(content.getvalue()))


def folder_of_tars(split: Path, out: Path) -> None:
    out.with_suffix("").mkdir()
    for folder in split.iterdir():
        with tarfile.open(out.with_suffix("") / f"{folder.name}.tar", "w") as tar:
            tar.add(folder, ".")


@pytest.mark.parametrize("pack", [one_tar, tar_of_tars, folder_of_tars])
def test_a_tar_has_the_list_and_the_pixels_of_its_folder(folder, tmp_path, pack):
    root = tmp_path / "tars"
    root.mkdir()
    for split in ("train", "val"):
        pack(folder / split, root / f"{split}.tar")
        ours, theirs = Tree(root).source(split), Tree(folder).source(split)
        assert (ours.names, ours.keys) == (theirs.names, theirs.keys)
        for index in range(len(theirs)):
            assert torch.equal(decode(ours.open(index)), decode(theirs.open(index)))
    assert Tree(root).number().names == ("ant", "bee", "cat")


@pytest.mark.parametrize("pack", [one_tar, tar_of_tars])
def test_classes_are_those_of_timm(folder, tmp_path, pack):
    pack(folder / "train", tmp_path / "train.tar")
    reader = ReaderImageInTar(str(tmp_path / "train.tar"), cache_tarinfo=False)
    theirs = {reader[i][0].read(): int(reader[i][1]) for i in range(len(reader))}
    tree = Tree(tmp_path)
    source = tree.source("train")
    assert [theirs[source.open(i).read()] for i in range(len(source))] == tree.number().of(source)


class Means:
    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> float:
        return decode(self.source.open(index)).float().mean().item()


def test_several_processes_read_one_tar(folder, tmp_path):
    one_tar(folder / "train", tmp_path / "train.tar")
    means = Means(Tree(tmp_path).source("train"))
    here = [means[index] for index in range(len(means))]
    assert list(DataLoader(means, batch_size=None, num_workers=2)) == here


def test_a_flat_tar_of_validation_images_takes_a_label_file(folder, tmp_path):
    one_tar(folder / "train", tmp_path / "train.tar")
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        for name in ("ant", "bee", "cat"):
            tar.add(folder / "val" / name / "0.png", f"{name}.png")
    (tmp_path / "val.txt").write_text("cat.png cat\nant.png ant\nbee.png bee\n")
    tree = Tree(tmp_path)
    assert tree.source("val").names == ("ant.png", "bee.png", "cat.png")
    assert tree.number().of(tree.source("val")) == [0, 1, 2]


def test_tars_that_cannot_be_used_are_one_line(folder, tmp_path):
    one_tar(folder / "train", tmp_path / "train.tar")
    content = (tmp_path / "train.tar").read_bytes()
    middle = content.index(b"train/bee/0.png")  # a header
    harmed = {
        "cut off": content[: middle + 100],
        "damaged": content[:middle] + b"x" * 512 + content[middle + 512 :],
    }
    harmed |= {"unexpected end of data": content[: middle - 1000], "must not be compressed": gzip.compress(content)}
    for words, bytes_ in harmed.items():
        forget_listings()
        (tmp_path / "train.tar").write_bytes(bytes_)
        with pytest.raises(QatError, match=rf"cannot read .*train\.tar: .*{words}"):
            Tree(tmp_path).source("train")
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        tar.add(__file__, "a/b.py")
    with pytest.raises(QatError, match=r"val\.tar has no image"):
        Tree(tmp_path).source("val")
    with pytest.raises(QatError, match=r"is a file: give the folder that holds train\.tar and val\.tar"):
        Tree(tmp_path / "train.tar").source("train")
