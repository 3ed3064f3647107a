"""Plant a canary in every field of every format that is read, and see what the programs do.

    python -m tests.hostile.campaign [--count N] [--seed N] [--only TEXT]

Each case is a copy of a sound folder with one canary in it, and a program that reads it, in a
process forked from this one. It must end soon; leave no mark, and what lies outside untouched; and
either refuse with the exit code that the documentation names, in one message, or take the canary
for the data that it is. The last line is a JSON object with the counts.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.hostile.canaries import SECRET, Outside
from tests.hostile.formats import Case, all_cases, build_specimen
from tests.hostile.programs import run_program

SECONDS = 60.0
GOOD = ("refused", "harmless")


@dataclass(frozen=True)
class Verdict:
    """What became of one case."""

    case: Case
    kind: str
    text: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run the campaign; return how many canaries sang or were not refused as documented."""
    parser = argparse.ArgumentParser(description="Plant canaries in everything that is read.")
    parser.add_argument("--count", type=int, help="cases, drawn at random; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="cases whose names have this text")
    args = parser.parse_args(argv)
    with TemporaryDirectory(prefix="hostile-") as name:
        folder = Path(name).resolve()
        specimen, outside = folder / "specimen", Outside(folder / "outside")
        outside.make()
        build_specimen(specimen)
        cases = [case for case in all_cases(specimen, outside) if args.only in str(case)]
        if args.count is not None:
            cases = sample(cases, args.count, args.seed)
        verdicts = []
        for case in cases:
            verdicts.append(judge(case, specimen, outside, folder / "case"))
            tell(verdicts[-1])
    return report(verdicts)


def sample(cases: Sequence[Case], count: int, seed: int) -> list[Case]:
    """Some of the cases, the same number of each format as far as there are."""
    generator = random.Random(seed)
    shuffled = generator.sample(cases, len(cases))
    ranks: Counter[str] = Counter()
    ordered = []
    for case in shuffled:
        ordered.append((ranks[case.format], len(ordered), case))
        ranks[case.format] += 1
    return [case for _, _, case in sorted(ordered, key=lambda it: it[:2])[:count]]


def judge(case: Case, specimen: Path, outside: Outside, folder: Path) -> Verdict:
    """Run a case in a copy of the specimen."""
    shutil.copytree(specimen, folder, symlinks=True)
    try:
        case.plant(folder)
        before = outside.snapshot()
        code, text = _run(case, folder, outside)
        kind = _kind(case, code, text)
        if outside.mark.exists():
            outside.mark.unlink()
            kind = "executed"
        elif outside.snapshot() != before:
            kind = "touched"
        elif SECRET in text or _holds_secret(folder):
            kind = "read"
    finally:
        shutil.rmtree(folder)
    return Verdict(case, kind, f"exit code {code}\n{text}")


def _kind(case: Case, code: int | None, text: str) -> str:
    if code is None:
        return "hung"
    if "\x1b" in text or "\x9b" in text:
        return "escaped"
    if code == 0:
        return "harmless"
    told = 1 <= len([line for line in text.splitlines() if line.strip()]) <= 12
    sound = code in case.codes and told and "Traceback" not in text
    return "refused" if sound else "unsound"


def _run(case: Case, folder: Path, outside: Outside) -> tuple[int | None, str]:
    """The exit code of the program, None if it has to be killed, and what it complains of."""
    output = folder.with_name("output")
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        run_program(case.program, case.arguments(folder), output, case.env, outside.folder)
    deadline = time.monotonic() + SECONDS
    code: int | None = None
    while time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            code = os.waitstatus_to_exitcode(status)
            break
        time.sleep(0.005)
    else:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    lines = output.read_text(errors="surrogateescape").splitlines(keepends=True)
    return code, "".join(line for line in lines if " INFO " not in line)


def _holds_secret(folder: Path) -> bool:
    """Whether a program has copied the secret into the folder."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return any(SECRET.encode() in path.read_bytes() for path in files)


def tell(verdict: Verdict) -> None:
    """Print what became of a case if it is not as it should be."""
    if verdict.kind not in GOOD:
        print(f"{verdict.kind}: {verdict.case}\n{ascii(verdict.text[-1500:])}\n", flush=True)


def report(verdicts: Sequence[Verdict]) -> int:
    """Print what became of the cases; return how many are not as they should be."""
    kinds = Counter(verdict.kind for verdict in verdicts)
    bad = sum(count for kind, count in kinds.items() if kind not in GOOD)
    formats = Counter(verdict.case.format for verdict in verdicts)
    for name, count in sorted(formats.items()):
        of = Counter(verdict.kind for verdict in verdicts if verdict.case.format == name)
        print(f"{name:24} {count:5}  {', '.join(f'{kind} {n}' for kind, n in sorted(of.items()))}")
    figure = {
        "canaries": len(verdicts),
        "formats": len(formats),
        "executed": kinds["executed"],
        "touched": kinds["touched"] + kinds["read"],
        "refused": kinds["refused"],
        "harmless": kinds["harmless"],
        "unsound": bad - kinds["executed"] - kinds["touched"] - kinds["read"],
    }
    print(json.dumps(figure))
    return bad


if __name__ == "__main__":
    sys.exit(min(1, main()))
