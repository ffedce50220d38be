"""The image files of a dataset, found by their names or their paths below the image directory."""

from __future__ import annotations

import filecmp
import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path, PurePosixPath

from lvlm_clorae.data.images import InvalidImage, load_image
from lvlm_clorae.data.reader import MAX_IMAGE_BYTES
from lvlm_clorae.errors import UserError

_CHECK_PIXELS = 1 << 12
"""Pixels to which an image is decoded to check it: a JPEG of this size is decoded several times faster."""


class ImageFiles:
    """The files below a directory. A missing image is normal: tweets are deleted.

    A name is matched as a path below ``root``, else as the name of a single file in any folder; names that differ only
    in their Unicode normal form are equal.

    Args:
        unusable: gets the path of each file that is read and cannot be decoded

    Raises:
        UserError: ``root`` is no directory.
    """

    def __init__(self, root: Path | None, unusable: list[str]) -> None:
        if root is not None and not root.is_dir():
            raise UserError(f"{root}: no such directory of images. Omit --images to build without images.")
        self._unusable, self._by_path = unusable, dict[str, Path]()
        self._by_name: dict[str, list[Path]] = defaultdict(list)
        for path in walk_files(root) if root else ():
            self._by_path[_normal(os.path.relpath(path, root))] = path
            self._by_name[_normal(path.name)].append(path)

    def read(self, name: str | None) -> bytes | None:
        """Return the bytes of an image; None if it is missing or cannot be decoded.

        Raises:
            UserError: files in several folders, which differ, have the name.
        """
        path = self._find(_normal(name)) if name else None
        if not path:
            return None
        data = path.read_bytes() if path.stat().st_size <= MAX_IMAGE_BYTES else b""
        try:
            load_image(data, "the image", max_pixels=_CHECK_PIXELS)
        except InvalidImage:
            self._unusable.append(str(path))
            return None
        return data

    def _find(self, name: str) -> Path | None:
        if name in self._by_path:
            return self._by_path[name]
        found = self._by_name.get(name, [])
        for first, other in pairwise(found):
            if not filecmp.cmp(first, other, shallow=False):
                raise UserError(
                    f'"{name}" is the name of different images: {first} and {other}. Write the path below --images in '
                    "the annotations, or choose a directory with only one of them."
                )
        return found[0] if found else None


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", PurePosixPath(name).as_posix())


def walk_files(root: Path) -> Iterator[Path]:
    """Yield the files below ``root`` in sorted order, also those of symbolic links to folders, each folder once."""
    seen: set[str] = set()
    for directory, directories, names in os.walk(root, followlinks=True):
        directories.sort()
        real = os.path.realpath(directory)
        if real in seen:
            directories.clear()
            continue
        seen.add(real)
        for name in sorted(names):
            yield Path(directory, name)
