"""Runs of Megatron-DeepSpeed become configs that are equal, and say what they lose.

The scripts in ``migration`` hold the flags of BLOOM-176B, of a smaller BLOOM, of a GPT-2 and of a
model under ZeRO 3. What each flag becomes is tested on a short command line.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron.commands.migrate import main
from megatron.config import Config, config_from_dict, config_to_dict, load_config
from megatron.config.dotted import nest
from megatron.errors import ConfigError
from megatron.migration.deepspeed_json import SAME, parse_json
from megatron.migration.flags import DEFAULTS, FLAGS, Same, Switch
from megatron.migration.run import Migration, Original
from megatron.migration.shell import open_parts, read_script, shown
from megatron.migration.translate import Migrated, gather, translate
from megatron.migration.values import Flags, Kind
from megatron.model.flops import count_parameters
from megatron.planning.count import count
from megatron.tokenizer import load_tokenizer
from tests.figures import Figure

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(__file__).parent / "migration"

SHORTEST = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 "
    "--max-position-embeddings 32 --micro-batch-size 2 --global-batch-size 8 "
    "--train-samples 800 --lr 1e-3"
)
VOCAB = ["--vocab_size", "509"]


def embedding(vocab: int, hidden: int, *, positions: int = 0, norm: bool = False) -> int:
    return (vocab + positions + (2 if norm else 0)) * hidden


def layers(num_layers: int, hidden: int) -> int:
    """Parameters of layers whose MLP is 4 times as wide as the rest."""
    return num_layers * (12 * hidden**2 + 13 * hidden)


def gated_layers(num_layers: int, hidden: int, ffn: int) -> int:
    attention = 4 * hidden**2 + 4 * hidden
    mlp = 2 * ffn * (hidden + 1) + (ffn + 1) * hidden
    return num_layers * (attention + mlp + 4 * hidden)


# Options of the tool, ranks, and parameters by the formulas of the models.
RUNS: dict[str, tuple[list[str], int, int]] = {
    "bloom-176b.slurm": (
        [],
        384,
        embedding(250_880, 14336, norm=True) + layers(70, 14336) + 2 * 14336,
    ),
    "bloom-1b7.slurm": (
        [],
        64,
        embedding(250_880, 2048, norm=True) + layers(24, 2048) + 2 * 2048,
    ),
    "gpt2-345m.sh": (
        ["--vocab_size", "50257"],
        1,
        embedding(50_257, 1024, positions=1024) + layers(24, 1024) + 2 * 1024,
    ),
    "zero3-offload.sh": (
        ["--vocab_size", "50257"],
        4,
        2 * embedding(50_257, 768) + embedding(1024, 768) + gated_layers(12, 768, 2048) + 2 * 768,
    ),
}
PUBLISHED = {"bloom-176b.slurm": 176_247_271_424, "bloom-1b7.slurm": 1_722_408_960}


def migrate(argv: list[str], folder: Path) -> tuple[Config, str]:
    """The config that comes out as a run reads it, and its text."""
    path = folder / "run.yaml"
    assert main(["--output", str(path), "--overwrite", *argv]) == 0
    return load_config(["--config", str(path)]), path.read_text()


def of_script(name: str, folder: Path) -> tuple[Config, str]:
    return migrate(["--script", str(SCRIPTS / name), *RUNS[name][0]], folder)


def original(
    more: str, deepspeed: dict[str, Any] | None = None, *, flags: str = SHORTEST, **known: Any
) -> Original:
    """A run with the shortest command line, and more flags."""
    given = None if deepspeed is None else parse_json(json.dumps(deepspeed), "ds.json")
    words = shlex.split(f"{flags} {more}")
    known = {"vocab_size": 509, **known}
    return Original(name="run", flags=Flags(words), deepspeed=given, **known)


def notes(run: Migrated | Migration, kind: Kind) -> str:
    """What is said of one kind."""
    return "\n".join(f"{note.name}: {note.text}" for note in run.notes.of(kind))


def block(text: str, heading: str) -> str:
    """What stands under a heading of the comments, as one line."""
    _, _, rest = text.partition(f"# {heading}")
    lines = rest.partition("\n#\n")[0].partition("\n\n")[0].splitlines()
    return " ".join(" ".join(line.lstrip("#") for line in lines).split())


def lost(text: str) -> str:
    return block(text, "No equal here")


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_dry_run_accepts_the_config_and_counts_the_parameters(
    name: str, tmp_path: Path, figure: Figure
) -> None:
    config, _ = of_script(name, tmp_path)
    _, world_size, parameters = RUNS[name]
    found = count(config)
    assert found.dims.world_size == world_size
    assert found.parameters == count_parameters(config.model) == parameters
    assert parameters == PUBLISHED.get(name, parameters)
    figure(f"migrated {name}", parameters=f"{found.parameters:,}", ranks=found.dims.world_size)


def test_176b_is_the_example_config_but_for_what_is_said(tmp_path: Path) -> None:
    config, text = of_script("bloom-176b.slurm", tmp_path)
    example = load_config(["--config", str(ROOT / "examples" / "configs" / "bloom-176b.yaml")])
    differing = {
        "folder": "runs/bloom-176b",
        "data.tokenizer": "bigscience/tokenizer",
        "engine.name": "deepspeed",
        "engine.deepspeed": {"steps_per_print": 2000, "wall_clock_breakdown": False},
        "checkpoint.keep_last": 0,
        "log.interval": 1,
        "log.tensorboard": True,
    }
    assert config_to_dict(config) == merged(config_to_dict(example), nest(differing))
    for flag in ("--exit-duration-in-mins 5990", "--kill-switch-path"):
        assert flag in lost(text)
    assert "$SCRATCH has no value" in block(text, "To do before the run")
    for flag in (
        "--sync-tp-duplicated-parameters",
        "--data-impl mmap",
        "--tensorboard-queue-size 5",
    ):
        assert flag in block(text, "Not needed here")
    assert "1 instead of 0" in block(text, "Not as in the original")


def merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Nested values with others in their places."""
    out = dict(values)
    for key, value in changes.items():
        inner = out.get(key)
        out[key] = merged(inner, value) if isinstance(inner, dict) and inner else value
    return out


def test_smaller_bloom_keeps_its_arrays_blend_and_loss_scale(tmp_path: Path) -> None:
    config, text = of_script("bloom-1b7.slurm", tmp_path)
    assert config.data.paths == {"data/roots/en": 0.7, "data/roots/fr": 0.3}
    assert config.data.split == (0.95, 0.05, 0)
    assert str(config.data.tokenizer) == "my tokenizer"
    assert (config.parallel.tensor, config.parallel.pipeline, config.parallel.data) == (2, 2, 16)
    assert (config.train.global_batch_size, config.train.dtype) == (512, "fp16")
    assert config.train.loss_scale.initial == 2**12
    assert config.train.loss_scale.window == 500
    assert (config.engine.name, config.parallel.zero) == ("deepspeed", 1)
    assert str(config.folder) == "runs/1b7"
    assert "--loss-scale 12" in block(text, "Not needed here")


def test_gpt2_has_learned_positions_and_iterations_as_samples(tmp_path: Path) -> None:
    config, text = of_script("gpt2-345m.sh", tmp_path)
    assert config.model.position_embedding == "learned"
    assert not config.model.embedding_layernorm
    assert (config.model.init_std, config.optimizer.beta2) == (0.02, 0.999)
    assert (config.model.hidden_dropout, config.model.attention_dropout) == (0.1, 0.1)
    assert config.train.samples == 8 * 500_000
    assert config.optimizer.decay_samples == 8 * 320_000
    assert config.optimizer.warmup_samples == 8 * 3_200
    assert config.train.loss_scale.initial == 2.0**32
    assert (config.train.eval_interval, config.train.eval_samples) == (1000, 80)
    assert (config.engine.name, config.parallel.zero) == ("torch", 0)
    assert "ByteLevelBPETokenizer" in block(text, "To do before the run")


def test_zero3_hands_its_offloading_on_and_tells_the_rest(tmp_path: Path) -> None:
    config, text = of_script("zero3-offload.sh", tmp_path)
    assert (config.engine.name, config.parallel.zero, config.parallel.data) == ("deepspeed", 3, 4)
    assert config.engine.deepspeed == {
        "zero_optimization": {
            "contiguous_gradients": True,
            "overlap_comm": True,
            "stage3_param_persistence_threshold": 100000,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "offload_param": {"device": "cpu", "pin_memory": True},
        },
        "flops_profiler": {"enabled": False},
    }
    for name in (
        "scheduler.type",
        'zero_optimization.reduce_bucket_size "auto"',
        "--remote-device",
    ):
        assert name in lost(text)
    assert config.train.samples == round(3e9 / 1024)
    assert config.optimizer.warmup_samples == round(3e7 / 1024)
    assert (config.model.activation, config.model.tie_embeddings) == ("swiglu", False)
    assert (config.data.split, config.train.eval_interval) == ((98, 2, 0), 1000)


# More flags, and what they make of options.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "defaults of the original": (
        "",
        {**DEFAULTS, "train.dtype": "fp32", "train.eval_samples": 800},
    ),
    "bf16": ("--bf16", {"train.dtype": "bf16"}),
    "fp16 and its scale": (
        "--fp16 --initial-loss-scale 65536 --min-loss-scale 2 --loss-scale-window 500 "
        "--hysteresis 3",
        {
            "train.dtype": "fp16",
            "train.loss_scale": {"initial": 65536, "minimum": 2, "window": 500, "hysteresis": 3},
        },
    ),
    "ramp-up": (
        "--rampup-batch-size 4 2 1_00",
        {"train.rampup": {"start": 4, "increment": 2, "samples": 100}},
    ),
    "alibi, norm and deviation": (
        "--position-embedding-type alibi --embed-layernorm --init-method-std 0.0048",
        {
            "model.position_embedding": "alibi",
            "model.embedding_layernorm": True,
            "model.init_std": 0.0048,
        },
    ),
    "rotary": ("--position-embedding-type rotary", {"model.position_embedding": "rotary"}),
    "gate": (
        "--glu-activation geglu --no-bias-gelu-fusion --ffn-hidden-size 96",
        {"model.activation": "geglu", "model.ffn_hidden_size": 96},
    ),
    "untied": ("--untie-embeddings-and-output-weights", {"model.tie_embeddings": False}),
    "optimizer": (
        "--adam-beta1 0.8 --adam-beta2 0.95 --adam-eps 1e-7 --weight-decay 0.1 --clip-grad 0.5 "
        "--min-lr 1e-5",
        {
            "optimizer.beta1": 0.8,
            "optimizer.beta2": 0.95,
            "optimizer.eps": 1e-7,
            "optimizer.weight_decay": 0.1,
            "optimizer.max_grad_norm": 0.5,
            "optimizer.min_lr": 1e-5,
        },
    ),
    "no clipping": ("--clip-grad 0", {"optimizer.max_grad_norm": 0}),
    "schedule in samples": (
        "--lr-decay-style cosine --lr-decay-samples 700 --lr-warmup-samples 70",
        {
            "optimizer.decay": "cosine",
            "optimizer.decay_samples": 700,
            "optimizer.warmup_samples": 70,
        },
    ),
    "decay in tokens": ("--lr-decay-tokens 16000", {"optimizer.decay_samples": 500}),
    "tokens win over samples": (
        "--lr-decay-samples 700 --lr-decay-tokens 16000",
        {"optimizer.decay_samples": 500},
    ),
    "fraction of the run": ("--lr-warmup-fraction 0.01", {"optimizer.warmup_samples": 8}),
    "recomputation": ("--checkpoint-activations", {"train.recompute": "full"}),
    "selective recomputation": (
        "--recompute-granularity selective",
        {"train.recompute": "selective"},
    ),
    "one dataset": ("--data-path data/a", {"data.paths": {"data/a": 1.0}}),
    "weights": (
        "--data-path 0.3 data/a 0.7 data/b 0.5 data/a --split 949,50,1",
        {"data.paths": {"data/a": 0.8, "data/b": 0.7}, "data.split": [949, 50, 1]},
    ),
    "split with blanks, in two": ("--split '90, 10'", {"data.split": [90, 10, 0]}),
    "training alone": ("--split 1", {"data.split": [1, 0, 0], "train.eval_interval": 0}),
    "resets": (
        "--reset-attention-mask --reset-position-ids --eod-mask-loss "
        "--tokenizer-type PretrainedFromHF --tokenizer-name-or-path ./mine",
        {
            "data.reset_attention_mask": True,
            "data.reset_position_ids": True,
            "data.eod_mask_loss": True,
            "data.tokenizer": "mine",
        },
    ),
    "resets without a tokenizer": ("--eod-mask-loss", {"data.tokenizer": "tokenizer.json"}),
    "evaluation": (
        "--eval-interval 50 --eval-iters 3",
        {"train.eval_interval": 50, "train.eval_samples": 24},
    ),
    "no evaluation": ("--eval-iters 0", {"train.eval_interval": 0}),
    "saves": (
        "--save runs/a --load runs/a --save-interval 5",
        {"folder": "runs/a", "checkpoint.save_interval": 5},
    ),
    "stop": ("--exit-interval 7", {"train.stop_at_step": 7}),
    "padding": ("--make-vocab-size-divisible-by 64", {"model.vocab_padding_multiple": 64}),
    "seed": ("--seed 42", {"train.seed": 42}),
    "interleaved": (
        "--num-layers 8 --pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 1",
        {"parallel.schedule": "interleaved_1f1b", "parallel.chunks": 2},
    ),
    "partition": (
        "--pipeline-model-parallel-size 2 --pp-partition-method 'type:transformer|embedding'",
        {"parallel.partition": "count"},
    ),
    "ZeRO without DeepSpeed": ("--zero-stage 1", {"parallel.zero": 0, "engine.name": "torch"}),
    "the last of a name": ("--lr 1e-2 --lr=1e-4", {"optimizer.lr": 1e-4}),
}


@pytest.mark.parametrize("name", CASES)
def test_flags_become_options(name: str) -> None:
    more, options = CASES[name]
    migrated = translate(original(more))
    values = config_to_dict(migrated.config)
    assert {option: get(values, option) for option in options} == options
    assert migrated.notes.of("lost") == []


def get(values: dict[str, Any], option: str) -> Any:
    for key in option.split("."):
        values = values[key]
    return values


def test_iterations_and_tokens_are_samples() -> None:
    flags = SHORTEST.replace("--train-samples 800", "")
    iterations = "--train-iters 100 --lr-decay-iters 90 --lr-warmup-iters 10"
    settings = gather(original(iterations, flags=flags)).settings
    assert settings["train.samples"] == 800
    assert settings["optimizer.decay_samples"] == 720
    assert settings["optimizer.warmup_samples"] == 80
    assert gather(original("--train-tokens 25600", flags=flags)).settings["train.samples"] == 800
    # The original stops by samples where both are given.
    run = gather(original("--train-tokens 320"))
    assert run.settings["train.samples"] == 800
    assert "--train-tokens 320" in notes(run, "not needed")


def test_global_batch_may_be_that_of_the_ranks() -> None:
    flags = SHORTEST.replace("--global-batch-size 8", "--tensor-model-parallel-size 2")
    config = translate(original("", flags=flags, world_size=8)).config
    assert (config.train.global_batch_size, config.parallel.data) == (8, 4)
    with pytest.raises(ConfigError, match="--global-batch-size is missing.* --world_size"):
        gather(original("", flags=flags))


def test_size_of_the_vocabulary_is_asked_for() -> None:
    run = gather(original("--pad-vocab-size-to 512", vocab_size=None))
    assert run.settings["model.vocab_size"] == 512
    assert "give it with --vocab_size" in notes(run, "different")
    assert gather(original("--pad-vocab-size-to 512")).settings["model.vocab_size"] == 509
    with pytest.raises(ConfigError, match="size of the vocabulary.* give the size with --vocab_si"):
        gather(original("--vocab-file none.json --merge-file none.txt", vocab_size=None))


def test_vocabulary_is_counted_where_the_tokenizer_is(tmp_path: Path, tokenizer_file: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "<|endoftext|>": 2}))
    more = "--vocab-file vocab.json --merge-file merges.txt --vocab-extra-ids 4"
    run = gather(original(more, vocab_size=None, folder=tmp_path))
    assert run.settings["model.vocab_size"] == 7
    more = f"--tokenizer-type PretrainedFromHF --tokenizer-name-or-path {tokenizer_file}"
    run = gather(original(more, vocab_size=None))
    assert run.settings["model.vocab_size"] == load_tokenizer(tokenizer_file).vocab_size
    assert run.settings["data.tokenizer"] == str(tokenizer_file)
    assert "data.tokenizer" not in notes(run, "to do")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--made-up 3", "--made-up 3: no flag of Megatron-DeepSpeed that is known here"),
        ("--optimizer sgd", "--optimizer sgd: the optimizer is AdamW"),
        ("--no-bias-gelu-fusion", "--no-bias-gelu-fusion: GELU is its tanh form"),
        ("--kv-channels 32", "--kv-channels 32: another model"),
        ("--max-position-embeddings 64", "--max-position-embeddings 64: learned positions"),
        ("--fp16 --loss-scale 128", "--loss-scale 128: the scale follows overflows"),
        ("--dataloader-type cyclic", "--dataloader-type cyclic: samples are taken in the order"),
        ("--data-impl lazy", "--data-impl lazy: only memory-mapped files"),
        ("--load other --save mine", "--load other: saves of the original are not read"),
        ("--test-weighted-split-paths 'T: 1 0:1 a'", "--test-weighted-split-paths"),
        (
            "--train-weighted-split-paths 'T: 1 0:0.9 a' --valid-weighted-split-paths 'V: 1 0:1 b'",
            "--valid-weighted-split-paths V: 1 0:1 b: validation takes the documents after",
        ),
        ("--train-weighted-split-paths 'T: 1 0.5:1 a'", "gives its first documents"),
        (
            "--pipeline-model-parallel-size 2 --pp-partition-method type:transformer",
            "--pp-partition-method type:transformer: parallel.partition cost",
        ),
        ("--skip-train-iteration-range 5-10", "--skip-train-iteration-range 5-10: all samples"),
    ],
)
def test_what_is_lost_is_named_with_the_reason(more: str, words: str) -> None:
    assert words in notes(gather(original(more)), "lost")


def test_words_without_a_flag_are_named() -> None:
    run = gather(original("", flags=f"stray {SHORTEST}"))
    assert notes(run, "lost") == "stray: no flag stands before it"


@pytest.fixture
def own_defaults() -> dict[str, Any]:
    """The values of all options, where only the necessary ones are given."""
    model = {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "vocab_size": 9, "seq_length": 8}
    train = {"samples": 8, "global_batch_size": 8}
    return config_to_dict(config_from_dict({"folder": "run", "model": model, "train": train}))


@pytest.mark.parametrize(
    "option",
    sorted(
        {meaning.option for meaning in FLAGS.values() if isinstance(meaning, Same | Switch)}
        | {same.option for same in SAME.values()}
    ),
)
def test_tables_name_options_that_there_are(option: str, own_defaults: dict[str, Any]) -> None:
    get(own_defaults, option)


def test_only_defaults_that_differ_are_written(own_defaults: dict[str, Any]) -> None:
    alike = [option for option, value in DEFAULTS.items() if get(own_defaults, option) == value]
    assert alike == []


def test_deepspeed_is_taken_with_what_belongs_to_it_alone() -> None:
    given = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2, "overlap_comm": True},
        "bf16": {"enabled": True},
        "fp16": {"enabled": False, "loss_scale_window": 77},
        "activation_checkpointing": {"partition_activations": True},
        "steps_per_print": 5,
    }
    migrated = translate(original("--zero-stage 2", given))
    config, lost = migrated.config, notes(migrated, "lost")
    assert (config.engine.name, config.parallel.zero, config.train.dtype) == (
        "deepspeed",
        2,
        "bf16",
    )
    assert config.engine.deepspeed == {
        "zero_optimization": {"overlap_comm": True},
        "steps_per_print": 5,
    }
    assert "partition_activations of DeepSpeed's JSON: train.recompute decides it here" in lost
    assert 'train_micro_batch_size_per_gpu "auto"' in lost


def test_what_deepspeed_cannot_do_is_left_to_the_own_engine() -> None:
    given = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}, "steps_per_print": 5}
    migrated = translate(original("--pipeline-model-parallel-size 2", given))
    assert (migrated.config.engine.name, migrated.config.parallel.zero) == ("torch", 2)
    assert "--deepspeed: this project's own engine does it" in notes(migrated, "lost")
    assert "steps_per_print of DeepSpeed's JSON" in notes(migrated, "lost")


def test_clipping_that_the_original_does_not_do_is_told() -> None:
    run = gather(original("--clip-grad 0.5", {"zero_optimization": {"stage": 1}}))
    assert "optimizer.max_grad_norm" in notes(run, "different")


def test_layout_that_does_not_fit_the_batches_is_told() -> None:
    more = "--rampup-batch-size 2 2 100 --pipeline-model-parallel-size 2"
    migrated = translate(original(more, world_size=4))
    assert migrated.config.parallel.data == 2
    assert "the layout on 4 ranks is refused: every batch of train.rampup" in notes(
        migrated, "to do"
    )


def test_json_that_is_not_there_is_asked_for() -> None:
    run = gather(original("--deepspeed --deepspeed_config ds.json --fp16"))
    assert "--deepspeed_config ds.json: that file is not here" in notes(run, "to do")


@pytest.mark.parametrize(
    ("more", "given", "words"),
    [
        ("--zero-stage 1", {"zero_optimization": {"stage": 2}}, ["--zero-stage 1", "stage 2"]),
        ("--clip-grad 0.5", {"gradient_clipping": 1}, ["--clip-grad 0.5", "gradient_clipping 1"]),
        ("", {"train_batch_size": 16}, ["--global-batch-size 8", "train_batch_size 16"]),
        (
            "",
            {"train_micro_batch_size_per_gpu": 1},
            ["--micro-batch-size 2", "train_micro_batch_size_per_gpu 1"],
        ),
        ("--bf16", {"fp16": {"enabled": True}}, ["--bf16", "fp16.enabled true"]),
        ("--fp16", {"fp16": {"enabled": False}}, ["--fp16", "fp16.enabled false"]),
        (
            "--fp16 --initial-loss-scale 1024",
            {"fp16": {"enabled": True, "initial_scale_power": 12}},
            ["--initial-loss-scale 1024", "fp16.initial_scale_power 12"],
        ),
        ("", {"optimizer": {"params": {"lr": 1}}}, ["--lr 1e-3", "optimizer.params.lr 1"]),
        (
            "--adam-beta2 0.95",
            {"optimizer": {"params": {"betas": [0.9, 0.999]}}},
            ["--adam-beta2 0.95", "optimizer.params.betas [0.9, 0.999]"],
        ),
    ],
)
def test_contradictions_name_both_sides(more: str, given: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError, match="contradicts") as error:
        gather(original(more, given))
    assert [word for word in words if word not in str(error.value)] == []


def test_accumulation_is_compared_with_the_ranks() -> None:
    given = {"gradient_accumulation_steps": 4, "zero_optimization": {"stage": 1}}
    with pytest.raises(ConfigError, match="gradient_accumulation_steps 4.* batches of 16"):
        gather(original("", given, world_size=2))
    given["gradient_accumulation_steps"] = 2
    assert gather(original("", given, world_size=2)).settings["parallel.data"] == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--num-layers 2", "--hidden-size is missing"),
        (SHORTEST.replace("--lr 1e-3", ""), "--lr is missing"),
        (
            SHORTEST.replace("--train-samples 800", ""),
            "--train-samples or --train-iters is missing",
        ),
        (f"{SHORTEST} --train-iters 5", "--train-iters contradicts --train-samples"),
        (f"{SHORTEST} --fp16 --bf16", "--fp16 contradicts --bf16"),
        (f"{SHORTEST} --seed many", "--seed must be a whole number, got 'many'"),
        (f"{SHORTEST} --lr-decay-style fast", "must be one of constant, linear, cosine"),
        (f"{SHORTEST} --seed", "--seed must have one value"),
        (f"{SHORTEST} --fp16 true", "--fp16 has no value"),
        (f"{SHORTEST} --rampup-batch-size 4 2", "must have three values"),
        (f"{SHORTEST} --data-path 1 a 2", "weights and prefixes in turn"),
        (f"{SHORTEST} --train-weighted-split-paths a", "NAME: WEIGHT START:END PATH"),
        (f"{SHORTEST} --tensor-model-parallel-size 3", "model.num_heads"),
    ],
)
def test_what_is_wrong_with_the_flags_is_told(flags: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        translate(original("", flags=flags))


def test_files_of_groups_are_read(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text('"TRAIN: 0.4 0:0.9 a, 0.6 0:0.9 b"\n')
    (tmp_path / "run.sh").write_text(
        f"python pretrain_gpt.py {SHORTEST} --train-weighted-split-paths-path train.txt"
    )
    config, _ = migrate(["--script", str(tmp_path / "run.sh"), *VOCAB], tmp_path)
    assert config.data.paths == {"a": 0.4, "b": 0.6}
    assert config.data.split == (0.9, 0, 0.1)


# A script without its last line, and what then stands after --flag.
VALUES = {
    "A=1": ("$A", ["1"]),
    "export A=1": ("${A}", ["1"]),
    "A=1 # one": ("$A", ["1"]),
    "A='1 2'": ("$A", ["1", "2"]),
    'A="1 2"': ('"$A"', ["1 2"]),
    "A=1; A+=2": ("$A", ["12"]),
    "A=(1 '2 3')\nA+=(4)": ('"${A[@]}"', ["1", "2 3", "4"]),
    "A=(\n  1  # one\n  2\n)": ("${A[@]}", ["1", "2"]),
    "B=3\nA=$((2 * (B + 1)))": ("$A", ["8"]),
    "B=3; A=$(( ${B} * 4 / 5 ))": ("$A", ["2"]),
    ": nothing": ("${A:-7}", ["7"]),
    "": ("x \\\n  y", ["x", "y"]),
    'A="a\'b"': ("'$A'", ["$A"]),
    'B=/x; A="$B\\$C"': ("$A", ["/x$C"]),
    "if true; then A=1; else A=1; fi; A=2": ("$A", ["2"]),
}


@pytest.mark.parametrize("script", VALUES)
def test_variables_have_the_values_of_a_shell(script: str) -> None:
    word, values = VALUES[script]
    (launch,) = read_script(
        f"{script}\npython pretrain_gpt.py --num-layers 2 --flag {word}", {}
    ).launches
    assert launch.arguments == ("--num-layers", "2", "--flag", *values)


@pytest.mark.parametrize(
    ("script", "part"),
    [
        ("", "$A"),
        ("if [[ $B == 1 ]]; then A=1; elif [[ $B == 2 ]]; then A=2; fi", "$A"),
        ("[ -z $B ] && A=1", "$A"),
        ("A=$(date +%d)", "$(date +%d)"),
        ("A=`nproc`", "`nproc`"),
        ("A=${B%.*}", "${B%.*}"),
        ("A=$((B + 1))", "$((B + 1))"),
    ],
)
def test_what_only_a_shell_knows_stays_open_unless_given(
    script: str, part: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.sh"
    path.write_text(f"{script}\npython pretrain_gpt.py {SHORTEST} --seed $A")
    with pytest.raises(ConfigError) as error:
        migrate(["--script", str(path), *VOCAB], tmp_path)
    assert f"--seed {part}: {part} has no value in the script" in str(error.value)
    config, _ = migrate(["--script", str(path), *VOCAB, "--set", "A=5"], tmp_path)
    assert config.train.seed == 5
    config, _ = migrate(["--script", str(path), *VOCAB, "--", "--seed", "6"], tmp_path)
    assert config.train.seed == 6


@pytest.mark.parametrize(
    ("start", "more", "use"),
    [
        ("A='{}'", 'A="$A --fp16"', "$A"),
        ("A=({})", "A+=(--fp16)", '"${{A[@]}}"'),
    ],
)
def test_flags_that_a_condition_may_add_are_told(
    start: str, more: str, use: str, tmp_path: Path
) -> None:
    script = f"{start}\nif [[ $B ]]; then {more}; fi\npython pretrain_gpt.py {use}\n"
    path = tmp_path / "run.sh"
    path.write_text(script.format(SHORTEST))
    config, text = migrate(["--script", str(path), *VOCAB, "--", "--seed", "7"], tmp_path)
    assert (config.model.num_layers, config.train.seed, config.train.dtype) == (2, 7, "fp32")
    assert "--$A: more flags under a condition; give them after --" in block(text, "To do before")
    assert "--$A" not in lost(text)


def test_nothing_of_a_script_is_executed(tmp_path: Path) -> None:
    made = tmp_path / "made"
    (tmp_path / "run.sh").write_text(
        f"A=$(touch {made})\ntouch {made}\nB=`touch {made}`\neval 'touch {made}'\n"
        f"C=$((__import__('os').system('touch {made}')))\n"
        f"python pretrain_gpt.py {SHORTEST} --save $A$B$C"
    )
    migrate(["--script", str(tmp_path / "run.sh"), *VOCAB], tmp_path)
    assert not made.exists()


def test_here_documents_are_files() -> None:
    script = read_script(
        "A=1\ncat <<EOT > a.json\n{$A\n}\nEOT\ncat > b.json <<'END'\n$A\nEND\n"
        "cat <<-X >$C.json\n\tlast\n\tX\n",
        {},
    )
    files = {shown(name): text for name, text in script.files.items()}
    assert files == {"a.json": "{1\n}\n", "b.json": "$A\n", "$C.json": "\tlast\n"}
    assert [open_parts(name) for name in script.files] == [[], [], ["$C"]]


def test_commands_are_found_inside_strings_and_before_pipes() -> None:
    text = "CMD='pretrain_gpt.py --num-layers $N'; N=3\n"
    text += "export LAUNCHER='python -u'\n"
    runs = {
        'srun bash -c "python $CMD" 2>&1 | tee log': "3",
        "eval python $CMD &>> log": "3",
        "python $CMD > log": "$N",
        "srun sh -c '$LAUNCHER $CMD'": "$N",
        'if true; then CMD="$CMD"; eval $CMD; fi': "3",
    }
    for run, value in runs.items():
        launch = read_script(text + run, {}).launches[-1]
        assert launch.arguments == ("--num-layers", value)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo hello", "no command in it runs a .py program with --num-layers"),
        (f"python pretrain_bert.py {SHORTEST}", "runs pretrain_bert.py, which does not train"),
    ],
)
def test_scripts_that_train_no_gpt_are_refused(script: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "run.sh").write_text(script)
    with pytest.raises(ConfigError, match=words):
        migrate(["--script", str(tmp_path / "run.sh"), *VOCAB], tmp_path)


def test_several_commands_that_differ_are_told(tmp_path: Path) -> None:
    (tmp_path / "run.sh").write_text(
        f"python pretrain_gpt.py {SHORTEST}\npython pretrain_gpt.py {SHORTEST} --seed 5\n"
    )
    config, text = migrate(["--script", str(tmp_path / "run.sh"), *VOCAB], tmp_path)
    assert config.train.seed == 5
    assert "the last of 2" in block(text, "Not as in the original")


def plausible(name: str) -> str:
    """A flag with a value that its kind takes."""
    meaning = FLAGS[name]
    if isinstance(meaning, Switch):
        return f"--{name}"
    for value in ("2", "cosine", "alibi", "swiglu", "full"):
        try:
            if isinstance(meaning, Same):
                meaning.read(value)
            return f"--{name} {value}"
        except ValueError:
            continue
    raise AssertionError(f"no value for --{name}")


# Flags whose values have a form of their own, or that others exclude.
FORMS = {
    "rampup-batch-size": "--rampup-batch-size 4 2 8",
    "train-weighted-split-paths": "--train-weighted-split-paths 'T: 1 0:1 a'",
    "valid-weighted-split-paths": "--valid-weighted-split-paths 'V: 1 0:1 a'",
    "encoder-seq-length": "--encoder-seq-length 32",
}
EXCLUDED = ("deepspeed", "train-iters")


def test_no_flag_is_dropped_silently() -> None:
    for name in FLAGS:
        if name in EXCLUDED:
            continue
        run = gather(original(FORMS.get(name) or plausible(name)))
        said = [setting.source for _, setting in run.settings.items()]
        said += [note.name for note in run.notes.all]
        assert any(f"--{name}" in text for text in said), name


def test_comments_beside_options_say_where_they_come_from(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main([*VOCAB, "--", *SHORTEST.split()])
    text = capsys.readouterr().out
    beside = dict(line.split(" # ") for line in text.splitlines() if " # " in line)
    found = {" ".join(option.split()): source for option, source in beside.items()}
    assert found["num_layers: 2"] == "--num-layers 2"
    assert found["beta2: 0.999"] == "the original's default"
    assert found["folder: runs/run"] == "a stand-in"
    assert config_from_dict(yaml.safe_load(text)).model.num_layers == 2


def test_a_config_that_is_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("mine")
    with pytest.raises(ConfigError, match="--output: .*run.yaml exists already"):
        main(["--output", str(tmp_path / "run.yaml"), *VOCAB, "--", *SHORTEST.split()])
    assert (tmp_path / "run.yaml").read_text() == "mine"


def test_error_is_one_message_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"train_batch_size": 16}')
    argv = [*VOCAB, "--deepspeed", str(tmp_path / "ds.json"), "--", *SHORTEST.split()]
    command = [sys.executable, "-m", "tools.migrate_config", *argv, "--deepspeed"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "--global-batch-size 8" in line
    assert "train_batch_size 16" in line
