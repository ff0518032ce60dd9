"""Regular files: what may be replaced, and what may be read."""

import contextlib
import errno
import os
import stat
from pathlib import Path


def place_of(path: str | os.PathLike[str]) -> Path:
    """The file that `path` leads to, by links too.

    Raises:
        OSError: It leads to a file that has no name: only a file with one can be replaced.
    """
    target = Path(os.path.realpath(path))
    # Links such as those in /dev/fd lead on to what is open, and say its name of old.
    given = Path(path)
    if given.exists() and not (target.exists() and given.samefile(target)):
        message = "leads to a pipe, or a file without a name: write and read files by their name"
        raise OSError(errno.EINVAL, message, str(path))
    return target


def existing(target: Path, path: str | os.PathLike[str]) -> os.stat_result | None:
    """The file at `target` that will be replaced, if there is one.

    Raises:
        OSError: What is there is no regular file; called `path` in the message.
    """
    try:
        found = target.stat()
    except FileNotFoundError:
        return None
    _check_regular(found.st_mode, path)
    return found


def _check_regular(mode: int, path: str | os.PathLike[str]) -> None:
    if stat.S_ISDIR(mode):
        message = "is a directory, expected a file: add a name to it"
        raise IsADirectoryError(errno.EISDIR, message, str(path))
    if not stat.S_ISREG(mode):
        message = "is a pipe, socket or device, expected a file: write and read files by their name"
        raise OSError(errno.EINVAL, message, str(path))


def hand_on_owner(replaced: os.stat_result, file: Path) -> None:
    """Give `file` to the owner and group of the file it replaces, where the system lets us."""
    own = file.stat()
    if (own.st_uid, own.st_gid) != (replaced.st_uid, replaced.st_gid):
        # Only a privileged user may give files away.
        with contextlib.suppress(PermissionError):
            os.chown(file, replaced.st_uid, replaced.st_gid)


def hand_on_attributes(replaced: Path, file: Path) -> None:
    """Give `file` the extended attributes of the file it replaces, access lists among them.

    As far as the system has any, and lets us; what the folder has given it goes.
    """
    for name in _attributes(file) - _attributes(replaced):
        with contextlib.suppress(OSError):
            os.removexattr(file, name)
    for name in _attributes(replaced):
        with contextlib.suppress(OSError):
            os.setxattr(file, name, os.getxattr(replaced, name))


def _attributes(file: Path) -> set[str]:
    try:
        return set(os.listxattr(file))
    except (OSError, AttributeError):
        return set()


def open_regular(path: Path) -> int:
    """A descriptor of a file, without waiting for whoever would write to a pipe.

    Raises:
        OSError: There is none, it may not be read, or it is no regular file.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, "no such file", str(path)) from None
    try:
        _check_regular(os.fstat(descriptor).st_mode, path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
