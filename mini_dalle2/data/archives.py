"""A folder and the archives in it, as one tree of files.

    pictures/a.png                  a file
    pictures/00000.tar/0001.jpg     a file in an archive: img2dataset and WebDataset write .tar
    pictures/more.zip/b.png         the same in a .zip

Nothing is unpacked: a file in an archive is read at its place there.
Read next: folder.py.
"""

import functools
import io
import os
import tarfile
import zipfile
from pathlib import Path

ARCHIVES = (".tar", ".zip")


class Tree:
    """The files below a folder, also those in its archives, without the hidden ones.

    `files`: {path: place}; place is None on disk, (archive, offset, size) in a .tar and
    (archive, name) in a .zip. `damaged`: {archive: why it cannot be read}.
    """

    def __init__(self, root):
        self.files = {}
        self.damaged = {}
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            for name in sorted(names):
                if name.startswith("."):
                    continue
                path = Path(os.path.normpath(Path(folder, name)))
                if path.suffix.lower() in ARCHIVES:
                    self._add_archive(path)
                else:
                    self.files[path] = None

    def _add_archive(self, archive):
        """Add the files of one archive, or note why it cannot be read."""
        try:
            members = list(list_members(archive))
        except (OSError, ValueError, tarfile.TarError, zipfile.BadZipFile) as error:
            self.damaged[archive] = " ".join(str(error).split())
            return
        for name, place in members:
            path = Path(os.path.normpath(archive / name))
            # Names such as "../a.png" lead out of the archive.
            if path.is_relative_to(archive) and not Path(name).name.startswith("."):
                self.files[path] = place

    def open(self, path):
        """What Pillow can open: the path itself, or the bytes of a file in an archive."""
        place = self.files.get(path)
        return path if place is None else io.BytesIO(self.read(path))

    def start(self, path):
        """Return the first bytes of a file. Raises OSError."""
        if self.files.get(path) is not None:
            return self.read(path)[:64]
        with open(path, "rb") as file:
            return file.read(64)

    def read(self, path):
        """Return the bytes of a file. Raises OSError."""
        place = self.files.get(path)
        if place is None:
            return path.read_bytes()
        if len(place) == 3:
            archive, offset, size = place
            with open(archive, "rb") as file:
                file.seek(offset)
                return file.read(size)
        archive, name = place
        try:
            return opened_zip(archive).read(name)
        except (zipfile.BadZipFile, RuntimeError) as error:
            # RuntimeError: the file has a password, or is packed in a way that Python lacks.
            raise OSError(f"{name} in {archive}: {error}") from error

    def version(self, path):
        """Return (change time, bytes) of a file, or of its archive. Raises OSError, ValueError."""
        place = self.files.get(path)
        stat = os.stat(path if place is None else place[0])
        return stat.st_mtime_ns, stat.st_size


def list_members(archive):
    """Yield (name, place) for each file in an archive; see `Tree`."""
    if archive.suffix.lower() == ".zip":
        with zipfile.ZipFile(archive) as file:
            for info in file.infolist():
                if not info.is_dir():
                    yield info.filename, (archive, info.filename)
        return
    # "r:": not compressed. In a compressed archive, no file can be found by its place.
    with tarfile.open(archive, "r:") as file:
        for info in file:
            if info.isfile():
                yield info.name, (archive, info.offset_data, info.size)


@functools.lru_cache(maxsize=16)
def opened_zip(archive):
    """Open a .zip once: reading its table of contents takes long."""
    return zipfile.ZipFile(archive)
