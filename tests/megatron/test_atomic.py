import errno
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron.atomic import atomic_write, atomic_writes, make_folder
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


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, which can be mounted read-only."""
    folder = tmp_path / "mount"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "none", str(folder)], capture_output=True)
    if done.returncode != 0:
        pytest.skip(f"this user cannot mount: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_read_only_file_system_is_a_disk_error(mount: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(mount)], check=True)
    with pytest.raises(DiskError, match="cannot be written: Read-only file system"):
        write_and_fail(mount / "a", KeyError())


REASONS = {
    errno.EROFS: "Read-only file system",
    errno.EACCES: "Permission denied",
    errno.ENOENT: "No such file or directory",
    errno.EIO: "Input/output error",
}


@pytest.mark.parametrize("number", REASONS)
@pytest.mark.parametrize("broken", ["open", "replace"])
def test_failing_removal_does_not_hide_what_went_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, broken: str
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    def fail_otherwise(*args: object, **options: object) -> None:
        raise OSError(errno.EBUSY, "the removal failed")

    monkeypatch.setattr(Path, broken, fail)
    monkeypatch.setattr(Path, "unlink", fail_otherwise)
    with pytest.raises(DiskError) as caught, atomic_write(tmp_path / "a") as file:
        file.write(b"new")
    assert str(caught.value) == f"{tmp_path / 'a'}: cannot be written: {REASONS[number]}"


def test_failing_removal_does_not_hide_a_bug(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise OSError(errno.EBUSY, "the removal failed")

    monkeypatch.setattr(Path, "unlink", fail)
    with pytest.raises(KeyError, match="the bug"):
        write_and_fail(tmp_path / "a", KeyError("the bug"))


_WRITER = """
import sys, time
from pathlib import Path
from megatron.atomic import atomic_write
with atomic_write(Path(sys.argv[1])) as file:
    file.write(b"half of it")
    file.flush()
    print("writing", flush=True)
    time.sleep(600)
"""


def test_next_writer_removes_what_a_killed_one_has_left(tmp_path: Path) -> None:
    path = tmp_path / "a"
    writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"writing\n"
    with atomic_write(path) as file:
        file.write(b"new")
    assert len(list(tmp_path.iterdir())) == 2, "the file of a living writer stays"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    with atomic_write(path) as file:
        file.write(b"newer")
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"newer"


def test_leftover_of_another_host_is_removed_when_it_is_old(tmp_path: Path) -> None:
    leftover = tmp_path / f".a.elsewhere.{'0' * 32}.tmp"
    leftover.touch()
    with atomic_write(tmp_path / "a"):
        pass
    assert leftover.exists()
    os.utime(leftover, (0, time.time() - 2 * 3600))
    with atomic_write(tmp_path / "a"):
        pass
    assert not leftover.exists()


def test_files_that_belong_together_appear_in_order_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / name for name in "cab"]
    appeared: list[str] = []
    replace = Path.replace

    def note(self: Path, target: Path) -> Path:
        appeared.append(target.name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", note)
    with atomic_writes(*paths) as files:
        for path in paths:
            files[path].write(path.name.encode())
        assert appeared == []
    assert appeared == ["c", "a", "b"]
    with pytest.raises(DiskError, match="b: cannot be written: File too large"):
        write_too_much(paths)
    assert [path.read_bytes() for path in paths] == [b"c", b"a", b"b"]
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c"]


def write_too_much(paths: list[Path]) -> None:
    """Fill the last of the files beyond what may be written."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with atomic_writes(*paths) as files:
            for path in paths:
                files[path].write(b"new")
            files[paths[-1]].write(bytes(5000))
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
