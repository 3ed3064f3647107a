"""What every test shares: a seed, and the figures it reports."""

import pytest
import torch

from tests.figures import Figure, Record, recorder, summary


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def figure(record_property: Record) -> Figure:
    """Report what a test measured; see ``tests.figures``."""
    return recorder(record_property)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    lines = list(summary(item for report in reports for item in report.user_properties))
    if lines:
        terminalreporter.section("figures")
        for line in lines:
            terminalreporter.write_line(line)
