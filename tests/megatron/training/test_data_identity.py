"""A run goes on with the data of its save, wherever that lies, or is told that it does not."""

import json
import logging
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron.config import Config
from megatron.data.content import Content, Findings
from megatron.errors import CheckpointError
from megatron.tokenizer import load_tokenizer
from megatron.training.data_identity import check_data, data_state, tokenizer_identity
from tests.megatron.data.test_loader import make_config
from tests.megatron.test_tokenizer import make_tokenizer_file

SAVE = Path("run/checkpoints/step-00000002")
STAMPS = ((1, 2, 3, 4), (5, 6, 7, 8))


def findings_of(config: Config, contents: dict[str, str]) -> Findings:
    """What would be found at the paths of ``config``: the given contents."""
    found = Findings()
    for prefix in config.data.paths:
        content = contents[prefix]
        found.contents[prefix] = Content(STAMPS, content[:2], content, 0, 9)
    return found


def state(paths: dict[str, float], contents: dict[str, str], **changes: Any) -> dict[str, Any]:
    config = make_config(Path("."))
    data = replace(config.data, paths=paths, split=changes.get("split", (9, 1, 0)))
    config = replace(config, data=data, train=replace(config.train, seed=changes.get("seed", 5)))
    # A save holds JSON.
    values = json.loads(json.dumps(data_state(config, findings_of(config, contents), None)))
    assert isinstance(values, dict)
    return {**values, "tokenizer": changes.get("tokenizer", "0f")}


_UNCHANGED = object()
PATHS = {"a": 2.0, "b": 1.0, "c": 1.0}
CONTENTS = {"a": "aa11", "b": "bb22", "c": "cc33"}


def refusal(now: dict[str, Any], saved: Any = _UNCHANGED) -> str:
    before = state(PATHS, CONTENTS) if saved is _UNCHANGED else saved
    with pytest.raises(CheckpointError) as caught:
        check_data({"data": before}, SAVE, now, accept=False)
    message = str(caught.value)
    assert message.startswith(f"{SAVE}: was made with other data: ")
    assert message.endswith("; checkpoint.accept_new_data true goes on with what is now")
    return message


DIFFERENCES: dict[str, tuple[dict[str, Any], str]] = {
    "tokens": (state(PATHS, {**CONTENTS, "b": "bbXX"}), "data.paths b is bb (index) and bbXX"),
    "lengths": (state(PATHS, {**CONTENTS, "c": "zz33"}), "data.paths c is zz (index) and zz33"),
    "share": (state({**PATHS, "a": 3.0}, CONTENTS), "data.paths a has the share 0.6, but had 0.5"),
    "more": (state({**PATHS, "d": 1.0}, {**CONTENTS, "d": "d"}), "has 4 datasets, but had 3"),
    "fewer": (state({"a": 1.0}, CONTENTS), "has 1 datasets, but had 3"),
    "order": (state({"b": 1.0, "a": 2.0, "c": 1.0}, CONTENTS), "data.paths b is bb"),
    "seed": (state(PATHS, CONTENTS, seed=6), "train.seed is 6, but was 5"),
    "split": (
        state(PATHS, CONTENTS, split=(8, 2, 0)),
        "data.split is [0.8, 0.2, 0.0], but was [0.9, 0.1, 0.0]",
    ),
    "tokenizer": (state(PATHS, CONTENTS, tokenizer="1f"), "data.tokenizer is 1f, but was 0f"),
    "no tokenizer": (state(PATHS, CONTENTS, tokenizer=None), "data.tokenizer is none, but was 0f"),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_other_data_is_refused_or_told_of(name: str, caplog: pytest.LogCaptureFixture) -> None:
    now, words = DIFFERENCES[name]
    assert words in refusal(now)
    with caplog.at_level(logging.WARNING):
        assert not check_data({"data": state(PATHS, CONTENTS)}, SAVE, now, accept=True)
    (line,) = caplog.messages
    assert "goes on with other data, as checkpoint.accept_new_data says" in line
    assert words in line


def test_all_differences_are_named_at_once() -> None:
    message = refusal(state({"a": 1.0}, CONTENTS, seed=7, split=(1, 1, 1), tokenizer="ff"))
    assert all(name in message for name in ("data.paths", "train.seed", "data.split", "tokenizer"))


@pytest.mark.parametrize("seed", range(30))
def test_same_data_elsewhere_and_on_another_scale_is_the_same(
    seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    choose = random.Random(seed)
    scale = choose.uniform(0.001, 1000)
    moved = {f"/elsewhere/{seed}/{name}": weight * scale for name, weight in PATHS.items()}
    contents = dict(zip(moved, CONTENTS.values(), strict=True))
    split = tuple(share * scale for share in (9, 1, 0))
    now = state(moved, contents, split=split)
    with caplog.at_level(logging.WARNING):
        assert check_data({"data": state(PATHS, CONTENTS)}, SAVE, now, accept=False)
    assert caplog.messages == []


def test_what_could_not_be_compared_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert check_data({"step": 2}, SAVE, state(PATHS, CONTENTS), accept=False)
    (line,) = caplog.messages
    assert "corpus, tokenizer, seed and split are the same could not be compared" in line


@pytest.mark.parametrize(
    "damage", [[], "x", None, {}, {"datasets": 3}, {"datasets": [3]}, {"datasets": [{}, 1, []]}]
)
def test_state_that_makes_no_sense_is_other_data(damage: Any) -> None:
    refusal(state(PATHS, CONTENTS), damage)


def test_tokenizer_of_the_same_words_that_cuts_otherwise_is_another(tmp_path: Path) -> None:
    whole = load_tokenizer(make_tokenizer_file(tmp_path / "whole.json"))
    values = json.loads((tmp_path / "whole.json").read_text())
    merges = values["model"]["merges"]
    values["model"]["merges"] = merges[: len(merges) // 2]
    (tmp_path / "cut.json").write_text(json.dumps(values))
    cut = load_tokenizer(tmp_path / "cut.json")
    assert whole.fingerprint == cut.fingerprint
    assert tokenizer_identity(whole) != tokenizer_identity(cut)
    (tmp_path / "moved").mkdir()
    (tmp_path / "whole.json").rename(tmp_path / "moved" / "tokenizer.json")
    moved = load_tokenizer(tmp_path / "moved")
    assert tokenizer_identity(moved) == tokenizer_identity(whole)
