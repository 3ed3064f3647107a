"""Runs with data, saves or machines that are refused."""

import os
import shutil
from pathlib import Path

from megatron.data.description import Description, write_description
from megatron.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from tests.integration.cases import (
    CHECKPOINT,
    DATA,
    DISK,
    PEER,
    SAVE,
    Action,
    Case,
    changed,
    data,
    resumed,
)
from tests.integration.runs import make_data, make_tokenizer


def cut(name: str, missing: int = 6) -> Action:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - missing)


def extend(name: str) -> Action:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes() + b"12")


def overwrite(name: str, offset: int, content: bytes) -> Action:
    def action(folder: Path) -> None:
        with (folder / name).open("r+b") as file:
            file.seek(offset)
            file.write(content)

    return action


def write(name: str, content: bytes = b"") -> Action:
    return lambda folder: (folder / name).write_bytes(content)


def remove(name: str) -> Action:
    return lambda folder: (folder / name).unlink()


def describe(*, dataset: str | None) -> Action:
    """Describe the data, made with another tokenizer; ``dataset`` None is its true fingerprint."""

    def action(folder: Path) -> None:
        description = Description(
            dataset=dataset or IndexedDataset(folder / "text").fingerprint,
            tokenizer="0" * 32,
            vocab_size=509,
            largest_token=508,
            documents=40,
            tokens=100,
            utf8_bytes=100,
        )
        write_description(folder / "text", description)

    return action


def index_of_other_data(folder: Path) -> None:
    make_data(folder / "other", documents=10)
    shutil.copy(folder / "other.idx", folder / "text.idx")


def break_manifests(folder: Path) -> None:
    for path in folder.glob("run/checkpoints/*/manifest.json"):
        path.write_text("{}")


def no_documents(folder: Path) -> None:
    with IndexedDatasetWriter(folder / "text", "uint16"):
        pass


DATASETS = {
    "no paths": data("data.paths is empty", data__paths={}),
    "no bin": data("text.bin: cannot be read|No such file", remove("text.bin")),
    "no idx": data("text.idx: cannot be read|No such file", remove("text.idx")),
    "bin cut": data("text.bin: has|bytes|text.idx describes", cut("text.bin")),
    "bin extended": data("text.bin: has|bytes|text.idx describes", extend("text.bin")),
    "bin empty": data("text.bin: has 0 bytes|text.idx describes", write("text.bin")),
    "idx cut": data("text.idx: has|bytes, but its header describes", cut("text.idx")),
    "idx empty": data("text.idx: has 0 bytes|begins with 34", write("text.idx")),
    "magic": data("text.idx: begins with|XMIDIDX|MMIDIDX", overwrite("text.idx", 0, b"X")),
    "version": data("text.idx: has version 7|expected 1", overwrite("text.idx", 9, b"\7")),
    "dtype": data("text.idx: has dtype code 99|8 (uint16)", overwrite("text.idx", 17, b"c")),
    "idx of other data": data("text.bin: has|text.idx describes", index_of_other_data),
    "boundaries": data(
        "text.idx: sequence 0 has -1 tokens", overwrite("text.idx", 34, b"\xff" * 4)
    ),
    "no documents": data("text|data.split|0 documents", no_documents),
    "token beyond": data(
        "text.bin: has the token id|expected 0 to 299|model.vocab_size 300", model__vocab_size=300
    ),
    "no tokenizer": data("missing.json: no such tokenizer", data__tokenizer="missing.json"),
    "broken tokenizer": data(
        "tokenizer.json: cannot be read as a tokenizer",
        write("tokenizer.json", b"{}"),
        data__tokenizer="FOLDER/tokenizer.json",
    ),
    "another tokenizer": data(
        "text.json: the data was made with tokenizer 00000|data.tokenizer FOLDER/tokenizer.json is",
        describe(dataset=None),
        data__tokenizer="FOLDER/tokenizer.json",
    ),
    "another description": data("text.json: describes the dataset 111", describe(dataset="111")),
    "empty split": data(
        "text: data.split [1.0, 0.0, 0.0] leaves none of its 40 documents for valid",
        data__split=[1, 0, 0],
        train__eval_interval=2,
        train__eval_samples=2,
    ),
    "too little": data("text: the|documents|one sample has 100001", model__seq_length=100000),
    "on two ranks": Case(
        "text.bin: has", DATA, {"parallel__tensor": 2}, before=cut("text.bin"), world_size=2
    ),
}

SAVES = {
    "required": Case(
        "checkpoint.resume required: FOLDER/run/checkpoints holds no valid|nothing at all",
        CHECKPOINT,
        {"checkpoint__resume": "required"},
        fresh=True,
    ),
    "required and damaged": resumed(
        "step-00000002/manifest.json: is not the manifest|checkpoint.skip_damaged true",
        break_manifests,
        checkpoint__resume="required",
    ),
    "required and all damaged": resumed(
        "checkpoint.resume required: |holds no valid save, but step-00000001, step-00000002",
        break_manifests,
        checkpoint__resume="required",
        checkpoint__skip_damaged=True,
    ),
    "all damaged": resumed(
        "step-00000002/manifest.json: is not the manifest|checkpoint.skip_damaged true",
        break_manifests,
    ),
    "damaged, and never": resumed(
        "checkpoint.resume never|run/checkpoints holds the saves|step-00000002",
        break_manifests,
        checkpoint__resume="never",
    ),
    "no manifest": resumed(
        f"{SAVE}/manifest.json: the file is missing|valid checkpoints|step-00000001|"
        "checkpoint.skip_damaged true",
        remove(f"{SAVE}/manifest.json"),
    ),
    "all gone": resumed(
        "metrics.jsonl: tells of the save step-00000002, but FOLDER/run/checkpoints holds none|"
        "checkpoint.skip_damaged true",
        lambda folder: shutil.rmtree(folder / "run/checkpoints"),
    ),
    "of another step": resumed(
        "step-00000003: is the save of step 2",
        lambda folder: (folder / SAVE).rename(folder / "run/checkpoints/step-00000003"),
    ),
    "saves are a file": resumed(
        "run/checkpoints: cannot be read: Not a directory",
        lambda folder: (
            shutil.rmtree(folder / "run/checkpoints"),
            (folder / "run/checkpoints").write_bytes(b""),
        ),
    ),
    "never": resumed(
        "checkpoint.resume never|run/checkpoints holds the saves|step-00000002",
        checkpoint__resume="never",
    ),
    "flipped": resumed(
        f"{SAVE}/rank-00000.safetensors: is damaged|hash",
        overwrite(f"{SAVE}/rank-00000.safetensors", 5000, b"\xa5\x5a\xa5"),
    ),
    "cut": resumed(
        f"{SAVE}/rank-00000.safetensors: is damaged|bytes long",
        cut(f"{SAVE}/rank-00000.safetensors"),
    ),
    "file missing": resumed(
        f"{SAVE}/rank-00000.safetensors", remove(f"{SAVE}/rank-00000.safetensors")
    ),
    "deeper model": resumed(
        "model.num_layers is 3, but 2|step-00000002|not the same model", model__num_layers=3
    ),
    "other activation": resumed(
        "model.activation is swiglu, but gelu|not the same model", model__activation="swiglu"
    ),
    "other precision": resumed(f"{SAVE}|float64|but the model's is float32", train__dtype="fp32"),
    "on two ranks": Case(
        "rank-00000.safetensors: is damaged",
        CHECKPOINT,
        {"parallel__tensor": 2},
        before=overwrite(f"{SAVE}/rank-00000.safetensors", 5000, b"\xa5\x5a\xa5"),
        world_size=2,
    ),
}

MACHINES = {
    "tensorboard is a file": Case(
        "run/tensorboard: cannot be written: is no folder",
        DISK,
        {"log__tensorboard": True},
        before=write("run/tensorboard"),
    ),
    "run folder is a file": Case(
        "folder FOLDER/run cannot be written|File exists", DISK, before=write("run"), fresh=True
    ),
    "run folder in a file": Case(
        "folder FOLDER/run/a cannot be written|Not a directory",
        DISK,
        {"folder": "FOLDER/run/a"},
        before=write("run"),
        world_size=2,
        fresh=True,
    ),
    "no gpu": Case(
        "launch.device cuda|this machine has 0",
        options={"launch__device": "cuda"},
        env={"CUDA_VISIBLE_DEVICES": ""},
    ),
    "no apex norm": changed(
        "model.layernorm apex needs NVIDIA's apex", world_size=2, model__layernorm="apex"
    ),
    "no apex optimizer": changed(
        "optimizer.name apex_adamw needs NVIDIA's apex", optimizer__name="apex_adamw"
    ),
    "large tokenizer": Case(
        "model.vocab_size (509)|600 tokens of data.tokenizer FOLDER/tokenizer.json",
        options={"data__tokenizer": "FOLDER/tokenizer.json"},
        before=lambda folder: make_tokenizer(folder / "tokenizer.json", 600),
        world_size=2,
    ),
    "rank beyond": Case(
        "RANK (2) must be below WORLD_SIZE (2)", env={"RANK": "2", "WORLD_SIZE": "2"}
    ),
    "rank alone": Case("WORLD_SIZE must be a whole number|got None", env={"RANK": "0"}),
    "world of words": Case(
        "WORLD_SIZE must be a whole number of at least 1|got 'two'",
        env={"RANK": "0", "WORLD_SIZE": "two"},
    ),
    "no port": Case(
        "MASTER_PORT must be set with WORLD_SIZE 2",
        env={"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"},
    ),
    "tensor on ranks": changed(
        "parallel.tensor (4) must divide|WORLD_SIZE 2", world_size=2, parallel__tensor=4
    ),
    "grid on ranks": changed(
        "parallel.tensor (1) x parallel.data (4)|WORLD_SIZE 2", world_size=2, parallel__data=4
    ),
    "first rank without the second": Case(
        "not all of 2 ranks met at 127.0.0.1|launch.startup_timeout (1.5 s)",
        PEER,
        {"launch__startup_timeout": 1.5},
        world_size=2,
        ranks=(0,),
    ),
    "second rank without the first": Case(
        "nobody listens at MASTER_ADDR|launch.startup_timeout (1.5 s)",
        PEER,
        {"launch__startup_timeout": 1.5},
        world_size=2,
        ranks=(1,),
    ),
}
