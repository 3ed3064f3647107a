"""Fixtures of the package, for the tests of pages on it."""

from tests.megatron.conftest import single_group as single_group
