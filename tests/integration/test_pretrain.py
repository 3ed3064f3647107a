"""Whole runs: what is learnt, what is written, and that no layout changes it."""

import os
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

from megatron.checkpoint.folders import list_checkpoints
from megatron.config import Config, config_to_dict, load_config
from megatron.training.saving import CHECKPOINTS
from tests.figures import Figure
from tests.integration.runs import (
    base_argv,
    make_data,
    make_tokenizer,
    newest_save,
    options,
    records,
    run_pretrain,
    values,
)

NON_FINITE = 6
ROUNDING = 1e-12

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor 2": (2, {"parallel__tensor": 2}),
    "tensor 4": (4, {"parallel__tensor": 4}),
    "tensor 4, sequence": (4, {"parallel__tensor": 4, "parallel__sequence": True}),
    "data 2, accumulation 2": (2, {"parallel__data": 2}),
    "data 2, accumulation 1": (2, {"parallel__data": 2, "train__micro_batch_size": 4}),
    "tensor 2 x data 2": (4, {"parallel__tensor": 2, "parallel__data": 2}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a tokenizer, and a run in float64 on one rank, with four microbatches a step."""
    folder = tmp_path_factory.mktemp("pretrain")
    make_data(folder / "text")
    make_tokenizer(folder / "tokenizer.json")
    assert run_pretrain(argv(folder, "run")).exit_code == 0
    return folder


def argv(folder: Path, run: str, **changes: object) -> list[str]:
    sizes = {"train__samples": 160, "train__global_batch_size": 8, "log__interval": 5}
    return base_argv(folder, **{"folder": folder / run, **sizes, **changes})


def test_loss_falls(folder: Path, figure: Figure) -> None:
    losses = values(folder / "run", "loss")
    # A guess among all words costs ln 509 = 6.2, the best guess that cannot see the text 4.3.
    assert losses[0] > 6.0
    assert losses[-1] < 3.0
    figure("learnable text", first_loss=losses[0], last_loss=losses[-1], steps=len(losses))


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_does_not_change_the_run(folder: Path, name: str, figure: Figure) -> None:
    world_size, layout = LAYOUTS[name]
    run = folder / name
    arguments = argv(folder, name, train__stop_at_step=8, **layout)
    assert run_pretrain(arguments, world_size=world_size).exit_code == 0
    worst = 0.0
    for field in ("loss", "grad_norm"):
        mine, theirs = values(run, field), values(folder / "run", field)[:8]
        assert mine == pytest.approx(theirs, rel=ROUNDING, abs=0.0)
        worst = max(worst, *(abs(a / b - 1) for a, b in zip(mine, theirs, strict=True)))
    figure(f"run at {name} against one rank, fp64", worst_relative=worst)


def test_log_tells_of_start_steps_and_save(folder: Path) -> None:
    result = run_pretrain(argv(folder, "log", train__samples=80))
    lines = [line.split(" INFO ")[1] for line in result.stdout.splitlines()]
    assert result.stderr == ""
    assert lines[0] == "attention backend blocked: the one for auto on cpu"
    assert lines[1] == f"fresh start: no save in {folder}/log/checkpoints"
    grid = "1 rank (tensor 1 x pipeline 1 x data 1)"
    assert f"parameters, {grid} on CPU, engine torch, fp64, 10 steps" in lines[2]
    assert lines[3] == "data: 2.64k tokens to train on, read 0.969 times; 61 to validate with"
    assert lines[4].startswith("step  5/10")
    assert lines[5].startswith("step 10/10")
    save = f"{folder}/log/checkpoints/step-00000010"
    assert lines[6] == f"saved {save}"
    assert lines[7].startswith("complete: step 10 of 10, 80 of 80 samples, after ")
    assert lines[8].startswith(f"newest save {save}; ")
    assert len(lines) == 9


def test_complete_run_is_not_trained_further(folder: Path) -> None:
    before = values(folder / "run", "loss_hex")
    result = run_pretrain(argv(folder, "run"))
    assert result.exit_code == 0
    assert "step-00000020, saved at layout" in result.stdout
    assert values(folder / "run", "loss_hex") == before


def test_evaluations_are_written(folder: Path) -> None:
    changes = {"train__samples": 56, "train__eval_interval": 3, "train__eval_samples": 8}
    result = run_pretrain(argv(folder, "eval", data__split=[8, 2, 0], **changes))
    evaluations = records(folder / "eval", "eval")
    assert [record["step"] for record in evaluations] == [3, 6, 7]
    assert {record["split"] for record in evaluations} == {"valid"}
    assert evaluations[-1]["loss"] < evaluations[0]["loss"]
    assert result.stdout.count("valid loss") == 3


def test_evaluation_does_not_change_training(folder: Path) -> None:
    changes = {"data__split": [8, 2, 0], "train__samples": 56, "model__hidden_dropout": 0.1}
    for run, interval in (("quiet", 0), ("loud", 2)):
        evaluation = {"train__eval_interval": interval, "train__eval_samples": 8}
        assert run_pretrain(argv(folder, run, **changes, **evaluation)).exit_code == 0
    assert values(folder / "quiet", "loss_hex") == values(folder / "loud", "loss_hex")


def test_the_last_saves_are_kept(folder: Path) -> None:
    saves = {"checkpoint__save_interval": 2, "checkpoint__keep_last": 3}
    run_pretrain(argv(folder, "keep", train__samples=88, **saves))
    kept = [step for step, _ in list_checkpoints(folder / "keep" / CHECKPOINTS)]
    assert kept == [8, 10, 11]
    assert len(os.listdir(folder / "keep" / CHECKPOINTS)) == 3


def test_all_saves_are_kept_on_demand(folder: Path) -> None:
    saves = {"checkpoint__save_interval": 1, "checkpoint__keep_last": 0}
    run_pretrain(argv(folder, "keep all", train__samples=40, **saves))
    kept = [step for step, _ in list_checkpoints(folder / "keep all" / CHECKPOINTS)]
    assert kept == [1, 2, 3, 4, 5]


def test_run_that_diverges_ends_and_leaves_its_saves(folder: Path) -> None:
    changes = {"optimizer__lr": 1e30, "optimizer__max_grad_norm": 0, "optimizer__decay": "constant"}
    arguments = argv(
        folder, "diverged", train__dtype="fp32", checkpoint__save_interval=1, **changes
    )
    result = run_pretrain([*arguments, *options(parallel__data=2)], world_size=2)
    assert result.exit_code == NON_FINITE
    failed = len(values(folder / "diverged", "loss")) + 1
    assert len(result.complaints) == 1
    assert f"step {failed}: loss" in result.complaints[0]
    assert "must be finite" in result.complaints[0]
    reader = newest_save(folder / "diverged")
    assert reader.state["step"] == failed - 1
    assert all(reader.read(*key).isfinite().all() for key in reader.tensors)


def test_tensorboard_is_written_on_demand(folder: Path) -> None:
    run_pretrain(argv(folder, "board", train__samples=16, log__tensorboard=True))
    assert list((folder / "board" / "tensorboard").glob("events.out.tfevents.*"))
    assert not (folder / "run" / "tensorboard").exists()


def test_resets_at_the_ends_of_documents_change_the_loss(folder: Path) -> None:
    tokenizer = {"data__tokenizer": folder / "tokenizer.json", "train__samples": 16}
    names = ("reset_attention_mask", "reset_position_ids", "eod_mask_loss")
    losses = set()
    for run, chosen in enumerate(([], names[:1], names[1:2], names[2:], names)):
        resets = {f"data__{name}": True for name in chosen}
        changes = {**tokenizer, **resets, "model__position_embedding": "learned"}
        assert run_pretrain(argv(folder, f"resets {run}", **changes)).exit_code == 0
        losses.add(values(folder / f"resets {run}", "loss")[-1])
    assert len(losses) == 5


def test_tokenizer_travels_with_the_saves(folder: Path) -> None:
    changes = {"data__tokenizer": folder / "tokenizer.json", "train__samples": 8}
    run_pretrain(argv(folder, "tokens", **changes))
    reader = newest_save(folder / "tokens")
    assert reader.file("tokenizer/tokenizer.json") == (folder / "tokenizer.json").read_bytes()


def test_config_is_left_in_the_run_folder(folder: Path) -> None:
    config = load_config(argv(folder, "run"))
    left = folder / "run" / "config.yaml"
    assert yaml.safe_load(left.read_text()) == config_to_dict(config)
    assert load_config(["--config", str(left)]) == config


def test_printed_config_can_be_read_again(folder: Path) -> None:
    changes = {
        "data__split": [8, 1, 1],
        "data__tokenizer": folder / "tokenizer.json",
        "model__init_std": 0.02,
        "train__rampup__start": 4,
        "train__rampup__increment": 2,
        "train__rampup__samples": 40,
    }
    arguments = argv(folder, "printed", **changes)
    result = run_pretrain([*arguments, "--print_config"])
    assert result.exit_code == 0
    (folder / "printed.yaml").write_text(result.stdout)
    assert load_config(["--config", str(folder / "printed.yaml")]) == load_config(arguments)
    assert not (folder / "printed").exists()


def test_help_shows_every_option_with_its_default() -> None:
    result = run_pretrain(["--help", "all"])
    assert result.exit_code == 0
    text = " ".join(result.stdout.split())
    helps = {part.split()[0]: part for part in re.split(r" --(?=[a-z0-9_.]+ [A-Z{])", text)[1:]}
    for name, value in option_defaults(Config):
        assert value in helps[name], name


def option_defaults(config: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Name of every option, and how the help shows its default."""
    types = get_type_hints(config)
    for field in fields(config):
        name = f"{prefix}{field.name}"
        if isinstance(types[field.name], type) and is_dataclass(types[field.name]):
            yield from option_defaults(types[field.name], f"{name}.")
        elif field.default is MISSING and field.default_factory is MISSING:
            yield name, "(required, "
        else:
            default = {} if field.default is MISSING else field.default
            words = {None: "null", True: "true", False: "false"}
            shown = words[default] if default is None or type(default) is bool else default
            yield name, f"default: {list(shown) if isinstance(shown, tuple) else shown})"
