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
# The most bytes of a text, or of a file in an archive: a small .zip may unpack to any length.
MOST_BYTES = 2 ** 30
OUTSIDE = "outside the folder (--data.outside=true reads it)"


class Tree:
    """The files below a folder, also those in its archives, without the hidden ones.

    Only regular files count: a pipe or a device has no end. Links that lead out of the folder are
    left out, unless `outside`. In an archive, no link is followed.

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
        except Exception as error:
            # tarfile and zipfile raise many kinds for a damaged archive.
            self.damaged[archive] = str(error) or type(error).__name__
            return
        for name, place in members:
            path = Path(os.path.normpath(archive / name))
            if not path.is_relative_to(archive):
                self.left_out.append((archive, "names that lead out of their archive", name))
            elif Path(name).name.startswith("."):
                continue
            elif place is None:
                self.left_out.append((path, "no regular file", "a link or a device"))
            else:
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
        """Return the bytes of a file. Raises OSError, also for more than MOST_BYTES."""
        place = self.files.get(path)
        if place is None:
            check_length(path.stat().st_size)
            return path.read_bytes()
        if len(place) == 3:
            archive, offset, size = place
            check_length(size)
            with open(archive, "rb") as file:
                file.seek(offset)
                return file.read(size)
        archive, name = place
        try:
            check_length(opened_zip(archive).getinfo(name).file_size)
            return opened_zip(archive).read(name)
        except Exception as error:
            # A file may be damaged, have a password, or be packed in a way that Python lacks: each
            # way of packing raises its own kind.
            raise OSError(f"{name} in {archive}: {error}") from error

    def version(self, path):
        """Return (change time, bytes) of a file, or of its archive. Raises OSError, ValueError."""
        place = self.files.get(path)
        status = os.stat(path if place is None else place[0])
        return status.st_mtime_ns, status.st_size


def check_length(nbytes):
    """Raise OSError for more than MOST_BYTES bytes."""
    if nbytes > MOST_BYTES:
        raise OSError(f"it has {nbytes:,} bytes, and at most {MOST_BYTES:,} are read")


def list_members(archive):
    """Yield (name, place) for each file in an archive; see `Tree`. No place: a link, a device."""
    if archive.suffix.lower() == ".zip":
        with zipfile.ZipFile(archive) as file:
            for info in file.infolist():
                if not info.is_dir():
                    # The upper bits are those of a file on disk.
                    is_link = stat.S_ISLNK(info.external_attr >> 16)
                    yield info.filename, None if is_link else (archive, info.filename)
        return
    # "r:": not compressed. In a compressed archive, no file can be found by its place.
    with tarfile.open(archive, "r:") as file:
        for info in file:
            if not info.isdir():
                # A sparse file has holes, which are not in the archive.
                is_whole = info.isfile() and not info.issparse()
                yield info.name, (archive, info.offset_data, info.size) if is_whole else None


@functools.lru_cache(maxsize=16)
def opened_zip(archive):
    """Open a .zip once: reading its table of contents takes long."""
    return zipfile.ZipFile(archive)
