from pathlib import Path

import pytest

from megatron.atomic import atomic_write, make_folder
from megatron.errors import DiskError


def test_file_appears_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def write_and_fail(path: Path, error: Exception) -> None:
    with atomic_write(path) as file:
        file.write(b"new")
        raise error


@pytest.mark.parametrize("error", [KeyError(), OSError(28, "No space left on device")])
def test_failure_leaves_the_old_file_alone(tmp_path: Path, error: Exception) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises((KeyError, DiskError)):
        write_and_fail(path, error)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_is_a_disk_error(tmp_path: Path) -> None:
    with pytest.raises(DiskError) as caught:
        write_and_fail(tmp_path / "a", OSError(28, "No space left on device"))
    assert str(caught.value) == f"{tmp_path / 'a'}: cannot be written: No space left on device"


def test_folders_are_made_with_those_above(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_folder_below_a_file_is_a_disk_error(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(DiskError, match="cannot be made: Not a directory"):
        make_folder(tmp_path / "a" / "b")
