"""Files that appear whole or not at all, and JSON with a format number.

Everything llmrec publishes is JSON, safetensors or Parquet. Nothing here reads or writes pickle.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmrec.errors import DataError, MissingPartError


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path` and renames it to `path` when the block ends without an error.

    The parent folder is made where it is missing. After an error `path` is as it was, and the temporary file is gone.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        grant_usual_permissions(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields an empty folder beside `path` and puts it in the place of `path` when the block ends without an error.

    A folder that stood there before is replaced whole: no file of it survives. After an error it is as it was.
    """
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise DataError(
            f"can't write the folder {target}: a file of that name exists; remove it or choose another name"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        grant_usual_permissions(temporary)
        if target.exists():
            replaced = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            os.replace(target, replaced / "folder")
            os.replace(temporary, target)
            shutil.rmtree(replaced)
        else:
            os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def grant_usual_permissions(path: Path) -> None:
    """Gives a file, or a folder with all in it, the permissions that files made by this process usually have.

    Temporary files, and those that safetensors writes, can be read by their owner alone.
    """
    umask = os.umask(0)
    os.umask(umask)
    for part in [path, *(path.rglob("*") if path.is_dir() else ())]:
        part.chmod((0o777 if part.is_dir() else 0o666) & ~umask)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Writes `content` as indented UTF-8 JSON, whole or not at all."""
    text = json.dumps(content, indent=2, ensure_ascii=False, sort_keys=False) + "\n"
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads a JSON file.

    Raises:
        MissingPartError: There is no such file.
        DataError: It is not JSON.
    """
    source = Path(path)
    if not source.is_file():
        raise MissingPartError(f"{source} is missing")
    try:
        return json.loads(source.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{source} is not valid JSON: {error}") from error


def check_format(content: dict[str, Any], supported: int, source: str | os.PathLike[str]) -> None:
    """Refuses a saved part whose `format_version` is missing or newer than `supported`.

    Raises:
        DataError: The number is missing, or of a later llmrec.
    """
    found = content.get("format_version")
    if not isinstance(found, int):
        raise DataError(f"{source} has no format_version: it was not written by llmrec")
    if found > supported:
        raise DataError(f"{source} has format {found}, this llmrec reads up to {supported}: upgrade llmrec")
