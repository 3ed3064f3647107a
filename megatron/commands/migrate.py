"""Turn the launch script or the flags of a Megatron-DeepSpeed run into a config of this project.

    bloom migrate --script train.slurm --output run.yaml
    bloom migrate --deepspeed ds.json -- --num-layers 24 --hidden-size 2048 ...

The script is read, never run. What has no equal here stands at the head of what is written, with
the reason; beside each option stands the flag that it comes from. See docs/migration.md.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron.atomic import atomic_write, make_folder
from megatron.commands.arguments import CommandParser, add_overwrite, check_output
from megatron.config.rules import require
from megatron.errors import ConfigError
from megatron.migration.deepspeed_json import DeepSpeedJson, parse_json
from megatron.migration.flags import NO_GPT
from megatron.migration.page import page, summary
from megatron.migration.run import Original, named_file
from megatron.migration.shell import Launch, Script, read_script, shown
from megatron.migration.translate import translate
from megatron.migration.values import Flags
from megatron.plain import MOST_BYTES, read_file

_PER_NODE = ("--nproc_per_node", "--nproc-per-node", "--num_gpus")
_NODES = ("--nnodes", "--num_nodes")


def main(argv: Sequence[str]) -> int:
    """Migrate what the command line ``argv`` names; return the exit code."""
    args = _build_parser().parse(argv)
    require(
        args.script is not None or bool(args.flags),
        "nothing to migrate: give --script FILE, or the flags themselves after --",
    )
    if args.output is not None:
        check_output(args, "--output", [args.output])
    migrated = translate(_original(args))
    text = page(migrated, f"From {args.script or 'the flags'} of a Megatron-DeepSpeed run.")
    if args.output is None:
        print(text, end="")
        return 0
    make_folder(args.output.parent)
    with atomic_write(args.output) as file:
        file.write(text.encode())
    print(f"wrote {args.output}\n{summary(migrated)}", end="")
    return 0


def _original(args: argparse.Namespace) -> Original:
    """What the files and flags say."""
    script = Script(launches=(), files={})
    launch = Launch((), "", ())
    if args.script is not None:
        script = read_script(_read(args.script, "--script"), dict(args.set))
        launch = _launch(script, args.script)
    flags = Flags([*launch.arguments, *args.flags])
    return Original(
        name="run" if args.script is None else args.script.stem,
        flags=flags,
        deepspeed=_deepspeed(args, script, flags),
        world_size=args.world_size or _world_size(launch.launcher),
        vocab_size=args.vocab_size,
        folder=Path() if args.script is None else args.script.parent,
        typed=args.script is None,
        commands=len({launch.arguments for launch in script.launches}),
    )


def _launch(script: Script, path: Path) -> Launch:
    """The last command that starts the training program."""
    require(
        bool(script.launches),
        f"--script {path}: no command in it runs a .py program with --num-layers; give the flags "
        "themselves after --",
    )
    launch = script.launches[-1]
    program = shown(launch.program).rpartition("/")[2]
    require(
        program not in NO_GPT,
        f"--script {path} runs {program}, which does not train a causal language model",
    )
    return launch


def _deepspeed(args: argparse.Namespace, script: Script, flags: Flags) -> DeepSpeedJson | None:
    """DeepSpeed's JSON: what is given, what the script writes, or the file that it names."""
    if args.deepspeed is not None:
        return parse_json(_read(args.deepspeed, "--deepspeed"), str(args.deepspeed))
    name = "".join(flags.values("deepspeed_config"))
    if "deepspeed" not in flags or not name:
        return None
    if name in script.files:
        return parse_json(script.files[name], name)
    folder = Path() if args.script is None else args.script.parent
    path = named_file(folder, shown(name), typed=args.script is None)
    return None if path is None else parse_json(_read(path, "--deepspeed_config"), name)


def _world_size(launcher: Sequence[str]) -> int | None:
    """The number of ranks that a launcher starts, if it says so."""
    flags = Flags(launcher)
    per_node = [value for flag in _PER_NODE for value in flags.values(flag[2:])[:1]]
    nodes = [value for flag in _NODES for value in flags.values(flag[2:])[:1]] or ["1"]
    if not per_node or not (per_node[0] + nodes[0]).isdigit():
        return None
    return int(per_node[0]) * int(nodes[0])


def _read(path: Path, flag: str) -> str:
    try:
        return read_file(path, MOST_BYTES).decode()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{flag} {path} cannot be read: {error}") from error


def _variable(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got '{text}'")
    return name, value


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got '{text}'")
    return int(text)


def _build_parser() -> CommandParser:
    parser = CommandParser(
        "migrate",
        "Turn the script or flags of a Megatron-DeepSpeed run into a config.",
        [
            "bloom migrate --script train.slurm --output run.yaml",
            "bloom migrate --deepspeed ds.json -- --num-layers 24 --hidden-size 2048 ...",
        ],
    )
    parser.add_argument("--script", type=Path, help="shell script that starts the run")
    parser.add_argument("--deepspeed", type=Path, help="DeepSpeed's JSON, if not in the script")
    parser.add_argument("--output", type=Path, help="YAML file to write; default: print it")
    parser.add_argument(
        "--set",
        type=_variable,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="value of a variable, whatever the script says",
    )
    parser.add_argument("--vocab_size", type=_positive, help="tokens that the tokenizer knows")
    parser.add_argument("--world_size", type=_positive, help="number of ranks of the run")
    parser.add_argument("flags", nargs="*", help="flags of the run, after --; they win")
    add_overwrite(parser)
    return parser
