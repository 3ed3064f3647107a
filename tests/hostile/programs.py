"""The programs that read files, run in a process forked from one that has imported them all."""

import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

# Imported here, so that a fork has them: what is slow, and what is loaded where it is used.
import sentencepiece  # noqa: F401
import tokenizers  # noqa: F401
import torch
import transformers
from transformers import AutoTokenizer, BloomForCausalLM  # noqa: F401

import megatron.inference.continuations
import megatron.inference.export
import megatron.inference.load  # noqa: F401
import pretrain_bloom
from megatron.cli import run_tool

TOOLS = (
    "checkpoint",
    "convert_checkpoint",
    "generate",
    "migrate_config",
    "plan",
    "preprocess_data",
    "report",
    "train_tokenizer",
)
for _name in TOOLS:
    importlib.import_module(f"tools.{_name}")


def run_program(
    program: str, argv: Sequence[str], output: Path, env: Mapping[str, str], importable: Path
) -> NoReturn:
    """Be the program ``program``; what it prints goes to ``output``.

    Args:
        importable: a folder with modules that it would find if it looked for them.
    """
    code = 1
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        # A test may have put others in their place.
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        os.environ.update(env)
        sys.path.insert(0, str(importable))
        torch.set_num_threads(1)
        transformers.logging.set_verbosity_error()
        os.chdir(output.parent)
        code = _call(program, list(argv))
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _call(program: str, argv: list[str]) -> int:
    if program == "pretrain_bloom":
        pretrain_bloom.main(argv)
    tool = sys.modules[f"tools.{program}"]
    run_tool(lambda: tool.main(argv))
