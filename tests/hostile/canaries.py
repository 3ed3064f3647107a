"""What is planted, and how it is seen that one of them sang.

A canary is a value or a file that does something where it is taken for more than data: a command
or a call that leaves a mark, the name of a module that leaves one when it is imported, a link or a
path to a file that lies outside. The place outside is a folder of its own; whatever happens to it
is seen by comparing it before and after, and reading its secret by finding it in what is written.
"""

import os
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODULE = "planted_canary"
SECRET = "the-secret-that-lies-outside"
MARK = "MARK"

ESCAPES = "\x1b[2J\x1b]0;owned\x07\r\x9b31m"


@dataclass(frozen=True)
class Outside:
    """A folder that nothing may touch."""

    folder: Path

    @property
    def mark(self) -> Path:
        """What an executed canary makes."""
        return self.folder / MARK

    @property
    def secret(self) -> Path:
        return self.folder / "secret.json"

    def make(self) -> None:
        """The folder with a secret, a module, and files under the names that a run writes."""
        self.folder.mkdir()
        self.secret.write_text(f'{{"secret": "{SECRET}"}}\n')
        code = f"open({str(self.mark)!r}, 'w').close()\nclass Thing: pass\ndef run(*a): pass\n"
        (self.folder / f"{MODULE}.py").write_text(code)
        for name in ("checkpoints", "tensorboard", "step-00000002"):
            (self.folder / name).mkdir()
            (self.folder / name / "file").write_text(SECRET)

    def snapshot(self) -> dict[str, tuple[int, bytes]]:
        """Everything in the folder, but for what the interpreter keeps of the module."""
        found = {}
        for path in sorted(self.folder.rglob("*")):
            if "__pycache__" not in path.parts:
                content = path.read_bytes() if path.is_file() else b""
                found[str(path)] = (path.lstat().st_mtime_ns, content)
        return found


class _Bomb:
    """Unpickled, it runs a command."""

    def __init__(self, command: str) -> None:
        self._command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self._command,)


def pickled(outside: Outside) -> bytes:
    """A pickle that leaves a mark."""
    return pickle.dumps(_Bomb(f"touch {outside.mark}"))


def values(outside: Outside) -> Iterator[tuple[str, Any]]:
    """Values of JSON or YAML, by the name of what they try."""
    touch = f"touch {outside.mark}"
    yield "call", {"class_path": "os.system", "init_args": {"command": touch}}
    yield "import", {"class_path": f"{MODULE}.Thing"}
    yield "nested", {"x": [{"class_path": f"{MODULE}.Thing", "dict_kwargs": {"a": 1}}]}
    yield "name", f"{MODULE}.Thing"
    yield "shell", f"$({touch}) `{touch}` ; {touch}"
    yield "template", "{{ cycler.__init__.__globals__.os.system('" + touch + "') }} ${oc.env:HOME}"
    yield "outside", str(outside.secret)
    yield "above", f"../../../../../../../..{outside.secret}"
    yield "escapes", ESCAPES
    yield "huge", 10**30
    yield "negative", -8
    yield "infinite", float("1e400")
    yield "list", [[]]
    yield "null", None
    yield "deep", _deep(200)


def _deep(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def files(outside: Outside) -> Iterator[tuple[str, Any]]:
    """What a file is replaced by, as a function of its path."""

    def link(path: Path) -> None:
        path.symlink_to(outside.secret)

    def loop(path: Path) -> None:
        path.symlink_to(path.name)

    def device(path: Path) -> None:
        path.symlink_to("/dev/zero")

    yield "link", link
    yield "link to a folder", lambda path: path.symlink_to(outside.folder)
    yield "link to itself", loop
    yield "link to a device", device
    yield "pipe", lambda path: os.mkfifo(path)
    yield "folder", lambda path: path.mkdir()
    yield "pickle", lambda path: path.write_bytes(pickled(outside))
    yield "nothing", lambda path: path.write_bytes(b"")
    yield "code", lambda path: path.write_text(f"import {MODULE}\n")
