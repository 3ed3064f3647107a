"""What the tests of the tools share."""

from pathlib import Path

import pytest

from tests.megatron.test_tokenizer import make_tokenizer_file


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer with BLOOM's special tokens. Tests do not change it."""
    return make_tokenizer_file(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")
