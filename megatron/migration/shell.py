"""What a launch script hands to the training program, found without running anything.

The script is read from top to bottom, as far as launch scripts go:

    assignments        NAME=..., NAME+=..., export NAME=..., NAME=( ... )
    what they are of   quotes, $NAME, ${NAME}, ${NAME:-other}, "${NAME[@]}", $(( 2 * NAME ))
    commands           over several lines, inside strings (bash -c "...", eval), before | and >
    files              cat <<EOT > name

What only a shell could know stays open: other programs' output, the environment, and variables that
are set under a condition. It is marked in the text, so that whoever needs the text can tell. What a
condition may add to other flags is marked as a flag of its own.
"""

import ast
import operator
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import dropwhile
from typing import TypeAlias

from megatron.errors import ConfigError

_SUBSTITUTION = r"\$\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)|`[^`]*`"
_BRACED = r"\$\{(?:[^{}]|\{[^{}]*\})*\}"
_TOKEN = re.compile(
    rf"""
    (?P<space> (?: [ \t\r] | \\\r?\n )+ )
  | (?P<comment> (?<![^\s;&|(]) \#[^\n]* )
  | (?P<array> \b[A-Za-z_]\w*\+?=\( )
  | (?P<here> <<-?[ \t]*(?P<mark>["'\\]?)(?P<end>\w+)["']? )
  | (?P<operator> \d*&?>[>|]?(?:&\d)? | <{{1,3}} | \|[|&]? | &&? | ;;? | [()\n] )
  | (?P<single> '[^']*' )
  | (?P<double> "(?> \\. | {_SUBSTITUTION} | {_BRACED} | [^"\\] )*+" )
  | (?P<escape> \\. )
  | (?P<plain> (?: {_SUBSTITUTION} | {_BRACED} | [^\s;&|()<>'"\\] )+ | . )
    """,
    re.VERBOSE | re.DOTALL,
)
_EXPANSION = re.compile(
    rf"\\(?P<escaped>[$`\"\\\n])|(?P<substitution>{_SUBSTITUTION})"
    rf"|(?P<braced>{_BRACED})|\$(?P<name>[A-Za-z_]\w*|[\d@*#?$!-])",
    re.DOTALL,
)
_INSIDE_BRACES = re.compile(r"(\w+|[@*])(?:\[[@*]\])?(?::?[-=](.*))?", re.DOTALL)
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=")
_OPEN = re.compile("\0([^\0]*)\0")

_PIECES = ("single", "double", "escape", "plain")
_OPENING = ("if", "while", "until", "{", "for", "case", "select")
_CLOSING = ("fi", "done", "esac", "}")
_WHOLE = 1 << 30
_MOST_LETTERS = 1 << 16
# How many words of a command belong to a word that only orders commands.
_KEYWORDS = {
    **dict.fromkeys(("if", "while", "until", "{", *_CLOSING), 1),
    **dict.fromkeys(("then", "else", "elif", "do", "!", "time"), 1),
    **dict.fromkeys(("for", "case", "select"), _WHOLE),
    "function": 2,
}
_DECLARING = ("export", "declare", "local", "readonly", "typeset")
_PRINTING = ("echo", "printf", ":")

# What Slurm tells a job of the size that its script asks for.
_SBATCH = (
    (r"(?:--nodes[= ]|-N *)(\d+)", ("SLURM_NNODES", "SLURM_JOB_NUM_NODES")),
    (r"--(?:gres=gpu(?::\w+)?:|gpus-per-node[= ])(\d+)", ("SLURM_GPUS_ON_NODE",)),
    (r"--ntasks-per-node[= ](\d+)", ("SLURM_NTASKS_PER_NODE",)),
)
_ARITHMETIC: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.floordiv,
    ast.Mod: operator.mod,
}

Word: TypeAlias = list[tuple[str, str]]
"""Pieces of one word: how each is quoted, and its text."""


@dataclass(frozen=True)
class Launch:
    """A command that starts the training program.

    Attributes:
        launcher: the words before the program.
        program: its file.
        arguments: the words after it; what is open in them, ``open_parts`` tells.
    """

    launcher: tuple[str, ...]
    program: str
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Script:
    """What was found in a script.

    Attributes:
        launches: the commands that start a training program, in order.
        files: what the script writes by here-documents, by the names of the files.
    """

    launches: tuple[Launch, ...]
    files: Mapping[str, str]


def read_script(text: str, variables: Mapping[str, str]) -> Script:
    """Find what ``text`` hands to the training program.

    Args:
        variables: values that hold whatever the script says.

    Raises:
        ConfigError: if it is nested too deeply, or its variables grow without end.
    """
    reader = _Reader(_sbatch_variables(text), variables)
    try:
        reader.read(text)
    except RecursionError as error:
        raise ConfigError("the script is nested too deeply to be read") from error
    return reader.script()


def open_parts(text: str) -> list[str]:
    """What stays open in a text: ``$NAME`` or ``$(command)``."""
    return _OPEN.findall(text)


def shown(text: str) -> str:
    """A text as it may be shown: what is open, as the script writes it."""
    return _OPEN.sub(r"\1", text)


@dataclass
class _Command:
    """A simple command.

    Attributes:
        after: the operator before it.
        array: ``NAME=(`` or ``NAME+=(``, if the words are the elements of an array.
        here: a here-document, and whether variables in it are expanded.
        target: the file that it writes to.
        word: the pieces of the word that has begun.
        redirects: the next word is the target.
    """

    after: str
    words: list[Word] = field(default_factory=list)
    array: str | None = None
    here: tuple[str, bool] | None = None
    target: Word | None = None
    word: Word = field(default_factory=list)
    redirects: bool = False

    def end_word(self) -> None:
        """Take the word that has begun, if one has."""
        if not self.word:
            return
        if self.redirects:
            self.target = self.word
        else:
            self.words.append(self.word)
        self.word, self.redirects = [], False

    def ends_at(self, operator: str) -> bool:
        """Whether an operator ends it. An array goes on over lines."""
        return "<" not in operator and (self.array is None or operator == ")")


def _commands(text: str) -> Iterator[_Command]:
    """Cut a script into simple commands."""
    command = _Command(after="")
    for kind, part in _tokens(text):
        if kind in _PIECES:
            command.word.append((kind, part))
            continue
        command.end_word()
        if kind in ("here", "quoted here"):
            command.here = (part, kind == "here")
        elif kind == "array":
            yield command
            command = _Command(after=command.after, array=part)
        elif kind == "operator" and ">" in part:
            command.redirects = not part[-1].isdigit()
        elif kind == "operator" and command.ends_at(part):
            yield command
            command = _Command(after=part)
    command.end_word()
    yield command


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    """Kind and text of each token. A here-document comes before the end of the line of its mark."""
    position = 0
    start: re.Match[str] | None = None
    while position < len(text):
        token = _TOKEN.match(text, position)
        assert token is not None, "any character is a token"
        position = token.end()
        if token["mark"] is not None:
            start = token
        elif token[0] == "\n" and start is not None:
            end = re.compile(rf"^\t*{start['end']}$\n?", re.MULTILINE).search(text, position)
            body = text[position : end.start() if end else len(text)]
            yield "quoted here" if start["mark"] else "here", body
            position = end.end() if end else len(text)
            start = None
        yield str(token.lastgroup) if token["mark"] is None else "space", token[0]


class _Reader:
    """Follows the variables of a script."""

    def __init__(self, known: Mapping[str, str], fixed: Mapping[str, str]) -> None:
        self._values = {name: [value] for name, value in {**known, **fixed}.items()}
        self._fixed = frozenset(fixed)
        self._open: list[str] = []
        self._blocks: list[dict[str, list[str]]] = []
        self._files: dict[str, str] = {}
        self._launches: list[Launch] = []
        self._assigned: list[Launch] = []

    def script(self) -> Script:
        launches = (
            Launch(
                tuple(map(self._named, launch.launcher)),
                self._named(launch.program),
                tuple(map(self._named, launch.arguments)),
            )
            for launch in self._launches or self._assigned
        )
        files = {self._named(name): self._named(text) for name, text in self._files.items()}
        return Script(tuple(launches), files)

    def read(self, text: str) -> None:
        for command in _commands(text):
            if command.array is not None:
                self._assign_array(command.array, command)
            else:
                self._read_command(command)

    def _read_command(self, command: _Command) -> None:
        words = self._without_keywords(command.words)
        if words and _bare(words[0]) in _DECLARING:
            words = [word for word in words if _is_assignment(word)]
        rest = list(dropwhile(_is_assignment, words))
        if not rest:
            for word in words:
                self._assign(word, conditional=command.after in ("&&", "||"))
        elif command.here is not None and command.target is not None:
            text, expands = command.here
            self._files[self._text(command.target)] = self._expand(text) if expands else text
        elif _bare(rest[0]) not in _PRINTING:
            self._run([part for word in rest for part in self._fields(word)])

    def _without_keywords(self, words: list[Word]) -> list[Word]:
        """The command after the words that open and close blocks."""
        while words and (first := _bare(words[0])) in _KEYWORDS:
            if first in _CLOSING:
                self._forget(self._blocks.pop() if self._blocks else {})
            elif first in _OPENING:
                self._blocks.append({})
            elif first in ("else", "elif") and self._blocks:
                self._forget(dict(self._blocks[-1]))
            words = words[_KEYWORDS[first] :]
        return words

    def _forget(self, before: Mapping[str, list[str]]) -> None:
        """Leave open what a block has changed, since it may not have been run."""
        for name, old in before.items():
            if self._values[name] != old:
                self._change(name, self._uncertain(name, old, self._values[name]))

    def _uncertain(self, name: str, old: list[str], new: list[str]) -> list[str]:
        """What is known of a value that may be the old or the new one.

        Where flags may have been added to others, what is added is open, as a flag of its own.
        """
        mark = self._leave_open(f"${name}")
        if "--" in " ".join(old):
            if len(old) < len(new) and new[: len(old)] == old:
                return [*old, f"--{mark}"]
            if len(new) == 1 and new[0].startswith(old[0]):
                return [f"{old[0]} --{mark}"]
        return [mark]

    def _assign(self, word: Word, conditional: bool) -> None:
        match = _ASSIGNMENT.match(word[0][1])
        assert match is not None
        name, appends = match[1], match[2] == "+"
        value = self._text([("plain", word[0][1][match.end() :]), *word[1:]])
        old = self._values.get(name, [])
        values = ["".join([*old, value])] if appends else [value]
        if conditional and values != old:
            values = self._uncertain(name, old, values)
        self._change(name, values)
        # A command that is only named, as a last resort: how it is run has not been understood.
        known = len(self._launches)
        self._read_inside(value.replace("\n", " "))
        self._assigned += self._launches[known:]
        del self._launches[known:]

    def _assign_array(self, start: str, command: _Command) -> None:
        name = start.rstrip("+=(")
        old = self._values.get(name, []) if start.endswith("+=(") else []
        self._change(name, [*old, *(part for word in command.words for part in self._fields(word))])

    def _change(self, name: str, values: list[str]) -> None:
        """Give a variable its value, which holds to the end of the innermost block."""
        if name in self._fixed:
            return
        if sum(map(len, values)) > _MOST_LETTERS:
            raise ConfigError(f"the script gives ${name:.60} more than {_MOST_LETTERS} letters")
        if self._blocks:
            self._blocks[-1].setdefault(name, self._values.get(name, []))
        self._values[name] = values

    def _run(self, parts: Sequence[str]) -> None:
        """Note a command if it starts the training program, or if one inside it does."""
        if parts and parts[0] == "eval":
            self.read(" ".join(parts[1:]))
            return
        for place, part in enumerate(parts):
            rest = tuple(parts[place + 1 :])
            if part.endswith(".py") and any(word.startswith("--num-layers") for word in rest):
                self._launches.append(Launch(tuple(parts[:place]), part, rest))
                return
            self._read_inside(part)

    def _read_inside(self, text: str) -> None:
        """Read a string that may be a command itself."""
        if (".py" in text or "$" in text) and len(text.split()) > 1:
            blocks = list(self._blocks)
            self.read(text)
            self._blocks = blocks

    def _fields(self, word: Word) -> list[str]:
        """The words that a word becomes when its variables are expanded."""
        quoted = "".join(self._quoted(kind, text) for kind, text in word)
        try:
            fields = shlex.split(quoted)
        except ValueError:
            fields = quoted.split()
        # A backslash before blanks at the end of a line, by mistake, is an escaped blank.
        return [part for part in fields if part.strip()]

    def _quoted(self, kind: str, text: str) -> str:
        """A piece of a word, quoted as far as it must not be split."""
        array = re.fullmatch(r'"\$\{(\w+)\[@\]\}"', text)
        if kind == "double" and array and array[1] in self._values:
            return shlex.join(self._values[array[1]])
        expanded = self._text([(kind, text)])
        return expanded if kind == "plain" else shlex.quote(expanded)

    def _text(self, word: Word) -> str:
        """A word without its quotes, with its variables expanded."""
        return "".join(self._piece(kind, text) for kind, text in word)

    def _piece(self, kind: str, text: str) -> str:
        if kind == "single":
            return text[1:-1]
        if kind == "escape":
            return text[1:]
        return self._expand(text[1:-1] if kind == "double" else text)

    def _expand(self, text: str) -> str:
        return _EXPANSION.sub(self._expanded, text)

    def _expanded(self, match: re.Match[str]) -> str:
        if match["escaped"]:
            return match["escaped"].strip("\n")
        if match["substitution"]:
            return self._substituted(match["substitution"])
        inside = match["name"] or match["braced"][2:-1]
        parts = _INSIDE_BRACES.fullmatch(inside)
        if parts is None:
            return self._leave_open(f"${{{inside}}}")
        name, default = parts.groups()
        values = self._values.get(name, [])
        if values and (default is None or values[0]):
            return " ".join(values if "[" in inside else values[:1])
        return self._leave_open(f"${name}") if default is None else self._expand(default)

    def _substituted(self, text: str) -> str:
        """The result of arithmetic; of a command, none."""
        if not (text.startswith("$((") and text.endswith("))")):
            return self._leave_open(text)
        try:
            return str(self._value(ast.parse(self._expand(text[3:-2]).strip(), mode="eval").body))
        except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
            return self._leave_open(text)

    def _value(self, node: ast.expr) -> int:
        """The value of whole numbers, variables and what is computed of them."""
        if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            return _ARITHMETIC[type(node.op)](self._value(node.left), self._value(node.right))
        if isinstance(node, ast.Name):
            return int("".join(self._values.get(node.id, [])))
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        raise ValueError("no arithmetic of whole numbers")

    def _leave_open(self, text: str) -> str:
        """A mark for what only a shell could know; without anything that a shell would split."""
        if text not in self._open:
            self._open.append(text)
        return f"\0{self._open.index(text)}\0"

    def _named(self, text: str) -> str:
        """A text whose marks name what is open."""
        return _OPEN.sub(lambda match: f"\0{self._open[int(match[1])]}\0", text)


def _is_assignment(word: Word) -> bool:
    return word[0][0] == "plain" and _ASSIGNMENT.match(word[0][1]) is not None


def _bare(word: Word) -> str:
    """The text of a word that is not quoted, or nothing."""
    return word[0][1] if len(word) == 1 and word[0][0] == "plain" else ""


def _sbatch_variables(text: str) -> dict[str, str]:
    lines = "\n".join(re.findall(r"^#SBATCH +(.*)", text, re.MULTILINE))
    found = ((re.search(pattern, lines), names) for pattern, names in _SBATCH)
    return {name: match[1] for match, names in found if match for name in names}
