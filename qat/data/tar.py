"""Images in tars, with the classes of timm's readers: train.tar, one tar of each class, or a tar that holds those.

The list is that of the folder that the tar was made of, so soft labels of one fit the other. An image is read by its
offset, so that processes share no open file.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from qat.data.folder import in_order, is_image
from qat.data.source import Source
from qat.errors import QatError, first_line

SUFFIX = ".tar"


class Member(NamedTuple):
    """An image inside of a tar."""

    parts: tuple[str, ...]  # folders, tars without their suffix, and the name
    file: int  # number of the tar on the disk
    offset: int  # bytes before the image
    size: int  # bytes


@dataclass(frozen=True, eq=False)
class TarSource(Source):
    """Images inside of uncompressed tars.

    Args:
        files: the tars.
        spans: (N, 3) int64: number of the tar, offset and size in bytes of every image.
    """

    files: tuple[Path, ...] = ()
    spans: npt.NDArray[np.int64] | None = None

    def open(self, index: int) -> BinaryIO:
        """The content of an image."""
        assert self.spans is not None
        number, offset, size = self.spans[index].tolist()
        with self.files[number].open("rb", buffering=0) as file:
            file.seek(offset)
            return io.BytesIO(file.read(size))


@cache
def tar_source(place: Path) -> TarSource:
    """The images of a tar, or of all tars in a folder; QatError if there are none, or a tar cannot be read."""
    files = (place,) if place.is_file() else tuple(sorted(place.glob(f"*{SUFFIX}")))
    members: list[Member] = []
    for number, file in enumerate(files):
        above = () if place.is_file() else (file.stem,)
        try:
            with tarfile.open(file, "r:") as tar:
                members += _images(tar, above, number, 0)
        except (tarfile.TarError, OSError, EOFError) as error:
            raise QatError(
                f"cannot read {file}: {first_line(error)} (a tar of images must not be compressed)"
            ) from None
    members = _without_common_folder(members)
    if not members:
        raise QatError(f"{place} has no image")
    places = {key: i for i, key in enumerate(in_order({_key(member) for member in members}))}
    members.sort(key=lambda member: (places[_key(member)], "/".join(member.parts)))
    same = {key: key for key in places}
    return TarSource(
        place,
        tuple("/".join(member.parts) for member in members),
        tuple(same[_key(member)] for member in members),
        files=files,
        spans=np.array([member[1:] for member in members], np.int64),
    )


def _key(member: Member) -> str:
    """The name of the class; empty for an image in no folder."""
    return member.parts[0] if len(member.parts) > 1 else ""


def _images(tar: tarfile.TarFile, above: tuple[str, ...], number: int, start: int) -> Iterator[Member]:
    """Yield the images of a tar and of those inside.

    Args:
        tar: open tar.
        above: what stands before its names.
        number: of the file on the disk.
        start: bytes of that file before this tar.
    """
    while (info := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # a million records would take a gigabyte
        path = PurePosixPath(info.name)
        parts = above + tuple(part for part in path.parts if part not in (".", "/"))
        if not info.isreg() or any(part.startswith(".") for part in parts):
            continue
        if is_image(path.name):
            yield Member(parts, number, start + info.offset_data, info.size)
        elif path.suffix == SUFFIX:
            inner = tar.extractfile(info)
            assert inner is not None
            with tarfile.open(fileobj=inner, mode="r:") as deeper:
                yield from _images(deeper, (*parts[:-1], path.stem), number, start + info.offset_data)
    _check_end(tar)


def _check_end(tar: tarfile.TarFile) -> None:
    """TarError for a tar that is cut off or damaged at a header, which Python takes for its end."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if (block := tar.fileobj.read(tarfile.BLOCKSIZE)) not in (b"", bytes(tarfile.BLOCKSIZE)):
        raise tarfile.TarError(f"it is {'cut off' if len(block) < tarfile.BLOCKSIZE else 'damaged'}")


def _without_common_folder(members: list[Member]) -> list[Member]:
    """The members without the folders above the class folders, such as train/."""
    while members and all(len(m.parts) > 2 for m in members) and len({m.parts[0] for m in members}) == 1:
        members = [member._replace(parts=member.parts[1:]) for member in members]
    return members
