"""The files of a training checkpoint: whole or not there, and how one that isn't whole is told.

The Trainer writes a checkpoint file by file into its final folder, and resumes from a half one without an error where
the optimizer, the schedule or the random state is missing. Here a checkpoint is written beside its place, gets a list
of its files with their sizes (`checkpoint_files.json`), and is put in its place by one rename. What lacks the list, or
a file of it, is not whole and is never resumed from.

This module knows folders and files. It knows nothing of models or of what is in the files.
"""

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from llmrec.errors import DataError, MissingPartError
from llmrec.files import check_format, read_json, write_json

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST_NAME = "checkpoint_files.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_PARTIAL, _REPLACED = ".partial", ".replaced"


def partial_folder(checkpoint: Path) -> Path:
    """Where `checkpoint` is written before it is whole: the folder beside it that holds one of the same name."""
    return checkpoint.with_name(f".{checkpoint.name}{_PARTIAL}")


def finish_checkpoint(checkpoint: Path, description: dict[str, Any]) -> None:
    """Lists the files of a checkpoint that was written to its partial folder, and puts it in its place.

    The files are on the disk before the rename (fsync): some file systems report a full disk only then. A checkpoint
    that stood in the place before is replaced.

    Args:
        checkpoint: Its final folder.
        description: What to keep with the list, JSON values.

    Raises:
        OSError: The disk is full, or something else doesn't let the files be written.
    """
    partial = partial_folder(checkpoint)
    written = partial / checkpoint.name
    files = {path.relative_to(written).as_posix(): path.stat().st_size for path in _files(written)}
    content = {"format_version": FORMAT_VERSION, **description, "files": files}
    write_json(written / MANIFEST_NAME, content)
    for path in [*_files(written), written]:
        _flush(path)
    if checkpoint.exists():
        replaced = checkpoint.with_name(f".{checkpoint.name}{_REPLACED}")
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(checkpoint, replaced)
        os.replace(written, checkpoint)
        shutil.rmtree(replaced)
    else:
        os.replace(written, checkpoint)
    partial.rmdir()
    _flush(checkpoint.parent)


def remove_leftovers(output_folder: Path) -> list[str]:
    """Removes what a run that was killed inside a save has left there; returns the names."""
    found = [
        path
        for ending in (_PARTIAL, _REPLACED)
        for path in output_folder.glob(f".checkpoint-*{ending}")
        if path.is_dir()
    ]
    for path in found:
        shutil.rmtree(path)
    return sorted(path.name for path in found)


def faults_of(checkpoint: Path) -> list[str]:
    """Why a checkpoint is not whole: one line for each fault, none where it is."""
    if not checkpoint.is_dir():
        return ["there is no such folder"]
    try:
        content = _read_manifest(checkpoint)
    except (MissingPartError, DataError) as error:
        return [str(error)]
    faults = []
    for name, size in content["files"].items():
        path = checkpoint / name
        if not path.is_file():
            faults.append(f"{name} is missing")
        elif path.stat().st_size != size:
            faults.append(f"{name} has {path.stat().st_size} bytes, {size} were written")
    return faults


def check_whole(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """What was kept with the list of files of a whole checkpoint.

    Raises:
        MissingPartError: It isn't whole. The message says what is wrong with which files.
    """
    folder = Path(checkpoint)
    faults = faults_of(folder)
    if faults:
        raise MissingPartError(
            f"{folder} is not a whole checkpoint: {'; '.join(faults)}; resume from another one, or say 'latest' for"
            " the newest that is whole"
        )
    return _read_manifest(folder)


def newest_whole_checkpoint(output_folder: str | os.PathLike[str]) -> Path | None:
    """The checkpoint of the most steps that is whole; the log says which were passed over, and why.

    Returns:
        Its folder; None where there is none, or no such output folder.
    """
    found, skipped = find_whole(output_folder)
    for reason in skipped:
        logger.warning("%s", reason)
    return found


def find_whole(output_folder: str | os.PathLike[str]) -> tuple[Path | None, list[str]]:
    """As `newest_whole_checkpoint`, with the reasons in place of the log lines."""
    skipped: list[str] = []
    for folder in sorted(_checkpoints(Path(output_folder)), key=step_of, reverse=True):
        faults = faults_of(folder)
        if not faults:
            return folder, skipped
        skipped.append(f"{folder.name} is not whole: {'; '.join(faults)}")
    return None, skipped


def step_of(checkpoint: Path) -> int:
    """The number of steps that its name says."""
    found = _NAME.fullmatch(checkpoint.name)
    return int(found[1]) if found else -1


def is_write_error(error: BaseException) -> bool:
    """Whether an error of saving says that the disk doesn't take the file: full, over quota, read-only, gone."""
    if isinstance(error, RuntimeError):  # torch.save names its C++ file, and neither class nor number of the error
        return "inline_container" in str(error)
    return isinstance(error, OSError | SafetensorError) and not isinstance(error, MissingPartError)


def _read_manifest(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / MANIFEST_NAME
    content = read_json(path)
    check_format(content if isinstance(content, dict) else {}, FORMAT_VERSION, path)
    if not isinstance(content.get("files"), dict):
        raise DataError(f"{path} lists no files")
    return dict(content)


def _checkpoints(output_folder: Path) -> Iterator[Path]:
    if output_folder.is_dir():
        yield from (path for path in output_folder.iterdir() if path.is_dir() and step_of(path) >= 0)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _flush(path: Path) -> None:
    with contextlib.suppress(PermissionError, IsADirectoryError):  # where folders can't be opened or flushed
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
