"""The command line that continues texts, on one process and under torchrun."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, BloomForCausalLM

from megatron.commands.export import main as convert
from megatron.commands.generate import main
from megatron.errors import CheckpointError, ConfigError, DataError
from tests.distributed import run_ranks
from tests.megatron.model.sample import save_model, with_options

ROOT = Path(__file__).parents[2]
MODEL = with_options(vocab_size=300)
PROMPTS = ["the quick", "fox"]
GREEDY = ["--greedy", "--max_new_tokens", "9"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    """The folder of a run of two ranks. Tests do not change it."""
    folder = tmp_path_factory.mktemp("run")
    run_ranks(2, save_model, folder, MODEL, tokenizer_file)
    return folder


def generated(capsys: pytest.CaptureFixture[str], run: Path, *options: str) -> str:
    capsys.readouterr()
    assert main(["--checkpoint", str(run), *options]) == 0
    return capsys.readouterr().out


def test_greedy_text_is_that_of_transformers(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(["--checkpoint", str(run), "--output", str(tmp_path / "hf")])
    model = BloomForCausalLM.from_pretrained(str(tmp_path / "hf"), local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "hf"), local_files_only=True)
    want = ""
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        out = model.generate(**inputs, do_sample=False, max_new_tokens=9)
        assert 2 not in out
        want += tokenizer.decode(out[0]) + "\n"
    assert generated(capsys, run, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], *GREEDY) == want


def test_torchrun_on_two_ranks_prints_the_same_once(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--prompt", PROMPTS[0], "--max_new_tokens", "9", "--top_k", "20", "--seed", "3"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    done = subprocess.run(
        [*command, "2", "-m", "tools.generate", "--checkpoint", str(run), *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == generated(capsys, run, *options)


def test_prompts_come_from_a_file(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    given = generated(capsys, run, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], *GREEDY)
    assert generated(capsys, run, "--prompts", str(tmp_path / "prompts.txt"), *GREEDY) == given
    assert given.startswith(PROMPTS[0])


def test_seed_decides_the_text(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [
        generated(capsys, run, "--prompt", "the", "--max_new_tokens", "9", "--seed", seed)
        for seed in ("1", "1", "2")
    ]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_empty_prompt_begins_a_document(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = generated(capsys, run, "--prompt", "", *GREEDY)
    assert text.strip()
    assert "</s>" not in text


def test_no_new_tokens_leave_the_prompt(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generated(capsys, run, "--prompt", "the fox", "--max_new_tokens", "0") == "the fox\n"


def test_sampling_out_of_range_is_refused(run: Path) -> None:
    with pytest.raises(ConfigError, match="top_p must be above 0 and at most 1, got 2.0"):
        main(["--checkpoint", str(run), "--prompt", "a", "--top_p", "2"])


def test_prompts_that_cannot_be_read_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing.txt: cannot be read"):
        main(["--checkpoint", str(run), "--prompts", str(tmp_path / "nothing.txt")])


def run_tool(checkpoint: Path) -> subprocess.CompletedProcess[str]:
    """The tool in a process of its own, which fails in a group of its own."""
    return subprocess.run(
        [sys.executable, "-m", "tools.generate", "--checkpoint", str(checkpoint), "--prompt", "a"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


def test_damaged_checkpoint_exits_with_4(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    file = next(copy.rglob("rank-00001.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    done = run_tool(copy)
    assert done.returncode == CheckpointError.exit_code
    assert f"error: {file}: is damaged" in done.stderr
    assert "Traceback" not in done.stderr


def test_checkpoint_without_a_tokenizer_exits_with_3(tmp_path: Path) -> None:
    run_ranks(1, save_model, tmp_path, MODEL)
    done = run_tool(tmp_path)
    assert done.returncode == DataError.exit_code
    assert "holds no tokenizer" in done.stderr


def test_prompt_is_continued_with_its_own_tokens(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = generated(capsys, run, "--prompt", PROMPTS[1], *GREEDY)
    after_another = generated(capsys, run, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], *GREEDY)
    assert after_another.endswith(alone)
