"""The sound folder of which each case is a copy: one file or more of every format that is read."""

import gzip
import json
import os
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import sentencepiece

from tests.hostile.programs import run_program
from tests.integration.runs import base_argv, make_data, make_tokenizer

FLAGS = {
    "num-layers": "2",
    "hidden-size": "64",
    "num-attention-heads": "4",
    "seq-length": "32",
    "max-position-embeddings": "32",
    "micro-batch-size": "2",
    "global-batch-size": "4",
    "train-samples": "80",
    "lr": "1e-4",
    "lr-decay-style": "cosine",
    "lr-warmup-samples": "8",
    "min-lr": "1e-5",
    "clip-grad": "1.0",
    "weight-decay": "0.1",
    "adam-beta1": "0.9",
    "init-method-std": "0.02",
    "seed": "7",
    "data-path": "text",
    "split": "969,30,1",
    "save": "saves",
    "save-interval": "5",
    "eval-interval": "5",
    "eval-iters": "2",
    "vocab-file": "vocab.json",
    "merge-file": "merges.txt",
    "tokenizer-type": "GPT2BPETokenizer",
    "deepspeed_config": "ds.json",
}
DEEPSPEED = {
    "train_batch_size": 4,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 1, "overlap_comm": True, "offload_optimizer": {"device": "cpu"}},
    "bf16": {"enabled": True},
    "optimizer": {"type": "Adam", "params": {"lr": 1e-4, "betas": [0.9, 0.999]}},
    "steps_per_print": 10,
}


def run_argv(folder: Path, run: str = "run", **changes: object) -> list[str]:
    """The arguments of a small run."""
    small = {
        "model__num_layers": 1,
        "model__hidden_size": 16,
        "model__num_heads": 2,
        "train__samples": 8,
        "train__eval_interval": 2,
        "train__eval_samples": 4,
        "train__dtype": "fp32",
        "checkpoint__save_interval": 1,
        "data__tokenizer": folder / "tokenizer.json",
    }
    return [*base_argv(folder, **{**small, "folder": folder / run, **changes})]


def build_specimen(folder: Path) -> None:
    """Make the folder, with a run that is complete."""
    folder.mkdir()
    make_data(folder / "text")
    make_tokenizer(folder / "tokenizer.json")
    _make_transformers(folder / "tok")
    _make_corpus(folder / "corpus")
    _make_sentencepiece(folder / "spm.model")
    (folder / "prompts.txt").write_text("w1 w2\nw3\n")
    (folder / "ds.json").write_text(json.dumps(DEEPSPEED))
    (folder / "train.sh").write_text(script(FLAGS))
    (folder / "vocab.json").write_text(json.dumps({f"w{n}": n for n in range(509)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    _train(folder)
    assert (folder / "run/checkpoints/step-00000002/manifest.json").is_file()


def script(flags: dict[str, str], before: str = "") -> str:
    """A launch script of the original."""
    words = " \\\n    ".join(f"--{name} {value}" for name, value in flags.items())
    command = f"deepspeed --num_gpus 1 pretrain_gpt.py \\\n    --deepspeed {words}"
    return f"#!/bin/bash\n{before}\n{command}\n"


def _train(folder: Path) -> None:
    child = os.fork()
    if child == 0:
        output = folder.with_name("output")
        run_program("pretrain_bloom", run_argv(folder), output, {}, folder)
    _, status = os.waitpid(child, 0)
    assert status == 0, folder.with_name("output").read_text()


def _make_transformers(folder: Path) -> None:
    folder.mkdir()
    make_tokenizer(folder / "tokenizer.json")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "unk_token": "w1",
        "additional_special_tokens": ["w2"],
        "model_max_length": 32,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "chat_template": "{{ messages }}",
        "added_tokens_decoder": {"0": {"content": "<|endoftext|>", "special": True}},
    }
    special = {"eos_token": {"content": "<|endoftext|>", "lstrip": False}, "unk_token": "w1"}
    model = {"model_type": "bloom", "architectures": ["BloomForCausalLM"], "hidden_size": 16}
    for name, values in (
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", special),
        ("config.json", model),
    ):
        (folder / name).write_text(json.dumps(values))


def _make_corpus(folder: Path) -> None:
    folder.mkdir()
    lines = "".join(
        json.dumps({"text": f"w{n} w{n + 1}", "meta": {"n": n}}) + "\n" for n in range(9)
    )
    (folder / "a.jsonl").write_text(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "c.txt").write_text("w5 w6")


def _make_sentencepiece(path: Path) -> None:
    random = np.random.default_rng(0)
    sentences = [" ".join(f"w{n}" for n in random.integers(0, 60, 12)) for _ in range(200)]
    with path.open("wb") as file, redirect_stdout(None):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=file, vocab_size=60, minloglevel=2
        )
