import os
import stat

import pytest

from llmrec.errors import DataError, MissingPartError
from llmrec.files import atomic_file, atomic_folder, check_format, read_json, write_json


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def stop_half_way(path):
    path.write_text("half")
    raise RuntimeError


def test_a_file_appears_whole(tmp_path):
    target = tmp_path / "made" / "on the way" / "file.txt"
    with atomic_file(target) as temporary:
        temporary.write_text("new")
        assert not target.exists()
        assert temporary.parent == target.parent  # the same file system, so that renaming is one step
    assert target.read_text() == "new"
    assert names(target.parent) == ["file.txt"]


def test_an_error_leaves_the_old_file(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(target) as temporary:
        stop_half_way(temporary)
    assert target.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    before = os.umask(0o022)
    try:
        with atomic_file(tmp_path / "file.txt") as temporary:
            temporary.write_text("")
        with atomic_folder(tmp_path / "folder") as temporary:
            (temporary / "file.txt").write_text("")
        assert os.umask(0o022) == 0o022  # left as it was
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file.txt").stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o755


def test_a_folder_is_replaced_whole(tmp_path):
    target = tmp_path / "folder"
    for content in ("old", "new"):
        with atomic_folder(target) as temporary:
            assert names(temporary) == []
            (temporary / f"{content}.txt").write_text(content)
    assert names(target) == ["new.txt"]
    assert names(tmp_path) == ["folder"]


def test_an_error_leaves_the_old_folder(tmp_path):
    target = tmp_path / "folder"
    target.mkdir()
    (target / "old.txt").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(target) as temporary:
        stop_half_way(temporary / "new.txt")
    assert names(target) == ["old.txt"]
    assert names(tmp_path) == ["folder"]


def test_a_folder_does_not_replace_a_file(tmp_path):
    (tmp_path / "folder").write_text("a file")
    with pytest.raises(DataError, match="a file of that name exists"), atomic_folder(tmp_path / "folder"):
        pass
    assert (tmp_path / "folder").read_text() == "a file"


def test_json_there_and_back(tmp_path):
    content = {"z": 1, "a": ["Crème", None, 0.1]}
    write_json(tmp_path / "part.json", content)
    assert read_json(tmp_path / "part.json") == content
    assert list(read_json(tmp_path / "part.json")) == ["z", "a"]  # in the order given
    assert "Crème" in (tmp_path / "part.json").read_text(encoding="utf-8")
    with pytest.raises(TypeError):
        write_json(tmp_path / "part.json", {"not": object()})
    assert read_json(tmp_path / "part.json") == content


def test_json_that_cannot_be_read(tmp_path):
    with pytest.raises(MissingPartError, match=r"part\.json is missing"):
        read_json(tmp_path / "part.json")
    for damaged in (b'{"a": ', b"\xff\xfe{}"):
        (tmp_path / "part.json").write_bytes(damaged)
        with pytest.raises(DataError, match=r"part\.json is not valid JSON"):
            read_json(tmp_path / "part.json")


def test_format_numbers():
    check_format({"format_version": 2}, 2, "part")
    check_format({"format_version": 1}, 2, "part")
    with pytest.raises(DataError, match="part has format 3, this llmrec reads up to 2"):
        check_format({"format_version": 3}, 2, "part")
    for content in ({}, {"format_version": "2"}):
        with pytest.raises(DataError, match="no format_version"):
            check_format(content, 2, "part")
