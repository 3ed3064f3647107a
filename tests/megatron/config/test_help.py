"""What the help and the page say of the options of a run."""

from pathlib import Path

import pytest

from megatron.config import Config, config_names, load_config
from megatron.config.help import sections
from megatron.config.page import configuration_page
from megatron.errors import ConfigError
from tests.figures import Figure

ROOT = Path(__file__).parents[3]
OPTIONS = [option for section in sections(Config) for option in section.options]


def shown(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        load_config(argv)
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_every_option_has_words(figure: Figure) -> None:
    with_words = [option for option in OPTIONS if len(option.words.split()) >= 2]
    figure("options of a run", options=len(OPTIONS), with_words=len(with_words))
    assert with_words == OPTIONS


def test_every_section_has_a_title() -> None:
    assert all(section.title for section in sections(Config))


def test_the_page_is_that_of_the_dataclasses() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == configuration_page(), "run python tools/configuration_page.py"


def test_help_begins_with_what_is_required_and_used(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "--help")
    required = [f"--{option.name} " for option in OPTIONS if option.default is None]
    others = ["\nMost used:", "--data.paths", "--print_config"]
    places = [text.index(name) for name in [*required, *others]]
    assert places == sorted(places)
    most_used = text.partition("\nMost used:")[2].partition("\n\n")[0]
    assert most_used.count("\n  --") == 10
    assert "examples:\n  bloom train --config bloom-560m " in text
    assert "--dry_run [GIB]" in text
    assert len(text.splitlines()) < 75


def test_help_of_a_section_has_its_options_and_those_inside(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = shown(capsys, "--help", "train")
    assert "--train.rampup.start START" in text
    assert "--model." not in text
    assert shown(capsys, "--help=train.rampup").count("\n  --") == 3


def test_help_of_all_has_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "--help", "all")
    assert all(f"\n  --{option.name} " in text for option in OPTIONS)


def test_help_of_no_section_tells_what_may_be_meant() -> None:
    with pytest.raises(ConfigError, match="--help modle: is not a section; did you mean model"):
        load_config(["--help", "modle"])


def test_hyphens_and_underscores_are_the_same() -> None:
    argv = ["--config", "quickstart", "--folder", "here", "--train.micro-batch-size", "2"]
    config = load_config([*argv, "--data.paths.my-data/a_b", "1"])
    assert config.train.micro_batch_size == 2
    assert config.data.paths == {"my-data/a_b": 1.0}


@pytest.mark.parametrize("name", config_names())
def test_a_config_of_the_package_is_taken_by_its_name(name: str) -> None:
    in_checkout = str(ROOT / "examples" / "configs" / f"{name}.yaml")
    folder = ["--folder", "here"]
    assert load_config(["--config", name, *folder]) == load_config(
        ["--config", in_checkout, *folder]
    )


def test_a_file_with_the_name_of_a_config_is_given_as_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["--config", "quickstart", "--folder", "here"]
    (tmp_path / "quickstart").write_text("train: {seed: 7}")
    assert load_config(argv).train.seed != 7
    assert load_config([*argv, "--config", "./quickstart"]).train.seed == 7


def test_names_are_told_where_there_is_no_such_config() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(["--config", "bloom-2b"])
    assert all(name in str(caught.value) for name in config_names())
