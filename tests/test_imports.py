"""The rules of docs/design.md on who may import and do what, kept by a test.

Read from the syntax trees of all files, so that imports inside functions count too.
"""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What each layer may import of this repository, besides itself. A module belongs to the layer with
# the longest name that it starts with.
MAY_IMPORT: dict[str, set[str]] = {
    "mpu": set(),
    "megatron.errors": set(),
    "megatron.plain": set(),
    "megatron.nearest": set(),
    "megatron.config": {"mpu", "megatron.errors", "megatron.nearest", "megatron.plain"},
    "megatron.apex": {"megatron.errors"},
    "megatron.environment": {"megatron.errors"},
    "megatron.spokesman": {"megatron.environment"},
    "megatron.cli": {"megatron.errors", "megatron.spokesman"},
    "megatron.stopping": {"megatron.cli", "megatron.errors"},
    "megatron.log": {"megatron.errors"},
    "megatron.together": {"megatron.errors"},
    "megatron.atomic": {"megatron.errors"},
    "megatron.hashing": set(),
    "megatron.tokenizer": {
        "megatron.atomic",
        "megatron.errors",
        "megatron.plain",
        "megatron.tokenizer_folder",
    },
    "megatron.tokenizer_folder": {"megatron.errors", "megatron.plain"},
    "megatron.meeting": {"megatron.environment", "megatron.errors"},
    "megatron.peers": {"megatron.cli", "megatron.errors", "megatron.spokesman"},
    "megatron.launch": {
        "mpu",
        "megatron.cli",
        "megatron.config",
        "megatron.environment",
        "megatron.errors",
        "megatron.meeting",
        "megatron.peers",
        "megatron.spokesman",
    },
    "megatron.data": {
        "megatron.atomic",
        "megatron.config",
        "megatron.errors",
        "megatron.plain",
        "megatron.hashing",
        "megatron.tokenizer",
    },
    "megatron.model": {"mpu", "megatron.apex", "megatron.config", "megatron.errors"},
    "megatron.optim": {"mpu", "megatron.apex", "megatron.config", "megatron.errors"},
    "megatron.engine": {
        "mpu",
        "megatron.config",
        "megatron.errors",
        "megatron.model",
        "megatron.optim",
    },
    "megatron.engine.build": {
        "megatron.config",
        "megatron.engine",
        "megatron.environment",
        "megatron.errors",
        "megatron.launch",
        "megatron.peers",
    },
    "megatron.planning": {
        "mpu",
        "megatron.config",
        "megatron.engine.schedules",
        "megatron.errors",
        "megatron.model",
        "megatron.optim",
    },
    "megatron.checkpoint": {
        "mpu.sharding",
        "megatron.errors",
        "megatron.plain",
        "megatron.hashing",
        "megatron.together",
    },
    "megatron.checkpoint.huggingface": {
        "mpu.sharding",
        "megatron.checkpoint",
        "megatron.config",
        "megatron.errors",
        "megatron.plain",
        "megatron.together",
    },
    "megatron.tuning": {
        "mpu",
        "megatron.config",
        "megatron.engine.base",
        "megatron.engine.schedules",
        "megatron.errors",
        "megatron.launch",
        "megatron.model",
        "megatron.together",
    },
    "megatron.inference": {
        "mpu",
        "megatron.atomic",
        "megatron.checkpoint",
        "megatron.config",
        "megatron.errors",
        "megatron.launch",
        "megatron.model",
        "megatron.plain",
        "megatron.together",
        "megatron.tokenizer",
        "megatron.training.finite",
        "megatron.training.run_folder",
        "megatron.training.saving",
    },
    "megatron.training": {"mpu", "megatron"},
    "megatron.report": {
        "mpu",
        "megatron.atomic",
        "megatron.config",
        "megatron.errors",
        "megatron.planning",
        "megatron.training",
    },
    "megatron.migration": {
        "megatron.config",
        "megatron.errors",
        "megatron.plain",
        "megatron.tokenizer",
    },
    "megatron.benchmarks": {"mpu", "megatron"},
    "megatron.commands": {"mpu", "megatron"},
    "pretrain_bloom": {"megatron.commands"},
    "tools": {"mpu", "megatron"},
}

# The others may name the type of a group, but start no collective.
COLLECTIVE = (
    "mpu",
    "megatron.checkpoint",
    "megatron.engine",
    "megatron.launch",
    "megatron.meeting",
    "megatron.optim",
    "megatron.peers",
    "megatron.planning.absent_peers",
    "megatron.together",
    "megatron.training",
)

OPTIONAL = (
    "apex",
    "deepspeed",
    "flash_attn",
    "matplotlib",
    "sentencepiece",
    "tensorboard",
    "tokenizers",
    "torchao",
    "transformers",
    "triton",
    "wandb",
)


ON_DEEPSPEED = "megatron.engine.deepspeed"
"""The package whose modules need DeepSpeed to be imported."""


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _product_files() -> Iterator[Path]:
    for folder in ("mpu", "megatron", "tools"):
        yield from (ROOT / folder).rglob("*.py")
    yield from ROOT.glob("pretrain_bloom.py")


MODULES = {_name(path): path for path in sorted(_product_files())}

PROGRAMS = (
    "megatron.benchmarks",
    "megatron.commands",
    "megatron.inference.export",
    "megatron.report",
)
"""What people start, and what only these programs use: they print, and need their packages."""


def _is_library(name: str) -> bool:
    return name.startswith(("mpu", "megatron")) and not starts(name, PROGRAMS)


def starts(name: str, layers: set[str] | tuple[str, ...]) -> bool:
    """Whether ``name`` is one of ``layers`` or inside one."""
    return any(f"{name}.".startswith(f"{layer}.") for layer in layers)


LIBRARY = [name for name in MODULES if _is_library(name)]


@cache
def nodes(module: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(MODULES[module].read_text())))


def imports(module: str) -> set[str]:
    """Absolute names of the modules, and of the things in them, that ``module`` imports."""
    names: set[str] = set()
    for node in nodes(module):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def own_imports(module: str) -> set[str]:
    """The modules of this repository that ``module`` imports."""
    ours = ("mpu", "megatron", "tools", "pretrain_bloom", "tests")
    return {
        name if name in MODULES else name.rpartition(".")[0] or name
        for name in imports(module)
        if name.split(".")[0] in ours
    }


def layer_of(module: str) -> str | None:
    return max((layer for layer in MAY_IMPORT if starts(module, (layer,))), key=len, default=None)


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_what_its_layer_may(module: str) -> None:
    layer = layer_of(module)
    if layer is None:
        # The bare package of modules that all have a layer of their own.
        assert own_imports(module) == set(), f"{module} has no layer in MAY_IMPORT"
        return
    allowed = MAY_IMPORT[layer] | {layer}
    wrong = {name for name in own_imports(module) if not starts(name, allowed)}
    assert not wrong, f"{module} may import {sorted(allowed)}, and imports {sorted(wrong)}"


def test_no_import_cycles() -> None:
    try:
        TopologicalSorter({name: own_imports(name) for name in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(f"imports go in a circle: {error.args[1]}")


def test_megatron_is_a_namespace_package() -> None:
    assert not (ROOT / "megatron" / "__init__.py").exists()


def test_only_some_layers_use_torch_distributed() -> None:
    for module in LIBRARY:
        if starts(module, COLLECTIVE):
            continue
        used = {name for name in imports(module) if starts(name, ("torch.distributed",))}
        # A group may be named and passed on, but not by data, which knows rank and size only.
        group = set() if starts(module, ("megatron.data",)) else {"torch.distributed.ProcessGroup"}
        assert used <= group, module
    others = [name for name in LIBRARY if not starts(name, COLLECTIVE)]
    assert lines(others, lambda node: is_attribute(node, "torch", {"distributed"})) == {}


def test_only_one_module_reads_the_environment() -> None:
    readers = {"environ", "environb", "getenv", "putenv"}
    others = [name for name in LIBRARY if name != "megatron.environment"]
    assert lines(others, lambda node: is_attribute(node, "os", readers)) == {}
    assert not [name for name in others if imports(name) & {f"os.{reader}" for reader in readers}]


def test_no_global_statements() -> None:
    assert lines(MODULES, lambda node: isinstance(node, ast.Global)) == {}


def test_only_programs_print() -> None:
    assert lines(LIBRARY, is_print) == {}


def test_the_library_uses_no_program() -> None:
    users = {name for name in LIBRARY if any(starts(it, PROGRAMS) for it in own_imports(name))}
    assert users == set()


def test_what_people_start_by_old_names_holds_no_code() -> None:
    """Each of these hands its command line on to a verb of ``bloom``."""
    entries = [name for name in MODULES if starts(name, ("tools", "pretrain_bloom"))]
    assert [name for name in entries if len(MODULES[name].read_text().splitlines()) > 30] == []


def lines(modules: Iterable[str], matches: Callable[[ast.AST], bool]) -> dict[str, list[int]]:
    """The modules that have nodes that match, and the lines of these."""
    found = {
        module: [getattr(node, "lineno", 0) for node in nodes(module) if matches(node)]
        for module in modules
    }
    return {module: numbers for module, numbers in found.items() if numbers}


def is_attribute(node: ast.AST, module: str, names: set[str]) -> bool:
    """Whether ``node`` is ``module.name`` for one of ``names``."""
    if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
        return False
    return node.value.id == module and node.attr in names


def is_print(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    )


def test_only_the_choice_of_an_engine_imports_deepspeed() -> None:
    """Inside a function, which the next test sees to."""
    users = {
        name
        for name in MODULES
        if not starts(name, (ON_DEEPSPEED,))
        and any(starts(used, ("deepspeed", ON_DEEPSPEED)) for used in imports(name))
    }
    assert users == {"megatron.engine.build"}


def test_library_imports_without_optional_packages() -> None:
    # None in sys.modules makes an import of that name fail.
    library = [name for name in LIBRARY if not starts(name, (ON_DEEPSPEED,))]
    program = f"""
import importlib, sys
sys.modules.update(dict.fromkeys({OPTIONAL!r}))
for name in {library!r}:
    importlib.import_module(name)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
