"""What pyproject.toml and constraints.txt name can be had together, from the public index alone.

uv resolves every extra for every Python that the pinned torch has wheels for: at the versions of
constraints.txt, and at the lowest ones that pyproject.toml declares. It sees no settings of pip or
uv, no folder of wheels and no other index, and takes wheels only, but for DeepSpeed, which has
none. The index is asked once for all extras of a Python; uv keeps its answers, and finds each extra
among them. With ``-m ""`` each extra is resolved for macOS and for ARM too.
"""

import os
import re
import ssl
import subprocess
import tomllib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.figures import Figure

ROOT = Path(__file__).parents[1]
INDEX = "https://pypi.org/simple"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = ("", *PROJECT["optional-dependencies"])
ALL = "all"
LINUX = "x86_64-manylinux_2_28"
OTHERS = ("aarch64-manylinux_2_28", "aarch64-apple-darwin")
PYTHONS = tuple(
    text.rpartition(" ")[2] for text in PROJECT["classifiers"] if " :: Python :: " in text
)
MODES: dict[str, tuple[str, ...]] = {
    "pinned": ("--constraint", "constraints.txt"),
    "lowest": ("--resolution", "lowest-direct"),
}


@dataclass(frozen=True)
class Case:
    """One environment that somebody may want to have."""

    extra: str
    python: str
    mode: str
    platform: str = LINUX

    def arguments(self) -> list[str]:
        extra = (
            ["--all-extras"] if self.extra == ALL else [f"--extra={self.extra}"][: len(self.extra)]
        )
        return ["pyproject.toml", *extra, *MODES[self.mode], *target(self.python, self.platform)]


def target(python: str, platform: str = LINUX) -> list[str]:
    return [
        *("--python-version", python, "--python-platform", platform),
        *("--only-binary", ":all:", "--no-binary", "deepspeed"),
    ]


def environment() -> dict[str, str]:
    """What uv needs to reach the index, and nothing that could name another one."""
    kept = re.compile(r"PATH|HOME|TMPDIR|SSL_CERT_(FILE|DIR)|(?i:(http|https|all|no)_proxy)")
    return {
        **{name: value for name, value in os.environ.items() if kept.fullmatch(name)},
        "MACOSX_DEPLOYMENT_TARGET": "14.0",  # the oldest that torch has wheels for
        "UV_HTTP_TIMEOUT": "120",
    }


def uv(arguments: Iterable[str], text: str = "") -> subprocess.CompletedProcess[str]:
    command = [uv_program(), "pip", "compile", "--quiet", "--no-config", "--no-header"]
    command += ["--no-annotate", "--default-index", INDEX, *arguments]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment(),
        input=text,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


@cache
def uv_program() -> str:
    from uv import find_uv_bin

    return find_uv_bin()


def resolve(case: Case, *arguments: str) -> dict[str, Version] | str:
    """The version of every package of ``case``, or why there are none."""
    done = uv([*case.arguments(), *arguments])
    if done.returncode:
        return f"{case}: {done.stderr}"
    found = (Requirement(line) for line in done.stdout.splitlines() if line)
    return {item.name: Version(str(item.specifier).removeprefix("==")) for item in found}


def declared(extra: str) -> list[Requirement]:
    optional: Mapping[str, list[str]] = PROJECT["optional-dependencies"]
    return [Requirement(text) for text in PROJECT["dependencies"] + optional.get(extra, [])]


def not_lowest(case: Case, found: Mapping[str, Version]) -> list[str]:
    """The dependencies whose declared lowest version is not the one that can be had."""
    lowest = {
        canonicalize_name(item.name): Version(part.version)
        for item in declared(case.extra)
        for part in item.specifier
        if part.operator in (">=", "==")
    }
    return [
        f"{case}: {name} {lowest[name]} is declared, {found[name]} is the lowest"
        for name in lowest.keys() & found.keys()
        if found[name] != lowest[name]
    ]


def not_pinned(case: Case, found: Mapping[str, Version]) -> list[str]:
    """The packages that constraints.txt forgets; torch pins those of CUDA itself."""
    return [
        f"{case}: {name} {version} is not pinned"
        for name, version in found.items()
        if pins().get(name) != version and not name.startswith(("nvidia-", "cuda-"))
    ]


@cache
def pins() -> dict[str, Version]:
    lines = (line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    return {canonicalize_name(line[0]): Version(line[1]) for line in lines if len(line) == 2}


@pytest.fixture(scope="module")
def network() -> None:
    """Passes over the tests where nothing can be asked; any answer, even a refusal, is one."""
    try:
        urlopen(f"{INDEX}/pip/", timeout=60).close()
    except HTTPError:
        raise
    except (URLError, TimeoutError) as error:
        if isinstance(getattr(error, "reason", None), ssl.SSLError):
            raise
        pytest.skip(f"there is no network to the public index: {error}")


def check(platforms: Iterable[str], figure: Figure) -> None:
    asked = [Case(ALL, *rest) for rest in product(PYTHONS, MODES, platforms)]
    single = [Case(*rest) for rest in product(EXTRAS, PYTHONS, MODES, platforms)]
    problems: list[str] = []
    failed = 0
    uv_program()  # sysconfig, which finds it, must not be used by two threads at first
    with ThreadPoolExecutor(4) as threads:
        answers = [*threads.map(resolve, asked)]
        answers += threads.map(lambda case: resolve(case, "--offline"), single)
    for case, answer in zip(asked + single, answers, strict=True):
        if isinstance(answer, str):
            failed += 1
            problems.append(answer)
        elif case.mode == "pinned":
            problems += not_pinned(case, answer)
        elif case.extra != ALL:
            problems += not_lowest(case, answer)
    figure("installation", resolutions=len(answers), failed=failed, wrong=len(problems) - failed)
    assert not problems, "\n".join(problems)


@pytest.mark.usefixtures("network")
def test_every_extra_can_be_had_for_every_python(figure: Figure) -> None:
    check([LINUX], figure)


@pytest.mark.nightly
@pytest.mark.usefixtures("network")
def test_every_extra_can_be_had_on_every_platform(figure: Figure) -> None:
    check([LINUX, *OTHERS], figure)


@pytest.mark.nightly
@pytest.mark.usefixtures("network")
def test_the_pythons_named_are_those_that_the_pinned_torch_has_wheels_for() -> None:
    torch = f"torch=={pins()['torch']}"
    wheels = {
        python
        for python in (f"3.{minor}" for minor in range(11, 17))
        if not uv(["-", "--no-deps", *target(python)], torch).returncode
    }
    assert wheels == set(PYTHONS)
    script = (ROOT / "tools/environment.sh").read_text()
    bounds = [re.search(rf"^{name}_minor=(\d+)$", script, re.M) for name in ("oldest", "newest")]
    assert [f"3.{bound and bound[1]}" for bound in bounds] == [PYTHONS[0], PYTHONS[-1]]


@pytest.mark.usefixtures("network")
def test_a_version_that_only_this_machine_has_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    plant_wheel(wheels, "types_pyyaml", "99.0")
    settings = tmp_path / "uv.toml"
    settings.write_text(f'find-links = ["{wheels}"]\n')
    for name in ("PIP_FIND_LINKS", "UV_FIND_LINKS", "UV_INDEX", "UV_EXTRA_INDEX_URL"):
        monkeypatch.setenv(name, str(wheels))
    monkeypatch.setenv("UV_CONFIG_FILE", str(settings))
    wanted = "types-pyyaml==99.0"
    arguments = ["-", *target(PYTHONS[0])]
    assert "no version of types-pyyaml==99.0" in uv(arguments, wanted).stderr
    planted = uv([*arguments, "--find-links", str(wheels)], wanted)
    assert planted.stdout.strip() == wanted, "the folder itself is a good one"


def plant_wheel(folder: Path, name: str, version: str) -> None:
    from zipfile import ZipFile

    info = f"{name}-{version}.dist-info"
    with ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
