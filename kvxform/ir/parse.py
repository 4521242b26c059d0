"""Read the text that `ir.text` prints. A grammar of its own: nothing is evaluated or imported.

The names that end up in code which torch.fx generates (placeholders, weights, keywords) are
checked here, so that no text can make a graph run code. See `docs/ir.md` for the grammar.
"""

from __future__ import annotations

import json
import keyword
import re
from typing import Any, NoReturn

from torch import fx

from kvxform.errors import ArtifactError
from kvxform.ir.targets import call_problem, resolve_target
from kvxform.ir.text import ARROW, NOTHING, WORDS
from kvxform.ir.types import ValueType, parse_dtype, parse_type

_LINE = re.compile(r"^%(\d+)(?:: (.+?))? = (\w[\w.]*)\((.*)$", re.ASCII)
_TOKEN = re.compile(
    r"""\s*(?:
      (?P<ref>%\d+)
    | (?P<float>-?(?:\d+\.\d+(?:e[+-]?\d+)?|\d+e[+-]?\d+|inf|nan)\b)
    | (?P<int>-?\d+\b)
    | (?P<string>"(?:[^"\\]|\\.)*")
    | (?P<name>[A-Za-z_]\w*)
    | (?P<punct>[()\[\],=])
    | (?P<comment>\#.*)
    | (?P<end>$)
    )""",
    re.VERBOSE | re.ASCII,
)
_NAMED = {  # torch.fx writes these names into the Python code that it generates
    "placeholder": (re.compile(r"^[a-z][a-z_]*\Z"), "placeholder"),
    "weight": (re.compile(r"^[A-Za-z]\w*(\.(?!__)\w+)*\Z", re.ASCII), "get_attr"),
}
_MAX_DEPTH = 16  # of nested lists; deeper text is an attack, not a graph


def parse_graph(text: str) -> fx.Graph:
    """Build the graph that `format_graph` printed.

    Lines that start with `#` and empty lines are skipped, so that the text of a whole program
    can be read too.

    Raises:
        ArtifactError: KVX602, with the line, if the text is not a graph or calls a function that
            a graph may not call.
    """
    reader = _GraphReader()
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip() and not line.startswith("#"):
            reader.read_line(line, number)
    return reader.finish()


class _GraphReader:
    """Builds a graph line by line."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.nodes: list[fx.Node] = []
        self.is_finished = False
        self.at = ""

    def read_line(self, line: str, number: int) -> None:
        self.at = f"line {number}"
        if self.is_finished:
            self.fail("nothing may follow the return line", line)
        if line.startswith("return "):
            tokens = _Tokens(line.removeprefix("return "), self)
            self.graph.output(tokens.value())
            tokens.finish()
            self.is_finished = True
            return
        found = _LINE.match(line)
        if found is None or int(found[1]) != len(self.nodes):
            self.fail(f"a line must have the form %{len(self.nodes)}: type = op(...)", line)
        tokens = _Tokens(found[4], self)
        args, kwargs = tokens.arguments()
        node = self.create(found[3], args, kwargs)
        node.meta = self.read_meta(found[2], tokens.finish())
        self.nodes.append(node)

    def create(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        if name in ("placeholder", "weight"):
            return self.create_named(name, args, kwargs)
        target = resolve_target(name)
        if target is None:
            self.fail("a graph may call only functional aten ops and kvx ops", name)
        problem = call_problem(target, len(args), kwargs)
        if problem:
            self.fail("a call must fit the schema of its op", f"{name} {problem}")
        return self.graph.call_function(target, args, kwargs)

    def create_named(self, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        if len(args) != 1 or kwargs or not isinstance(args[0], str):
            self.fail(f"a {kind} line must have one name", f"{args}")
        pattern, op = _NAMED[kind]
        if not pattern.match(args[0]) or any(map(keyword.iskeyword, args[0].split("."))):
            self.fail(f"the name of a {kind} must be a plain identifier", repr(args[0]))
        return self.graph.create_node(op, args[0])

    def read_meta(self, kind: str | None, comment: str) -> dict[str, Any]:
        module, via, origin = self.read_provenance(comment)
        meta: dict[str, Any] = {"module": module, "origin": origin, "via": via}
        return meta if kind is None else {"type": self.read_type(kind), **meta}

    def read_type(self, text: str) -> ValueType:
        try:
            value_type = parse_type(text)
        except (ValueError, RecursionError):
            self.fail("the type of a value must be a dtype and a shape", repr(text))
        if str(value_type) != text:
            self.fail("the type of a value must be written as it is printed", repr(text))
        return value_type

    def read_provenance(self, comment: str) -> tuple[str, tuple[str, ...], str]:
        if not comment:
            return "", (), ""
        fields = [self.read_field(field.strip()) for field in comment.split(ARROW)]
        origin = fields[-1] if len(fields) > 1 else ""
        return fields[0], tuple(reversed(fields[1:-1])), origin

    def read_field(self, field: str) -> str:
        if field.startswith('"'):
            return self.read_string(field)
        return "" if field == NOTHING else field

    def read_string(self, text: str) -> str:
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        if not isinstance(value, str):
            self.fail("a string must be written as in JSON", text)
        return value

    def finish(self) -> fx.Graph:
        if not self.is_finished:
            self.fail("a graph must end with a return line", "end of text")
        return self.graph

    def fail(self, rule: str, got: str) -> NoReturn:
        raise ArtifactError("KVX602", rule, where="graph", got=got[:200], at=self.at)


class _Tokens:
    """The arguments of one line, read from left to right."""

    def __init__(self, text: str, reader: _GraphReader) -> None:
        self.text, self.reader = text, reader
        self.position = 0
        self.kind, self.token = "", ""
        self.next()

    def next(self) -> str:
        """Move to the next token; return the one just left."""
        left = self.token
        found = _TOKEN.match(self.text, self.position)
        if found is None:
            self.reader.fail("arguments must follow the grammar", self.text[self.position :])
        self.kind, self.position = str(found.lastgroup), found.end()
        self.token = found[self.kind]
        return left

    def take(self, token: str) -> bool:
        """Move on if the current token is `token`."""
        if self.token == token and self.kind == "punct":
            self.next()
            return True
        return False

    def expect(self, token: str) -> None:
        if not self.take(token):
            self.reader.fail(f"'{token}' must come next", self.token or "end of line")

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Read arguments up to the closing parenthesis of the call."""
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        while not self.take(")"):
            if args or kwargs:
                self.expect(",")
            is_name, name = self.kind == "name", self.token
            value = self.value(allow_keyword=True)
            if is_name and self.take("="):
                if name in kwargs:
                    self.reader.fail("an argument may be given once", name)
                kwargs[name] = self.value()
            elif kwargs:
                self.reader.fail("positional arguments must come first", self.text)
            else:
                args.append(value)
        return tuple(args), kwargs

    def value(self, depth: int = 0, *, allow_keyword: bool = False) -> Any:
        """Read one value."""
        if depth > _MAX_DEPTH:
            self.reader.fail(f"values may nest {_MAX_DEPTH} deep", self.text)
        kind, token = self.kind, self.next()
        if kind == "ref":
            return self.node(int(token[1:]))
        if kind == "float":
            return float(token)
        if kind == "int" and len(token) < 32:
            return int(token)
        if kind == "string":
            return self.reader.read_string(token)
        if kind == "name":
            return self.word(token, depth, allow_keyword)
        if token == "[":
            return self.items("]", depth)[0]
        if token == "(":
            items, has_comma = self.items(")", depth)
            if len(items) == 1 and not has_comma:
                self.reader.fail("a tuple of one item must have a comma", self.text)
            return tuple(items)
        self.reader.fail("a value must come next", token or "end of line")

    def items(self, end: str, depth: int) -> tuple[list[Any], bool]:
        """Read values up to `end`; also return whether a comma came last."""
        items: list[Any] = []
        while not self.take(end):
            items.append(self.value(depth + 1))
            if not self.take(","):
                self.expect(end)
                return items, False
        return items, True

    def word(self, word: str, depth: int, allow_keyword: bool) -> Any:
        if word in WORDS:
            return WORDS[word]
        if word == "slice" and self.take("("):
            parts, _ = self.items(")", depth)
            if len(parts) == 3:
                return slice(*parts)
        elif allow_keyword and self.token == "=":
            return None
        else:
            try:
                return parse_dtype(word)
            except KeyError:
                pass
        self.reader.fail("a word must be a constant or a dtype", word)

    def node(self, number: int) -> fx.Node:
        if number >= len(self.reader.nodes):
            self.reader.fail("a value must be defined before it is used", f"%{number}")
        return self.reader.nodes[number]

    def finish(self) -> str:
        """Check that nothing but a comment is left; return the comment."""
        if self.kind == "comment":
            return self.token.removeprefix("#").strip()
        if self.kind != "end":
            self.reader.fail("nothing but a comment may follow a call", self.token)
        return ""
