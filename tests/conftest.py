"""What every test shares: a seed, and the figures it reports."""

import pytest
import torch

from tests.figures import Figure, Record, recorded, recorder


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def figure(record_property: Record) -> Figure:
    """Report what a test measured; see ``tests.figures``."""
    return recorder(record_property)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    lines = [line for report in reports for line in recorded(report.user_properties)]
    if lines:
        terminalreporter.section("figures")
        for line in sorted(lines):
            terminalreporter.write_line(line)
