"""The staging folder: finished episodes of a dataset that is not yet complete.

Owns: `<dataset>/.partial`, the check whether a recording may use a folder, and the error for a full disk. It does not
know the contents of an episode or the dataset format.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from vla.data.format import INFO, STAGING
from vla.errors import DataError

EPISODE = "episode-{:06d}"


def finished(staging: Path) -> list[int]:
    """Numbers of the finished episodes in a staging folder, ascending."""
    return sorted(int(path.name.removeprefix("episode-")) for path in staging.glob("episode-*"))


def open_staging(root: Path, resume: bool) -> Path:
    """Create or clean the staging folder of `root` and return it.

    Raises:
        DataError: `root` contains a finished dataset, unrelated files or, without `resume`, an unfinished recording.
    """
    staging = root / STAGING
    check_staging(root, resume)
    for leftover in staging.glob(".*"):  # unfinished episodes of a killed process
        # Its workers may still be alive. Rename the folder before removing it, so that they cannot publish a part of
        # it.
        removed = leftover.with_name(f".removed-{uuid.uuid4().hex}")
        with contextlib.suppress(FileNotFoundError):
            leftover.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)
    staging.mkdir(parents=True, exist_ok=True)
    return staging


def check_staging(root: Path, resume: bool) -> None:
    """Raise the errors of `open_staging` without writing anything."""
    staging = root / STAGING
    if (root / INFO).is_file():
        raise DataError(f"{root} already contains a dataset. Choose another folder, or remove this one.")
    if staging.is_dir():
        if not resume:
            raise DataError(
                f"{root} contains an unfinished recording of {len(finished(staging))} episodes. "
                "Continue it with `--resume`, or remove the folder."
            )
    elif root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise DataError(f"{root} exists and is not a recording of this package. Choose another folder.")


def drop_staging(root: Path) -> None:
    """Remove a staging folder without finished episodes, and `root` if it is then empty."""
    shutil.rmtree(root / STAGING, ignore_errors=True)
    with contextlib.suppress(OSError):
        root.rmdir()


@contextlib.contextmanager
def guard_disk(place: Path) -> Iterator[None]:
    """Convert a disk-full error to a DataError."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC and "No space left on device" not in str(error):
            raise
        raise DataError(
            f"the disk is full while writing {place}. Finished episodes are safe; free some space and continue."
        ) from None
