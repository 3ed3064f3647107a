"""The performance page is what the benchmarks found, and says where nothing was measured."""

import re
import subprocess
from pathlib import Path
from string import Template

import pytest

from megatron.benchmarks import page, train_step
from megatron.benchmarks.result import Result, publish
from megatron.errors import DataError
from megatron.report.tables import Row, Table, table_lines

ROOT = Path(__file__).parents[2]


def test_table_has_even_columns() -> None:
    rows: list[Row] = [
        {"name": "a", "ms": 12345.6, "n": 10_000},
        {"name": "long", "ms": 0.01234, "n": None},
    ]
    assert list(table_lines(Table("", rows))) == [
        "| name | ms     | n      |",
        "| ---- | ------ | ------ |",
        "| a    | 12,346 | 10,000 |",
        "| long | 0.0123 | -      |",
    ]


def test_documentation_is_what_the_tool_makes() -> None:
    made = page.make_page(ROOT / "docs" / "performance")
    assert (ROOT / "docs" / "performance.md").read_text() == made, (
        "run python -m megatron.benchmarks.page"
    )


def test_page_has_tables_with_device_and_date_or_says_not_measured(tmp_path: Path) -> None:
    environment = {"device": "Abacus 9", "torch": "2.13", "date": "2026-01-02"}
    table = Table("Some head", [{"contender": "fused", "ms": 7}])
    publish(Result("head", environment, [table]), tmp_path / "head_gpu.json")
    made = page.make_page(tmp_path)
    assert "**Some head**, Abacus 9, 2026-01-02\n\n| contender | ms |\n" in made
    assert "torch 2.13" in made
    places = Template(page.TEMPLATE.read_text()).get_identifiers()
    others = [name for name in places if name.endswith("_gpu") and name != "head_gpu"]
    assert made.count("| GPU    | not measured |") == len(others)
    assert "$" not in made


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("heads_cpu", "{}", "the page has no place for it"),
        ("head_cpu", "{", "is not the result of a benchmark"),
        ("head_cpu", "{}", "is not the result of a benchmark"),
    ],
)
def test_wrong_file_is_refused(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.json").write_text(text)
    with pytest.raises(DataError, match=rf"{name}\.json: {message}"):
        page.make_page(tmp_path)


def test_page_has_the_shapes_of_the_benchmark() -> None:
    rows = []
    for name, shape in train_step.SHAPES.items():
        model = shape.model
        numbers = (model.num_layers, model.hidden_size, model.num_heads, model.vocab_size)
        texts = [name, *(f"{n:,}" for n in (*numbers, model.seq_length, shape.batch))]
        rows.append(texts)
    template = page.TEMPLATE.read_text()
    found = [[cell.strip() for cell in line.split("|")[1:-1]] for line in template.splitlines()]
    assert [row for row in found if row and row[0] in train_step.SHAPES] == rows


def test_page_has_a_place_for_what_the_commands_write() -> None:
    script = (ROOT / "tools" / "benchmarks" / "gpu.sh").read_text()
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    template = page.TEMPLATE.read_text()
    written = set(re.findall(r"docs/performance/(\w+)\.json", template))
    written |= {
        f"{name.removesuffix('_gpu')}_gpu"
        for name in re.findall(r"^benchmark (\w+)", script, re.MULTILINE)
    }
    assert written == set(Template(template).get_identifiers())


def test_gpu_script_takes_less_than_ten_minutes() -> None:
    script = (ROOT / "tools" / "benchmarks" / "gpu.sh").read_text()
    limits = re.findall(r"^(?:part|benchmark) \w+ (\d+)", script, re.MULTILINE)
    assert len(limits) == len(re.findall(r"^(?:part|benchmark) ", script, re.MULTILINE))
    halves = script.split("\nfi\n")
    assert len(halves) == 2
    for half in halves:
        of_half = re.findall(r"^ *(?:part|benchmark) \w+ (\d+)", half, re.MULTILINE)
        assert 0 < sum(map(int, of_half)) < 600
