"""What a wheel brings: ``bloom``, in a new environment and an empty folder, without the checkout.

The environment sees the packages that this one has installed, but not this project's checkout.
"""

import os
import shutil
import site
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

import pytest

from megatron.commands.main import VERBS
from megatron.config import config_names

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
MEGATRON_CORE = "megatron/core/__init__.py"

SMALL = {
    "model.num_layers": 2,
    "model.hidden_size": 32,
    "model.num_heads": 4,
    "model.vocab_size": 300,
    "model.seq_length": 64,
    "train.global_batch_size": 4,
    "train.micro-batch-size": 4,
    "train.eval-samples": 4,
    "launch.device": "cpu",
}


@dataclass(frozen=True)
class Installed:
    """A wheel, and an environment with nothing but it besides what others have installed."""

    wheel: Path
    environment: Path

    @property
    def bin(self) -> Path:
        return self.environment / "bin"

    def start(self, folder: Path, *words: str, code: int = 0) -> str:
        """What a program of the environment prints when it is started in ``folder``."""
        variables = {
            name: value for name, value in os.environ.items() if not name.startswith("PYTHON")
        }
        done = subprocess.run(
            [self.bin / words[0], *words[1:]],
            cwd=folder,
            env={**variables, "PATH": f"{self.bin}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    from uv import find_uv_bin

    folder = tmp_path_factory.mktemp("wheel")
    source, environment = folder / "source", folder / "environment"
    # A copy, so that building leaves nothing in the checkout.
    for name in ("mpu", "megatron"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("LICENSE", "README.md", "pretrain_bloom.py", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    (folder / "dist").mkdir()
    build = [sys.executable, "-c", BUILD, str(folder / "dist")]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    (wheel,) = (folder / "dist").iterdir()
    venv.create(environment, with_pip=False, symlinks=True)
    (packages,) = (environment / "lib").glob("python*/site-packages")
    # A path in a .pth file has its packages seen, but not its own .pth files followed, one of which
    # may be that of an editable install of this project.
    others = [path for path in [*site.getsitepackages(), *sys.path] if "-packages" in path]
    (packages / "others.pth").write_text("\n".join(dict.fromkeys(others)))
    install = [find_uv_bin(), "--no-config", "pip", "install", "--quiet", "--no-deps", "--offline"]
    python = ["--python", str(environment / "bin" / "python")]
    subprocess.run([*install, *python, str(wheel)], check=True)
    if not any((Path(path) / MEGATRON_CORE).exists() for path in others):
        # As its wheel installs it: the folder megatron has no __init__.py of its own.
        (packages / MEGATRON_CORE).parent.mkdir(parents=True)
        (packages / MEGATRON_CORE).touch()
    return Installed(wheel, environment)


def test_wheel_holds_the_programs_and_their_data(installed: Installed) -> None:
    names = set(ZipFile(installed.wheel).namelist())
    assert "megatron/__init__.py" not in names, "megatron-core would be hidden by it"
    data = {
        "megatron/benchmarks/page_template.md",
        "megatron/report/page.html",
        "megatron/report/page.js",
        "mpu/py.typed",
        *(f"megatron/config/configs/{name}.yaml" for name in config_names()),
    }
    modules = {
        path.relative_to(ROOT).as_posix()
        for package in ("mpu", "megatron")
        for path in (ROOT / package).rglob("*.py")
    }
    assert (data | modules | {"pretrain_bloom.py"}) - names == set()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {
        "megatron",
        "mpu",
        "pretrain_bloom.py",
    }


def test_it_is_imported_from_the_wheel_beside_megatron_core(
    installed: Installed, tmp_path: Path
) -> None:
    program = (
        "import megatron.core, megatron.commands.main as main, mpu; "
        "import megatron.training.trainer; print(main.__file__, mpu.__file__)"
    )
    for path in installed.start(tmp_path, "python", "-c", program).split():
        assert path.startswith(str(installed.environment))


def test_the_command_has_every_verb(installed: Installed, tmp_path: Path) -> None:
    said = installed.start(tmp_path, "bloom", "--help")
    assert all(f"\n  {verb} " in said for verb in VERBS)
    assert "\ntorch 2." in installed.start(tmp_path, "bloom", "version")
    said = installed.start(tmp_path, "bloom", "reprot", code=2)
    assert said == "error: bloom reprot: is not a verb; did you mean report?\n"


@pytest.mark.slow
def test_from_raw_text_to_a_model_for_others(installed: Installed, tmp_path: Path) -> None:
    def bloom(*words: str, code: int = 0) -> str:
        return installed.start(tmp_path, "bloom", *words, code=code)

    bloom("corpus", "--output", "text/corpus.jsonl", "--max-bytes", "1000000")
    bloom("tokenizer", "--input", "text", "--vocab_size", "300", "--output", "tokenizer.json")
    bloom("prepare", "--input", "text", "--tokenizer", "tokenizer.json", "--output", "data/text")
    bloom("prepare", "--input", "text", "--tokenizer", "x", "--output", "data/text", code=2)
    options = ["--config", "quickstart", "--folder", "runs/small", "--train.samples", "16"]
    options += [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    options += ["--data.paths.data/text", "1", "--data.tokenizer", "tokenizer.json"]
    options += ["--optimizer.warmup-samples", "4"]
    launch = ["python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [*launch, "--no_python", "bloom", "train", *options, "--parallel.tensor", "2"]
    installed.start(tmp_path, *words)
    assert bloom("verify", "runs/small") == (
        "runs/small/checkpoints/step-00000004: every file is as it was written\n"
    )
    bloom("report", "runs/small")
    assert (tmp_path / "runs" / "small" / "report.html").exists()
    said = bloom("generate", "runs/small", "--prompt", "import", "--max-new-tokens", "4")
    assert said.startswith("import")
    said = bloom("export", "runs/small", "--output", "hf")
    assert said.startswith("wrote hf; its logits differ from the checkpoint's by ")
    assert len(said.splitlines()) == 1, "no other package's warnings"
    assert (tmp_path / "hf" / "model.safetensors").exists()
    bloom("export", "runs/small", "--output", "hf", code=2)
