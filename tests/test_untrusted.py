"""Files that anyone may have made: one line for each that is no JSON object of bounded size."""

import os
import re
from pathlib import Path

import pytest

from qlora_kit.errors import UserError
from qlora_kit.untrusted import read_json, read_regular_file, user_path

DEEP = 200_000


def test_an_object_is_read(tmp_path):
    (tmp_path / "file").write_text('{"a": [1, "é"]}', encoding="utf-8")
    assert read_json(tmp_path / "file", "model.name") == {"a": [1, "é"]}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[" * DEEP, "nested too deep"),
        (b'{"a":' * DEEP, "nested too deep"),
        (b"[1]", "holds no JSON object"),
        (b"null", "holds no JSON object"),
        (b'{"a": 1', "delimiter"),
        (b'{"a": "\xff"}', "codec"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
        (b"{}" + b" " * 2**24, "more than 16,777,216 bytes"),
    ],
)
def test_anything_else_is_one_line(tmp_path, content, reason):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError, match=reason) as error:
        read_json(tmp_path / "file", "model.name")
    assert len(error.value.lines) == 1


def test_devices_and_pipes_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path.joinpath("/dev/zero"), tmp_path):
        with pytest.raises(ValueError, match="no regular file"):
            read_regular_file(path)


def test_a_name_becomes_a_path_whether_or_not_something_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").touch()
    assert user_path("~/file", "--adapter") == tmp_path / "file"
    for missing in ("missing", "file/below"):
        assert not user_path(f"{tmp_path}/{missing}", "--adapter").exists()
    assert user_path("caf\udce9", "--adapter") == Path("caf\udce9")  # a name that is not UTF-8, as the system hands it over


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("~nosuchuser/x", "home directory"),
        ("a\0b", "null byte"),
        ("a\ud800", "half a character"),
        ("n" * 300, "name too long"),
        ("d/" * 5000, "name too long"),
        ("loop", "symbolic links"),
        ("locked", "Permission denied"),
    ],
)
def test_a_name_that_is_no_path_is_one_line(tmp_path, monkeypatch, name, reason):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    if name == "locked":  # which the superuser may search

        def refuse(*_, **__):
            raise PermissionError(13, reason)

        monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(UserError, match=re.compile(reason, re.I)) as error:
        user_path(name, "--adapter")
    assert len(error.value.lines) == 1
    assert error.value.lines[0].startswith("--adapter: ")
