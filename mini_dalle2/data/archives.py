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
import stat
import tarfile
import zipfile
from pathlib import Path

ARCHIVES = (".tar", ".zip")
OUTSIDE = "outside the folder (--data.outside=true reads it)"


class Tree:
    """The files below a folder, also those in its archives, without the hidden ones.

    Only regular files count: a pipe or a device has no end. Links that lead out of the folder are
    left out, unless `outside`.

    `files`: {path: place}; place is None on disk, (archive, offset, size) in a .tar and
    (archive, name) in a .zip. `left_out`: [(path, reason, detail)]. `damaged`: {archive: why it
    cannot be read}.
    """

    def __init__(self, root, outside=False):
        self.root = os.path.realpath(root)
        self.outside = outside
        self.files = {}
        self.left_out = []
        self.damaged = {}
        # The folders that links led to, so that no circle has an end.
        self.seen = set()
        folders = [Path(root)]
        # Not os.walk, which calls itself for each level.
        while folders:
            folder = folders.pop()
            try:
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            except OSError as error:
                self.left_out.append((folder, "folder cannot be read", error.strerror))
                continue
            for entry in entries:
                if not entry.name.startswith("."):
                    self._add(entry, folders)
        self.files = dict(sorted(self.files.items()))

    def _add(self, entry, folders):
        """Add a file, or a folder to the list of `folders` that are still to be read."""
        path = Path(os.path.normpath(entry.path))
        try:
            is_folder = entry.is_dir()
            is_file = entry.is_file()
        except OSError as error:
            # A link to itself, for example.
            self.left_out.append((path, "file cannot be read", error.strerror))
            return
        if entry.is_symlink() and not self.may_read(path):
            self.left_out.append((path, OUTSIDE, os.path.realpath(path)))
        elif is_folder and (not entry.is_symlink() or self._is_new(path)):
            folders.append(path)
        elif is_folder:
            self.left_out.append((path, "link to a folder that is read already", ""))
        elif is_file and path.suffix.lower() in ARCHIVES:
            self._add_archive(path)
        elif is_file:
            self.files[path] = None
        elif entry.is_symlink() and not path.exists():
            self.left_out.append((path, "link to nowhere", ""))
        else:
            self.left_out.append((path, "no regular file", "a pipe, a socket or a device"))

    def may_read(self, path):
        """Whether a path lies in the folder, wherever its links lead, or all may be read."""
        return self.outside or Path(os.path.realpath(path)).is_relative_to(self.root)

    def _is_new(self, link):
        """Whether a link leads to a folder that is not read yet. It is, from now on."""
        real = os.path.realpath(link)
        root = Path(self.root)
        # Folders inside are read without the link, and one around the folder has no end.
        around = root.is_relative_to(real) or Path(real).is_relative_to(root)
        if not self.outside or around or real in self.seen:
            return False
        self.seen.add(real)
        return True

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

    def is_regular(self, path):
        """Whether a path is a file with an end: no pipe, no device. Raises OSError, ValueError."""
        return self.files.get(path) is not None or stat.S_ISREG(os.stat(path).st_mode)

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
        status = os.stat(path if place is None else place[0])
        return status.st_mtime_ns, status.st_size


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
