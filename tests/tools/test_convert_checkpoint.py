"""The export opens in transformers and is the checkpoint's model, or does not appear."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomForCausalLM

from megatron.checkpoint.huggingface import write_weights
from megatron.checkpoint.load import CheckpointReader
from megatron.config import ModelConfig
from megatron.errors import CheckpointError, ConfigError, DataError, DiskError, NonFiniteError
from megatron.inference import export
from megatron.tokenizer import load_tokenizer
from tests.distributed import run_ranks
from tests.megatron.model.sample import LAST_WEIGHT, save_model, with_options
from tests.megatron.test_tokenizer import make_sentencepiece_file
from tools.convert_checkpoint import main

MODEL = with_options(vocab_size=301)
FILES = ["config.json", "generation_config.json", "model.safetensors"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> dict[int, Path]:
    """By tensor size, the folder of a run with one save. Tests do not change it."""
    folder = tmp_path_factory.mktemp("runs")
    for size in (1, 2):
        run_ranks(size, save_model, folder / str(size), MODEL, tokenizer_file)
    return {size: folder / str(size) for size in (1, 2)}


def save(folder: Path, config: ModelConfig, tokenizer: Path | None = None) -> Path:
    run_ranks(1, save_model, folder, config, tokenizer)
    return folder


def convert(checkpoint: Path, output: Path, *options: str) -> int:
    return main(["to-hf", "--checkpoint", str(checkpoint), "--output", str(output), *options])


def test_export_opens_in_transformers(runs: dict[int, Path], tmp_path: Path) -> None:
    assert convert(runs[1], tmp_path / "hf") == 0
    model = AutoModelForCausalLM.from_pretrained(str(tmp_path / "hf"), local_files_only=True)
    assert isinstance(model, BloomForCausalLM)
    assert model.config.vocab_size == 301
    assert model.get_input_embeddings().weight.shape == (301, 32)
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == 2
    assert model.lm_head.weight is model.get_input_embeddings().weight
    out = model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False)
    assert out.shape[1] > 2


def test_tokenizer_is_exported_with_the_model(
    runs: dict[int, Path], tmp_path: Path, tokenizer_file: Path
) -> None:
    convert(runs[1], tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "hf"), local_files_only=True)
    ours = load_tokenizer(tokenizer_file)
    text = "the quick fox\n\tjumps"
    assert tokenizer(text)["input_ids"] == ours.encode(text)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    for role, token in (("unk", "<unk>"), ("bos", "<s>"), ("eos", "</s>"), ("pad", "<pad>")):
        assert config[f"{role}_token_id"] == ours.vocabulary[token]
        assert getattr(tokenizer, f"{role}_token") == token


def test_every_layout_exports_the_same_bytes(runs: dict[int, Path], tmp_path: Path) -> None:
    for size, run in runs.items():
        convert(run, tmp_path / str(size))
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert names == sorted([*FILES, "tokenizer.json", "tokenizer_config.json"])
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_step_folder_is_as_good_as_its_run(runs: dict[int, Path], tmp_path: Path) -> None:
    assert convert(runs[1] / "checkpoints" / "step-00000004", tmp_path / "hf") == 0
    assert (tmp_path / "hf" / "model.safetensors").is_file()


def test_bf16_export_holds_the_rounded_weights(
    runs: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(runs[1], tmp_path / "full")
    capsys.readouterr()
    assert convert(runs[1], tmp_path / "half", "--dtype", "bf16") == 0
    said = capsys.readouterr().out
    assert float(said.rpartition(" ")[2]) <= 1e-5
    full = load_file(tmp_path / "full" / "model.safetensors")
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert full.keys() == half.keys()
    assert all(torch.equal(half[name], full[name].bfloat16()) for name in full)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("number", "dtype"), [(math.nan, "fp32"), (math.inf, "fp32"), (3.4e38, "bf16")]
)
def test_a_weight_that_is_not_finite_is_not_exported(
    tmp_path: Path, number: float, dtype: str
) -> None:
    run_ranks(1, save_model, tmp_path / "run", MODEL, None, number)
    with pytest.raises(
        NonFiniteError, match=f"the weight of {LAST_WEIGHT} is not finite"
    ) as caught:
        convert(tmp_path / "run", tmp_path / "hf", "--dtype", dtype)
    assert caught.value.exit_code == 6
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_untied_head_is_exported(tmp_path: Path) -> None:
    run = save(tmp_path / "run", with_options(tie_embeddings=False))
    assert convert(run, tmp_path / "hf") == 0
    model = BloomForCausalLM.from_pretrained(str(tmp_path / "hf"), local_files_only=True)
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)


def test_model_trained_with_rounded_bias_is_exported(tmp_path: Path) -> None:
    # 12 heads have slopes that are no powers of two: rounding them is seen at any position.
    options = with_options(num_heads=12, hidden_size=36, alibi_precision="bloom_bf16")
    assert convert(save(tmp_path / "run", options), tmp_path / "hf") == 0


def test_run_without_a_tokenizer_is_exported_without_one(tmp_path: Path) -> None:
    assert convert(save(tmp_path / "run", MODEL), tmp_path / "hf") == 0
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == FILES
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["eos_token_id"] is None
    assert (
        json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"] is None
    )


def nothing_but(folder: Path, *names: str) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


def damage_one(reader: CheckpointReader, folder: Path, dtype: torch.dtype) -> None:
    """Write the weights, one of them slightly wrong."""
    write_weights(reader, folder, dtype)
    weights = load_file(folder / "model.safetensors")
    weights["transformer.h.1.mlp.dense_4h_to_h.bias"][3] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def lose_one(reader: CheckpointReader, folder: Path, dtype: torch.dtype) -> None:
    """Write the weights without one, which transformers replaces by random numbers."""
    write_weights(reader, folder, dtype)
    weights = load_file(folder / "model.safetensors")
    del weights["transformer.h.1.mlp.dense_4h_to_h.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def make_nan(reader: CheckpointReader, folder: Path, dtype: torch.dtype) -> None:
    """Write the weights, one of them not a number."""
    write_weights(reader, folder, dtype)
    weights = load_file(folder / "model.safetensors")
    weights["transformer.ln_f.weight"][0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("write", [damage_one, lose_one, make_nan])
def test_export_that_computes_otherwise_is_refused(
    runs: dict[int, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[CheckpointReader, Path, torch.dtype], None],
) -> None:
    monkeypatch.setattr(export, "write_weights", write)
    with pytest.raises(CheckpointError, match="transformers computes other logits"):
        convert(runs[1], tmp_path / "hf")
    nothing_but(tmp_path)


def test_tolerance_decides(runs: dict[int, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="--tolerance is 0.00e"):
        convert(runs[1], tmp_path / "hf", "--tolerance", "0")
    nothing_but(tmp_path)


def test_existing_output_is_refused_and_kept(runs: dict[int, Path], tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    with pytest.raises(ConfigError, match="--output: .*hf exists already"):
        convert(runs[1], tmp_path / "hf")
    nothing_but(tmp_path, "hf")
    nothing_but(tmp_path / "hf")


def test_an_export_is_replaced_where_that_is_asked_for(
    runs: dict[int, Path], tmp_path: Path
) -> None:
    convert(runs[1], tmp_path / "hf", "--dtype", "bf16")
    assert convert(runs[1], tmp_path / "hf", "--overwrite") == 0
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    nothing_but(tmp_path, "hf")


@pytest.mark.parametrize("name", ["notes.txt", "checkpoints/step-00000001/manifest.json"])
def test_only_an_export_is_replaced(runs: dict[int, Path], tmp_path: Path, name: str) -> None:
    path = tmp_path / "hf" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(ConfigError, match="hf: is not an export; --overwrite replaces nothing"):
        convert(runs[1], tmp_path / "hf", "--overwrite")
    assert path.read_text() == "mine"
    nothing_but(tmp_path, "hf")


def test_model_that_is_no_bloom_is_refused(tmp_path: Path) -> None:
    run = save(tmp_path / "run", with_options(position_embedding="rotary"))
    with pytest.raises(ConfigError, match="model.position_embedding must be alibi"):
        convert(run, tmp_path / "hf")
    nothing_but(tmp_path, "run")


def test_sentencepiece_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "spm").mkdir()
    tokenizer = make_sentencepiece_file(tmp_path / "spm" / "tokenizer.model")
    run = save(tmp_path / "run", with_options(vocab_size=320), tokenizer)
    with pytest.raises(DataError, match="sentencepiece model cannot be exported"):
        convert(run, tmp_path / "hf")
    nothing_but(tmp_path, "run", "spm")


def test_output_that_cannot_be_written_is_a_disk_error(
    runs: dict[int, Path], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="cannot be made"):
        convert(runs[1], tmp_path / "file" / "hf")


def test_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run folder"):
        convert(tmp_path, tmp_path / "hf")
