"""A save is complete or not there, and every rank learns of a failure."""

import errno
import multiprocessing
import os
import resource
import signal
from collections import namedtuple
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from megatron.checkpoint import save as save_module
from megatron.checkpoint.load import open_checkpoint
from megatron.checkpoint.save import save_checkpoint
from megatron.errors import CheckpointError, DiskError, PeerError, RunError
from mpu import ShardedTensor
from mpu.sharding import Box
from tests.distributed import run_ranks
from tests.megatron.checkpoint.sample import FILES, local_state, names, save, world

Usage = namedtuple("Usage", ["total", "used", "free"])
OLD, NEW = "step-00000100", "step-00000200"


def save_states(
    folder: Path, states: Iterable[ShardedTensor], files: Mapping[str, bytes] | None = None
) -> Path:
    return save_checkpoint(
        folder,
        1,
        states,
        state={},
        config={},
        layout={},
        files=files or {},
        group=world(),
        keep_last=0,
    )


def test_folder_is_made_and_named_after_the_step(tmp_path: Path) -> None:
    assert save(tmp_path / "runs" / "a", step=123456789) == tmp_path / "runs/a/step-123456789"
    assert save(tmp_path, step=7).name == "step-00000007"


def test_only_ranks_that_own_something_write_a_file(tmp_path: Path) -> None:
    path = run_ranks(2, save_owned_by_rank_1, tmp_path)[0]
    assert names(path) == ["manifest.json", "rank-00001.safetensors"]


def save_owned_by_rank_1(folder: Path) -> Path:
    group = world()
    assert group is not None
    owned = group.rank() == 1
    states = [replace(state, owned=owned) for state in local_state(0, 1, filled=True)]
    return save_states(folder, states)


def test_files_can_be_read_by_whom_the_umask_allows(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        path = save(tmp_path)
    finally:
        os.umask(mask)
    modes = {p.name: p.stat().st_mode & 0o777 for p in path.rglob("*") if p.is_file()}
    assert set(modes.values()) == {0o640}, modes


def test_step_that_is_saved_already_is_refused_and_kept(tmp_path: Path) -> None:
    path = save(tmp_path)
    with pytest.raises(CheckpointError, match=f"{OLD}: this step is saved already"):
        save(tmp_path)
    assert names(tmp_path) == [OLD]
    open_checkpoint(path)


def test_invalid_save_of_the_same_step_is_set_aside(tmp_path: Path) -> None:
    (save(tmp_path) / "manifest.json").write_bytes(b"{}")
    open_checkpoint(save(tmp_path))
    kept, set_aside = names(tmp_path)
    assert kept == OLD
    assert set_aside.startswith(f"{OLD}.damaged-")
    assert "rank-00000.safetensors" in names(tmp_path / set_aside)


def test_incomplete_tensor_is_not_saved(tmp_path: Path) -> None:
    states = local_state(0, 2, filled=True)
    with pytest.raises(CheckpointError, match=r"could not be opened again: .*do not tile"):
        save_states(tmp_path, states)
    assert names(tmp_path) == []


def test_tensor_owned_twice_is_not_saved(tmp_path: Path) -> None:
    state = local_state(0, 1, filled=True)[0]
    with pytest.raises(CheckpointError, match="do not tile"):
        save_states(tmp_path, [state, state])
    assert names(tmp_path) == []


def test_ranks_that_disagree_on_a_shape_are_refused(tmp_path: Path) -> None:
    state = local_state(0, 1, filled=True)[0]
    with pytest.raises(CheckpointError, match=r"float32 of shape \(8, 6\), another .* \(9, 6\)"):
        save_states(tmp_path, [state, replace(state, shape=(9, 6))])


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "manifest.json"])
def test_file_that_would_leave_the_folder_is_not_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot be the name"):
        save_states(tmp_path, local_state(0, 1, filled=True), files={name: b"x"})
    assert names(tmp_path) == []


def test_file_named_like_one_of_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="File exists"):
        save_states(
            tmp_path, local_state(0, 1, filled=True), files={"rank-00000.safetensors": b"x"}
        )
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("keep_last", "kept"), [(0, [1, 2, 3, 4]), (1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4])]
)
def test_newest_saves_are_kept(tmp_path: Path, keep_last: int, kept: list[int]) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    save(tmp_path, 4, keep_last)
    assert names(tmp_path) == [f"step-{step:08d}" for step in kept]


def test_save_just_written_is_kept_though_its_step_is_not_the_newest(tmp_path: Path) -> None:
    save(tmp_path, 200)
    save(tmp_path, 100, keep_last=1)
    assert names(tmp_path) == [OLD, NEW]


def test_invalid_saves_neither_count_nor_go(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (save(tmp_path, 2) / "manifest.json").unlink()
    (tmp_path / "step-00000003").mkdir()
    save(tmp_path, 4, keep_last=2)
    assert names(tmp_path) == [f"step-{step:08d}" for step in (1, 2, 3, 4)]


def test_save_that_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 100)
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(100, 90, 10))
    state = local_state(0, 1, filled=True)[0]
    with pytest.raises(DiskError, match="step-00000001: .* needs 195 bytes, but only 10 are free"):
        save_states(tmp_path, [state], files={"a": b"abc"})
    assert names(tmp_path) == [OLD]


def test_file_in_place_of_the_folder_is_a_disk_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_bytes(b"")
    with pytest.raises(DiskError, match=r"run/step-00000100: cannot write \d+ bytes"):
        save(tmp_path / "run")


FAILURES: dict[str, tuple[Exception, type[RunError]]] = {
    "save_file": (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), DiskError),
    "_seal": (OSError(errno.EIO, os.strerror(errno.EIO)), DiskError),
    "_boxes": (ValueError("a bug"), PeerError),
}


@pytest.mark.parametrize("function", FAILURES)
def test_failure_on_one_rank_ends_the_save_on_all(tmp_path: Path, function: str) -> None:
    first, second = run_ranks(2, save_with_failing_rank_1, tmp_path, function)
    failure, seen = FAILURES[function]
    assert first[0] is seen
    assert second[0] is (seen if seen is DiskError else type(failure))
    assert (getattr(failure, "strerror", None) or str(failure)) in first[1]
    if seen is DiskError:
        assert first[1] == second[1]
        assert "rank-00001.safetensors: cannot write" in first[1]
        assert first[1].endswith(" are free")
    assert names(tmp_path) == [OLD]
    open_checkpoint(tmp_path / OLD)


def save_with_failing_rank_1(folder: Path, function: str) -> tuple[type[Exception], str]:
    group = world()
    assert group is not None
    save(folder, 100)
    failing = getattr(save_module, function)
    if group.rank() == 1:
        failing = patch.object(save_module, function, side_effect=FAILURES[function][0])
        failing.start()
    with pytest.raises(Exception) as caught:  # noqa: PT011
        save(folder, 200, keep_last=1)
    return caught.type, str(caught.value)


def test_full_disk_at_the_manifest_ends_the_save_on_all_ranks(tmp_path: Path) -> None:
    first, second = run_ranks(2, save_beyond_file_limit, tmp_path)
    assert first == second
    assert "cannot write" in first
    assert names(tmp_path) == []


def save_beyond_file_limit(folder: Path) -> str:
    """Save while no file may grow beyond what the tensors need, but the manifest does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        with pytest.raises(DiskError) as caught:
            save(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return str(caught.value)


def kill_this_process(*arguments: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def save_and_be_killed(folder: Path, function: str) -> None:
    with patch.object(save_module, function, kill_this_process):
        save(folder, 200)


def run_and_be_killed(body: Callable[..., None], *arguments: object) -> None:
    process = multiprocessing.get_context("forkserver").Process(target=body, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(
    "function", ["save_file", "_seal", "_flush", "_write_files", "encode_manifest"]
)
def test_killed_save_is_ignored_and_removed_by_the_next(tmp_path: Path, function: str) -> None:
    save(tmp_path, 100)
    run_and_be_killed(save_and_be_killed, tmp_path, function)
    leftover, old = names(tmp_path)
    assert leftover.startswith(f".{NEW}.tmp-")
    assert old == OLD
    open_checkpoint(save(tmp_path, 200))
    assert names(tmp_path) == [OLD, NEW]


def test_save_killed_after_its_rename_is_complete(tmp_path: Path) -> None:
    save(tmp_path, 100)
    run_and_be_killed(save_and_be_killed, tmp_path, "remove_old")
    assert names(tmp_path) == [OLD, NEW]
    open_checkpoint(tmp_path / NEW)


def test_saved_tensors_may_be_views_of_one_buffer(tmp_path: Path) -> None:
    buffer = torch.arange(96.0)
    column, row = local_state(0, 1, filled=True)[:2]
    states = [
        replace(column, boxes=(Box((0, 0), buffer[:48].view(8, 6)),)),
        replace(row, boxes=(Box((0, 0), buffer[48:].view(8, 6).t()),)),
    ]
    reader = open_checkpoint(save_states(tmp_path, states))
    assert torch.equal(reader.read("weight", "column"), buffer[:48].view(8, 6))
    assert torch.equal(reader.read("weight", "row"), buffer[48:].view(8, 6).t())


def test_caller_files_are_optional(tmp_path: Path) -> None:
    path = save_states(tmp_path, local_state(0, 1, filled=True))
    assert open_checkpoint(path).files == ()
    assert open_checkpoint(save(tmp_path)).files == tuple(FILES)
