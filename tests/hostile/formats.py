"""Every format that is read, the places in it, and the programs that read it.

Places are found by walking what a sound file holds, so that a field that is added later is planted
too. A format gives cases; each is a name, what to do to a copy of the specimen, and the command.
"""

import gzip
import hashlib
import io
import json
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron.checkpoint.format import HEAD, TAIL
from megatron.config import config_to_dict, load_config
from megatron.data.indexed_dataset import HEADER
from tests.hostile.canaries import MODULE, Outside, files, pickled, values
from tests.hostile.specimen import DEEPSPEED, FLAGS, build_specimen, run_argv, script
from tests.hostile.walk import at, places, put, put_key

CONFIG, DATA, CHECKPOINT, DISK, PEER = 2, 3, 4, 5, 8
SAVE = "run/checkpoints/step-00000002"
_TAG = "@@tag@@"


@dataclass(frozen=True)
class Case:
    """One canary."""

    format: str
    name: str
    plant: Callable[[Path], object]
    program: str
    arguments: Callable[[Path], list[str]]
    codes: tuple[int, ...]
    env: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.format}, {self.name}, read by {self.program}"


@dataclass(frozen=True)
class Reader:
    """A program that reads a format, and the exit codes that it may refuse it with."""

    program: str
    arguments: Callable[[Path], list[str]]
    codes: tuple[int, ...]

    def given(self, kind: str, name: str, plant: Callable[[Path], object]) -> Case:
        """The case of this program on a copy that ``plant`` has changed."""
        return Case(kind, name, plant, self.program, self.arguments, self.codes)


def _writes(file: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes(content)


def _train(codes: tuple[int, ...], run: str = "run", **changes: object) -> Reader:
    def arguments(folder: Path) -> list[str]:
        here = {name: _here(value, folder) for name, value in changes.items()}
        return run_argv(folder, run, **here)

    return Reader("pretrain_bloom", arguments, codes)


def _here(value: object, folder: Path) -> object:
    return value.replace("FOLDER", str(folder)) if isinstance(value, str) else value


def _tool(program: str, codes: tuple[int, ...], *words: str) -> Reader:
    return Reader(program, lambda folder: [str(_here(word, folder)) for word in words], codes)


FRESH = _train((DATA,), "fresh", train__samples=4, train__eval_interval=0)
RESUME = _train((CHECKPOINT, DATA))
GENERATE = _tool(
    *("generate", (CHECKPOINT, DATA), "--checkpoint", "FOLDER/run"),
    *("--prompt", "w1 w2", "--greedy", "--max_new_tokens", "1"),
)
CONVERT = _tool(
    *("convert_checkpoint", (CHECKPOINT, DATA, CONFIG)),
    *("to-hf", "--checkpoint", "FOLDER/run", "--output", "FOLDER/hf"),
)
VERIFY = _tool("checkpoint", (CHECKPOINT,), "verify", f"FOLDER/{SAVE}")
INSPECT = _tool("checkpoint", (CHECKPOINT,), "inspect", f"FOLDER/{SAVE}")
REPORT = _tool("report", (DATA, DISK), "FOLDER/run")
TOKENIZER = _tool(
    *("train_tokenizer", (DATA,), "--input", "FOLDER/corpus"),
    *("--vocab_size", "300", "--output", "FOLDER/new.json"),
)
MIGRATE = _tool("migrate_config", (CONFIG,), "--script", "FOLDER/train.sh")


def all_cases(specimen: Path, outside: Outside) -> Iterator[Case]:
    """The cases of every format."""
    for of_format in (
        _configs,
        _command_lines,
        _manifests,
        _shards,
        _indices,
        _descriptions,
        _caches,
        _tokenizers,
        _sentencepieces,
        _metrics,
        _corpora,
        _scripts,
        _deepspeed,
        _environments,
        _replaced_files,
    ):
        yield from of_format(specimen, outside)


def _planted(
    kind: str,
    file: str,
    readers: list[Reader],
    load: Callable[[bytes], Any],
    dump: Callable[[Any], bytes],
    specimen: Path,
    outside: Outside,
) -> Iterator[Case]:
    """Each canary at each place of a file; the programs take turns."""
    whole, turn = load((specimen / file).read_bytes()), count()

    def case(name: str, content: Any) -> Case:
        reader = readers[next(turn) % len(readers)]
        return reader.given(kind, f"{file}: {name}", _writes(file, dump(content)))

    for place in places(whole):
        where = ".".join(map(str, place))
        for name, value in values(outside):
            yield case(f"{name} at {where}", put(whole, place, value))
        if isinstance(at(whole, place), dict):
            call = dict(values(outside))["call"]
            yield case(f"call beside {where}", put(whole, place, {**at(whole, place), **call}))
        if isinstance(place[-1], str):
            yield case(f"key at {where}", put_key(whole, place, f"../..{outside.secret}"))


def _configs(specimen: Path, outside: Outside) -> Iterator[Case]:
    config = load_config(run_argv(specimen))
    text = yaml.safe_dump(config_to_dict(config), sort_keys=False)
    (specimen / "run.yaml").write_text(text.replace(str(specimen), "."))
    named = ("--config", "FOLDER/run.yaml")
    readers = [
        _tool("pretrain_bloom", (CONFIG, DATA, CHECKPOINT, DISK), *named, *more)
        for more in ((), ("--dry_run", "80"), ("--print_config",))
    ]
    readers.append(_tool("plan", (CONFIG,), *named, "--cluster", "h100", "--gpus", "1"))
    touch = f'!!python/object/apply:os.system ["touch {outside.mark}"]'

    def dump(value: Any) -> bytes:
        return yaml.safe_dump(value).replace(_TAG, touch).encode()

    yield from _planted("config", "run.yaml", readers, yaml.safe_load, dump, specimen, outside)
    whole = yaml.safe_load((specimen / "run.yaml").read_text())
    for number, place in enumerate(places(whole)):
        reader, content = readers[number % len(readers)], dump(put(whole, place, _TAG))
        yield reader.given("YAML tag", ".".join(map(str, place)), _writes("run.yaml", content))
    for name, text in _yaml_texts(outside).items():
        for reader in readers:
            yield reader.given("YAML text", name, _writes("run.yaml", text.encode()))


def _yaml_texts(outside: Outside) -> dict[str, str]:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12))
    merges = "a0: &a0 {x: 1}\n"
    merges += "".join(f"a{n}: &a{n} {{p: *a{n - 1}, q: *a{n - 1}}}\n" for n in range(1, 40))
    return {
        "aliases": bomb,
        "merges": merges,
        "itself": "data: &a {paths: *a}",
        "deep flow": "data: " + "[" * 100_000,
        "deep blocks": "".join(" " * n + "a:\n" for n in range(900)),
        "long number": f"train: {{samples: {'1' * 10_000}}}",
        "key twice": "folder: a\nfolder: b\n",
        "section twice": "train: {seed: 1}\ntrain: {seed: 2}\n",
        "number as key": "1: 2\n",
        "binary": "folder: !!binary aGFsbG8=\n",
        "another file": f"model: {outside.secret}\n",
        "include": f"__default_config__: {outside.secret}\n",
        "module": f"folder: !!python/module:{MODULE}\n",
        "new object": f"folder: !!python/object/new:{MODULE}.Thing {{}}\n",
    }


def _command_lines(specimen: Path, outside: Outside) -> Iterator[Case]:
    names = [
        ".".join(map(str, place))
        for place in places(config_to_dict(load_config(run_argv(specimen))))
    ]
    chosen = ("call", "import", "shell", "deep", "huge", "escapes")
    given = {name: json.dumps(value) for name, value in values(outside) if name in chosen}
    for name in [
        *names,
        "engine.deepspeed.x",
        "engine.deepspeed.zero_optimization.y",
        "x",
        "config",
    ]:
        for kind, text in given.items():
            yield _command(f"{kind} for {name}", f"--{name}", text)
        yield _command(f"class for {name}", f"--{name}.class_path", "os.system")
        yield _command(
            f"call for {name}",
            *(f"--{name}.class_path", "os.system"),
            *(f"--{name}.init_args.command", f"touch {outside.mark}"),
        )


def _command(name: str, *words: str) -> Case:
    return Case(
        "command line",
        name,
        lambda folder: None,
        "pretrain_bloom",
        lambda folder: [*run_argv(folder), *words],
        (CONFIG, DATA, CHECKPOINT, DISK),
    )


def _manifests(specimen: Path, outside: Outside) -> Iterator[Case]:
    def load(data: bytes) -> Any:
        return json.loads(b"{" + data[len(HEAD) + 64 + len(TAIL) :])

    def dump(value: Any) -> bytes:
        # Somebody who writes it by hand makes the hash fit.
        body = json.dumps(value, separators=(",", ":")).encode()[1:]
        return HEAD + hashlib.sha256(body).hexdigest().encode() + TAIL + body

    readers = [RESUME, GENERATE, CONVERT, INSPECT, VERIFY]
    yield from _planted("manifest", f"{SAVE}/manifest.json", readers, load, dump, specimen, outside)


def _shards(specimen: Path, outside: Outside) -> Iterator[Case]:
    def load(data: bytes) -> Any:
        size = int.from_bytes(data[:8], "little")
        return json.loads(data[8 : 8 + size])

    file = f"{SAVE}/rank-00000.safetensors"
    data = (specimen / file).read_bytes()
    tensors = data[8 + int.from_bytes(data[:8], "little") :]

    def dump(value: Any) -> bytes:
        header = json.dumps(value).encode()
        return len(header).to_bytes(8, "little") + header + tensors

    whole, reseal = load(data), _resealed(specimen)
    for number, place in enumerate(places({name: whole[name] for name in list(whole)[:2]})):
        for name, value in values(outside):
            content = dump(put(whole, place, value))
            yield _shard(f"{name} at {place}", number, lambda f, c=content: reseal(f, file, c))
    for size in (0, 1, len(data), 2**31, 2**62, 2**64 - 1):
        content = size.to_bytes(8, "little") + data[8:]
        yield _shard(f"header of {size} bytes", size, lambda f, c=content: reseal(f, file, c))
    yield _shard("pickle", 0, lambda f: reseal(f, file, pickled(outside)))


def _shard(name: str, number: int, plant: Callable[[Path], object]) -> Case:
    reader = (RESUME, GENERATE, VERIFY, CONVERT)[number % 4]
    return reader.given("shard", name, plant)


def _resealed(specimen: Path) -> Callable[[Path, str, bytes], None]:
    """Puts a file into a save, with a manifest whose sizes and hashes fit it."""

    def reseal(folder: Path, file: str, content: bytes) -> None:
        (folder / file).write_bytes(content)
        path = folder / SAVE / "manifest.json"
        data = path.read_bytes()
        fields = json.loads(b"{" + data[len(HEAD) + 64 + len(TAIL) :])
        digest = hashlib.sha256(hashlib.sha256(content).digest()).hexdigest()
        name = Path(file).relative_to(SAVE).as_posix()
        fields["files"][name] = {"bytes": len(content), "hash": digest}
        body = json.dumps(fields, separators=(",", ":")).encode()[1:]
        path.write_bytes(HEAD + hashlib.sha256(body).hexdigest().encode() + TAIL + body)

    return reseal


def _indices(specimen: Path, outside: Outside) -> Iterator[Case]:
    data = (specimen / "text.idx").read_bytes()
    sequences = HEADER.unpack_from(data)[3]
    fields = {
        "magic": (0, "<Q"),
        "version": (9, "<Q"),
        "dtype": (17, "<B"),
        "sequences": (18, "<Q"),
        "documents": (26, "<Q"),
        "length": (34, "<i"),
        "pointer": (34 + 4 * sequences, "<q"),
        "boundary": (34 + 12 * sequences, "<q"),
        "last boundary": (len(data) - 8, "<q"),
    }
    for name, (offset, kind) in fields.items():
        bits = 8 * struct.calcsize(kind)
        for value in (0, 1, 2 ** (bits - 1), 2**bits - 1, 2 ** (bits // 2)):
            content = bytearray(data)
            content[offset : offset + bits // 8] = value.to_bytes(bits // 8, "little")
            yield FRESH.given("index", f"{name} {value}", _writes("text.idx", bytes(content)))


def _descriptions(specimen: Path, outside: Outside) -> Iterator[Case]:
    names = ("dataset", "tokenizer", "vocab_size", "largest_token", "documents", "tokens")
    values_of = {name: "0" * 32 if name in names[:2] else 7 for name in (*names, "utf8_bytes")}
    (specimen / "text.json").write_text(json.dumps(values_of))
    cases = list(
        _planted("description", "text.json", [FRESH], json.loads, _json, specimen, outside)
    )
    (specimen / "text.json").unlink()
    yield from cases


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _caches(specimen: Path, outside: Outside) -> Iterator[Case]:
    for path in sorted(specimen.glob("*.npy")):
        for name, content in _hostile_arrays(path.read_bytes(), outside):
            yield FRESH.given("kept array", f"{path.name}: {name}", _writes(path.name, content))


def _hostile_arrays(data: bytes, outside: Outside) -> Iterator[tuple[str, bytes]]:
    objects = io.BytesIO()
    np.save(objects, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    yield "objects", objects.getvalue()
    start = data[:10]
    size = int.from_bytes(data[8:10], "little")
    for name, header in {
        "pickled": "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
        "huge": "{'descr': '<i8', 'fortran_order': False, 'shape': (4611686018427387904,), }",
        "negative": "{'descr': '<i8', 'fortran_order': False, 'shape': (-1,), }",
        "call": f"__import__('os').system('touch {outside.mark}')",
        "deep": "(" * 5000,
        "dtype": f"{{'descr': '{MODULE}', 'fortran_order': False, 'shape': (1,), }}",
    }.items():
        text = header.ljust(size)[: max(size, len(header))].encode()
        yield name, start[:8] + len(text).to_bytes(2, "little") + text + pickled(outside)
    yield "a pickle alone", pickled(outside)


def _tokenizers(specimen: Path, outside: Outside) -> Iterator[Case]:
    alone = _train((DATA, CONFIG), "fresh", train__samples=4, train__eval_interval=0)
    of_folder = _train(
        *((DATA, CONFIG), "fresh"),
        train__samples=4,
        train__eval_interval=0,
        data__tokenizer="FOLDER/tok",
    )
    for kind, file, reader in (
        ("tokenizer.json", "tokenizer.json", alone),
        ("tokenizer folder", "tok/tokenizer_config.json", of_folder),
        ("tokenizer folder", "tok/special_tokens_map.json", of_folder),
        ("tokenizer folder", "tok/config.json", of_folder),
    ):
        yield from _planted(kind, file, [reader], json.loads, _json, specimen, outside)
    for name, change in _tokenizer_changes(outside).items():
        config = {**json.loads((specimen / "tok/tokenizer_config.json").read_text()), **change}
        yield of_folder.given(
            "tokenizer folder",
            f"tokenizer_config.json: {name}",
            lambda folder, config=config: _with_code(folder / "tok", config, outside),
        )


def _tokenizer_changes(outside: Outside) -> dict[str, dict[str, Any]]:
    secret = str(outside.secret)
    changes: dict[str, dict[str, Any]] = {
        f"class {name}": {"tokenizer_class": name}
        for name in ("BloomForCausalLM", "Trainer", "pipeline", "os.system", f"{MODULE}.Thing")
    }
    for entry in ("vocab_file", "tokenizer_file", "merges_file", "gguf_file", "spm_file"):
        changes[f"{entry} outside"] = {entry: secret}
    return {
        **changes,
        "code": {"auto_map": {"AutoTokenizer": ["code.Thing", "code.Thing"]}},
        "code of the old form": {"auto_map": ["code.Thing", "code.Thing"]},
        "code elsewhere": {"auto_map": {"AutoTokenizer": [f"{MODULE}.Thing", None]}},
        "inputs": {"init_inputs": [secret]},
        "versioned files": {"fast_tokenizer_files": [f"../..{secret}"]},
        "model file": {"sp_model_kwargs": {"model_file": secret}},
        "template that leaves": {"chat_template": [{"name": f"../..{secret}", "template": "x"}]},
        "templates that leave": {"chat_template": {f"../..{secret}": "x"}},
        "sub-folder": {"subfolder": str(outside.folder)},
    }


def _with_code(folder: Path, config: Any, outside: Outside) -> None:
    (folder / "tokenizer_config.json").write_bytes(_json(config))
    shutil.copy(outside.folder / f"{MODULE}.py", folder / "code.py")


def _sentencepieces(specimen: Path, outside: Outside) -> Iterator[Case]:
    data = (specimen / "spm.model").read_bytes()
    reader = _train((DATA, CONFIG), "fresh", train__samples=4, data__tokenizer="FOLDER/spm.model")
    random = np.random.default_rng(0)
    for number in range(40):
        content = bytearray(data)
        for place in random.integers(0, len(data), 1 + number % 5):
            content[place] = random.integers(256)
        if number % 4 == 0:
            content = content[: random.integers(len(data))]
        plant = _writes("spm.model", bytes(content))
        yield reader.given("sentencepiece model", f"bytes changed, {number}", plant)


def _metrics(specimen: Path, outside: Outside) -> Iterator[Case]:
    lines = (specimen / "run/metrics.jsonl").read_bytes().splitlines()
    first = {json.loads(line)["event"]: number for number, line in enumerate(lines)}
    for event, number in first.items():
        record = json.loads(lines[number])
        record.pop("crc32", None)
        for turn, place in enumerate(places(record)):
            for name, value in values(outside):
                content = _line(put(record, place, value))
                new = b"\n".join([*lines[:number], content, *lines[number + 1 :]]) + b"\n"
                reader = REPORT if turn % 2 == 0 else _train((DATA, CHECKPOINT, DISK))
                where = ".".join(map(str, place))
                plant = _writes("run/metrics.jsonl", new)
                yield reader.given("metrics", f"{event}: {name} at {where}", plant)


def _line(record: Any) -> bytes:
    return json.dumps(record).encode()


def _corpora(specimen: Path, outside: Outside) -> Iterator[Case]:
    lines = (specimen / "corpus/a.jsonl").read_text().splitlines()
    record = json.loads(lines[0])
    for place in places(record):
        for name, value in values(outside):
            text = "\n".join([json.dumps(put(record, place, value)), *lines[1:]]) + "\n"
            yield _corpus(f"{name} at {place}", "a.jsonl", text.encode())
    bomb = gzip.compress(b"\0" * (1 << 30), compresslevel=1)
    for name, content in {
        "one endless line": bomb,
        "pickle": gzip.compress(pickled(outside)),
        "no gzip": b"x" * 100,
        "cut": gzip.compress(lines[0].encode() * 100)[:-9],
    }.items():
        yield _corpus(name, "b.jsonl.gz", content)


def _corpus(name: str, file: str, content: bytes) -> Case:
    return TOKENIZER.given("corpus", f"{file}: {name}", _writes(f"corpus/{file}", content))


def _scripts(specimen: Path, outside: Outside) -> Iterator[Case]:
    touch = f"touch {outside.mark}"
    texts = {
        "substitution": f"$({touch})",
        "backticks": f"`{touch}`",
        "arithmetic": f"$(( $({touch}) + 1 ))",
        "python": f"$(( __import__('os').system('{touch}') ))",
        "power": "$(( 9 * 9 * 9 * 9 ** 9 ** 9 ))",
        "outside": str(outside.secret),
        "above": f"../..{outside.secret}",
        "escapes": "'\x1b[2J\x9b31m'",
        "separator": f"; {touch}; echo",
        "huge": "1e400",
        "digits": "9" * 5000,
        "deep": "$((" + "(" * 3000 + "1" + ")" * 3000 + "))",
        "braces": "${A:-" * 500 + "x" + "}" * 500,
        "not a number": "nan",
    }
    for flag in FLAGS:
        for name, text in texts.items():
            yield _script(f"{name} for --{flag}", script({**FLAGS, flag: text}))
    lines = {
        "source": f"source {outside.secret}",
        "dot": f". {outside.secret}",
        "eval": f'eval "{touch}"',
        "trap": f"trap '{touch}' EXIT",
        "python": f"python -c 'import {MODULE}'",
        "here": f"cat <<EOT > {outside.secret}\n{{}}\nEOT",
        "bomb": "A0=xxxxxxxxxx\n" + "\n".join(f"A{n}=$A{n - 1}$A{n - 1}" for n in range(1, 60)),
        "itself": "A='$A$A'\n" + 'eval "B=$A"\n' * 50,
        "evals": 'A="eval"\n' + "eval " * 3000 + touch,
        "quotes": "'" * 9999,
        "parentheses": "(" * 9999,
        "unclosed": "$(" * 9999,
        "shell in a shell": f"bash -c \"bash -c '{touch}'\"",
    }
    for name, line in lines.items():
        yield _script(f"{name} before the command", script(FLAGS, line))


def _script(name: str, text: str) -> Case:
    return MIGRATE.given("launch script", name, _writes("train.sh", text.encode()))


def _deepspeed(specimen: Path, outside: Outside) -> Iterator[Case]:
    yield from _planted(
        "DeepSpeed's JSON", "ds.json", [MIGRATE], json.loads, _json, specimen, outside
    )
    for name, section in {
        "wandb": {"enabled": True},
        "tensorboard": {"enabled": True, "output_path": str(outside.folder)},
        "csv_monitor": {"enabled": True, "output_path": str(outside.folder)},
        "compile": {"enabled": True, "backend": f"{MODULE}.run"},
        "torch_autocast": {"lower_precision_safe_modules": [f"{MODULE}.Thing"]},
        "flops_profiler": {"enabled": True, "output_file": str(outside.secret)},
        "autotuning": {"enabled": True, "results_dir": str(outside.folder)},
        "x": {"class_path": f"{MODULE}.Thing"},
    }.items():
        text = json.dumps({name: section})
        yield _command(
            f"DeepSpeed's {name}",
            *("--engine.name", "deepspeed", "--parallel.zero", "1", "--engine.deepspeed", text),
        )
    assert "class_path" not in DEEPSPEED


def _environments(specimen: Path, outside: Outside) -> Iterator[Case]:
    sound = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    sound |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29123"}
    reader = _train((CONFIG, PEER), launch__startup_timeout=1.0)
    for variable in sound:
        for name, value in values(outside):
            text = value if isinstance(value, str) else json.dumps(value)
            case = reader.given("environment", f"{name} for {variable}", lambda folder: None)
            yield replace(case, env={**sound, variable: text})


def _replaced_files(specimen: Path, outside: Outside) -> Iterator[Case]:
    """Every file of the specimen, and the folders of a run, replaced by something else."""
    found = [*sorted(path for path in specimen.rglob("*") if path.is_file())]
    found += [specimen / "run/checkpoints", specimen / SAVE, specimen / "run/tensorboard"]
    for path in found:
        file = path.relative_to(specimen).as_posix()
        for reader in _readers_of(file):
            for name, make in files(outside):

                def plant(folder: Path, file: str = file, make: Any = make) -> None:
                    target = folder / file
                    if target.is_dir():
                        shutil.rmtree(target)
                    target.unlink(missing_ok=True)
                    make(target)

                yield reader.given("replaced file", f"{file} by {name}", plant)


def _readers_of(file: str) -> list[Reader]:
    """The programs that read a file of the specimen."""
    if file.startswith("run/checkpoints"):
        return [RESUME, GENERATE, VERIFY]
    if file.startswith("run/"):
        codes = (DATA, CHECKPOINT, DISK)
        return [_train(codes, log__tensorboard=True), _train(codes, train__samples=12), REPORT]
    if file.startswith("corpus/"):
        return [TOKENIZER]
    if file.startswith("tok/"):
        return [_train((DATA,), "fresh", train__samples=4, data__tokenizer="FOLDER/tok")]
    if file == "spm.model":
        return [_train((DATA,), "fresh", train__samples=4, data__tokenizer="FOLDER/spm.model")]
    if file == "run.yaml":
        return [_tool("pretrain_bloom", (CONFIG,), "--config", "FOLDER/run.yaml")]
    if file == "prompts.txt":
        words = ("--checkpoint", "FOLDER/run", "--prompts", "FOLDER/prompts.txt")
        return [_tool("generate", (DATA,), *words, "--max_new_tokens", "1")]
    if file in ("train.sh", "ds.json", "vocab.json", "merges.txt"):
        return [MIGRATE]
    return [FRESH]


__all__ = ["Case", "all_cases", "build_specimen"]
