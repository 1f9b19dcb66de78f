"""GBNF, the grammars of llama.cpp, and xgrammar's EBNF, which is nearly the same, as Lark grammars.

Such a grammar speaks of characters, and any way to read a text by it will do. llguidance cuts a text
into lexemes first, the longest that it finds, and would not go back: by `[a-z]+ " is "` or by
`[a-z] | "if"` it finds other texts than llama.cpp. So each character is a lexeme here, and longer
ones are made only where nothing else can begin or go on as they do (_Lexemes).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from .errors import GrammarError
from .lark import literal

Ranges = tuple[tuple[int, int], ...]
"""Characters, as first and last code points."""
ALL: Final[Ranges] = ((0, 0xD7FF), (0xE000, 0x10FFFF))
EMPTY: Final = '""'
MAX_DEPTH: Final = 64
"""Groups within each other, and rules that a lexeme goes through."""
MOST_TRIED: Final = 128
"""Sequences of one grammar that are looked at as lexemes; each look goes over the whole grammar."""
MOST_SHAPES: Final = 4096
"""Sequences whose shape is found out."""
MOST_WORK: Final = 200_000
"""Nodes, and ranges and characters in them, that all looks go over; and as many for all shapes."""
LONGEST_TRIED: Final = 8
"""Parts of such a sequence."""
LARGEST: Final = 1000
"""Nodes of a lexeme, in which other rules are written out."""
_PLAIN: Final = {"n": "\n", "r": "\r", "t": "\t", "a": "\a", "b": "\b", "f": "\f", "v": "\v"}
_PLAIN_TOO: Final = "\\\"'[]-^?/.|(){}*+"
_HEX: Final = {"x": 2, "u": 4, "U": 8}


@dataclass(eq=False, slots=True)
class Text:
    """A fixed text."""

    text: str


@dataclass(eq=False, slots=True)
class Chars:
    """One of some characters."""

    ranges: Ranges


@dataclass(eq=False, slots=True)
class Rule:
    """The text of another rule."""

    name: str


@dataclass(eq=False, slots=True)
class Sequence:
    """One after the other."""

    parts: "list[Node]"


@dataclass(eq=False, slots=True)
class Either:
    """One of several."""

    options: "list[Node]"


@dataclass(eq=False, slots=True)
class Repeat:
    """Several times; `most` None: without an end."""

    part: "Node"
    least: int
    most: int | None


Node = Text | Chars | Rule | Sequence | Either | Repeat


def lark_of_gbnf(source: str) -> str:
    """Raises GrammarError with the line that is at fault."""
    rules = _Reader(source).rules()
    if "root" not in rules:
        raise _wrong("there is no rule `root`")
    for node in rules.values():
        for part in _nodes(node):
            if isinstance(part, Rule) and part.name not in rules:
                raise _wrong(f"there is no rule `{part.name[:64]}`")
    return _Writer(rules).lark()


def _wrong(why: str) -> GrammarError:
    return GrammarError(f"the grammar cannot be read as GBNF: {why}")


class _Reader:
    """Line ends are space like any other: a name with `::=` behind it begins the next rule."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._at = 0
        self._depth = 0

    def rules(self) -> dict[str, Node]:
        """By name, in order; of two with one name the last."""
        found: dict[str, Node] = {}
        self._skip()
        while self._at < len(self._source):
            name = self._word()
            self._skip()
            if not name or not self._take("::="):
                raise self._error("a rule, `name ::= ...`, should begin")
            found[name] = self._either()
            self._skip()
        return found

    def _error(self, why: str) -> GrammarError:
        line = self._source.count("\n", 0, self._at) + 1
        return _wrong(f"line {line}: {why}, not {self._source[self._at :][:20]!r}")

    def _skip(self) -> None:
        while self._at < len(self._source):
            if self._source[self._at] == "#":
                end = self._source.find("\n", self._at)
                self._at = len(self._source) if end < 0 else end
            elif self._source[self._at] in " \t\r\n":
                self._at += 1
            else:
                return

    def _take(self, text: str) -> bool:
        if not self._source.startswith(text, self._at):
            return False
        self._at += len(text)
        return True

    def _peek(self) -> str:
        return self._source[self._at : self._at + 1]

    def _word(self) -> str:
        start = self._at
        while self._peek() and (self._peek().isalnum() or self._peek() in "_-"):
            self._at += 1
        return self._source[start : self._at]

    def _begins_rule(self) -> bool:
        start = self._at
        is_name = bool(self._word())
        self._skip()
        begins = is_name and self._source.startswith("::=", self._at)
        self._at = start
        return begins

    def _either(self) -> Node:
        options = [self._sequence()]
        while self._take("|"):
            options.append(self._sequence())
        return options[0] if len(options) == 1 else Either(options)

    def _sequence(self) -> Node:
        parts: list[Node] = []
        self._skip()
        while self._peek() and self._peek() not in "|)" and not self._begins_rule():
            part = self._repeated(self._part())
            if part is not None:
                parts.append(part)
            self._skip()
        return parts[0] if len(parts) == 1 else Sequence(parts)

    def _part(self) -> Node:
        match self._peek():
            case '"':
                return Text(self._text())
            case "[":
                return Chars(self._class())
            case ".":
                self._at += 1
                return Chars(ALL)
            case "(":
                return self._group()
            case _:
                name = self._word()
                if not name:
                    raise self._error("a text, a class, a group or a name should follow")
                return Rule(name)

    def _group(self) -> Node:
        self._at += 1
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._error(f"groups are nested more than {MAX_DEPTH} levels deep")
        node = self._either()
        if not self._take(")"):
            raise self._error("`)` should follow")
        self._depth -= 1
        return node

    def _repeated(self, part: Node) -> Node | None:
        """None for what comes no times."""
        for _ in range(MAX_DEPTH):
            self._skip()
            if self._take("*"):
                part = Repeat(part, 0, None)
            elif self._take("+"):
                part = Repeat(part, 1, None)
            elif self._take("?"):
                part = Repeat(part, 0, 1)
            elif self._take("{"):
                least, most = self._times()
                if most == 0:
                    return None
                part = Repeat(part, least, most)
            else:
                return part
        raise self._error(
            f"more than {MAX_DEPTH} repetitions of repetitions; something else should come"
        )

    def _times(self) -> tuple[int, int | None]:
        least = most = self._number()
        if self._take(","):
            self._skip()
            most = self._number()
        elif least is None:
            raise self._error("a number should follow")
        if not self._take("}"):
            raise self._error("`}` should follow")
        least = least or 0
        if most is not None and most < least:
            raise self._error(f"{{{least},{most}}} has its bounds the wrong way round")
        return least, most

    def _number(self) -> int | None:
        self._skip()
        start = self._at
        while self._peek() in tuple("0123456789"):
            self._at += 1
        digits = self._source[start : self._at]
        self._skip()
        if len(digits) > 9:
            raise self._error("a number is too large")
        return int(digits) if digits else None

    def _text(self) -> str:
        self._at += 1
        characters: list[str] = []
        while not self._take('"'):
            characters.append(self._character())
        return "".join(characters)

    def _class(self) -> Ranges:
        self._at += 1
        negated = self._take("^")
        ranges: list[tuple[int, int]] = []
        while not self._take("]"):
            first = last = ord(self._character())
            if self._peek() == "-" and self._source[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                last = ord(self._character())
            if last < first:
                raise self._error("the range before this ends before it begins")
            ranges.append((first, last))
        characters = _merged(ranges)
        if negated:
            characters = _others(characters)
        if not characters:
            raise self._error("no character is in the class before this; something should follow")
        return characters

    def _character(self) -> str:
        character = self._peek()
        if not character:
            raise self._error("a text or a class has no end")
        self._at += 1
        if character != "\\":
            return character
        kind = self._peek()
        self._at += 1
        if kind in _HEX:
            digits = self._source[self._at : self._at + _HEX[kind]]
            self._at += _HEX[kind]
            return self._of_code(digits, _HEX[kind])
        if kind and kind in _PLAIN:
            return _PLAIN[kind]
        if kind and kind in _PLAIN_TOO:
            return kind
        self._at -= 2
        raise self._error("an escape that is known should follow")

    def _of_code(self, digits: str, wanted: int) -> str:
        try:
            code = int(digits, 16)
        except ValueError:
            code = -1
        if len(digits) != wanted or not any(low <= code <= high for low, high in ALL):
            raise self._error(f"{digits!r} is the code of no character; something else should come")
        return chr(code)


def _merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """In order and without overlaps."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return _characters(merged)


def _others(ranges: Ranges) -> Ranges:
    """All characters but these."""
    left: list[tuple[int, int]] = []
    at = 0
    for low, high in ranges:
        left.append((at, low - 1))
        at = high + 1
    left.append((at, ALL[-1][1]))
    return _characters(left)


def _characters(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """What is in them but halves of characters."""
    return tuple(
        (max(low, first), min(high, last))
        for low, high in ranges
        for first, last in ALL
        if max(low, first) <= min(high, last)
    )


def _overlap(some: Ranges, others: Ranges) -> bool:
    """Whether a character is in both."""
    place = other = 0
    while place < len(some) and other < len(others):
        if some[place][1] < others[other][0]:
            place += 1
        elif others[other][1] < some[place][0]:
            other += 1
        else:
            return True
    return False


def _nodes(*roots: Node) -> Iterator[Node]:
    """The nodes and all in them, without those of other rules."""
    pending = list(roots)
    while pending:
        node = pending.pop()
        yield node
        match node:
            case Sequence(parts):
                pending += parts
            case Either(options):
                pending += options
            case Repeat(part):
                pending.append(part)
            case _:
                pass


@dataclass(slots=True)
class _Shape:
    """Of texts that can be told apart character by character, with one to look ahead."""

    is_nullable: bool = True
    first: Ranges = ()
    """With what they begin."""
    more: Ranges = ()
    """With what a whole text can go on as a longer one."""
    size: int = 0
    """Nodes, those of other rules included."""


class _Lexemes:
    """The parts of sequences that are one lexeme: what repeats, such as a string in quotes, and
    costs much character by character. Nothing else in the grammar has a character that one of them
    may begin or go on with."""

    def __init__(self, rules: dict[str, Node]) -> None:
        self.spans: dict[int, tuple[int, int]] = {}
        """First part, and the one behind the last; by the sequence's id."""
        self._rules = rules
        self._shapes: dict[str, _Shape | None] = {}
        self._open: set[str] = set()
        nodes = [node for root in rules.values() for node in _nodes(root)]
        sizes = [_size(node) for node in nodes]
        self._left = min(MOST_TRIED, MOST_WORK // (1 + sum(sizes)))
        of_shape = LONGEST_TRIED * max(sizes, default=1)
        self._shapes_left = min(MOST_SHAPES, MOST_WORK // of_shape)
        for node in nodes:
            if isinstance(node, Sequence):
                self._look(node)

    def leaves(self, without: Iterable[Node] = ()) -> Iterator[Text | Chars]:
        """Of all rules that a text can have, as far as no part of `without` leads there."""
        passed = {id(node) for node in without}
        seen = {"root"}
        pending = ["root"]
        while pending:
            stack = [self._rules[pending.pop()]]
            while stack:
                node = stack.pop()
                if id(node) in passed:
                    continue
                match node:
                    case Text() | Chars():
                        yield node
                    case Rule(name) if name not in seen:
                        seen.add(name)
                        pending.append(name)
                    case Sequence(parts):
                        stack += parts
                    case Either(options):
                        stack += options
                    case Repeat(part):
                        stack.append(part)
                    case _:
                        pass

    def _look(self, sequence: Sequence) -> None:
        """Find the longest lexeme in a sequence."""
        parts = sequence.parts
        spans = [
            (first, end)
            for first in range(len(parts))
            for end in range(min(len(parts), first + LONGEST_TRIED), first + 1, -1)
            if any(isinstance(part, Repeat) for part in parts[first:end])
        ]
        for first, end in sorted(spans, key=lambda span: span[0] - span[1]):
            if not self._shapes_left:
                return
            self._shapes_left -= 1
            shape = self.shape(Sequence(parts[first:end]))
            if shape is None or shape.is_nullable or _overlap(shape.first, shape.more):
                continue
            if not self._left:
                return
            self._left -= 1
            outside = _merged(
                span for leaf in self.leaves(parts[first:end]) for span in _ranges_of(leaf)
            )
            if not _overlap(outside, _merged((*shape.first, *shape.more))):
                self.spans[id(sequence)] = (first, end)
                return

    def shape(self, node: Node, depth: int = 0) -> _Shape | None:
        """None where it takes more than the next character to know what comes."""
        if depth > MAX_DEPTH:
            return None
        match node:
            case Text(text):
                first = ((ord(text[0]), ord(text[0])),) if text else ()
                shape = _Shape(not text, first)
            case Chars(ranges):
                shape = _Shape(False, ranges)
            case Rule(name):
                shape = self._of_rule(name, depth)
            case Sequence(parts):
                shape = self._of_sequence(parts, depth)
            case Either(options):
                shape = self._of_either(options, depth)
            case Repeat():
                shape = self._of_repeat(node, depth)
        if shape is None or shape.size >= LARGEST:
            return None
        return _Shape(shape.is_nullable, shape.first, shape.more, shape.size + 1)

    def _of_rule(self, name: str, depth: int) -> _Shape | None:
        if name in self._open:
            return None
        if name not in self._shapes:
            self._open.add(name)
            self._shapes[name] = self.shape(self._rules[name], depth + 1)
            self._open.discard(name)
        return self._shapes[name]

    def _of_sequence(self, parts: list[Node], depth: int) -> _Shape | None:
        whole = _Shape()
        for part in parts:
            shape = self.shape(part, depth + 1)
            if shape is None or _overlap(whole.more, shape.first):
                return None
            if whole.is_nullable and _overlap(whole.first, shape.first):
                return None
            more = (*shape.more, *whole.more, *shape.first) if shape.is_nullable else shape.more
            whole = _Shape(
                whole.is_nullable and shape.is_nullable,
                _merged((*whole.first, *shape.first)) if whole.is_nullable else whole.first,
                _merged(more),
                whole.size + shape.size,
            )
        return whole

    def _of_either(self, options: list[Node], depth: int) -> _Shape | None:
        whole = _Shape(False)
        for option in options:
            shape = self.shape(option, depth + 1)
            if shape is None or _overlap(whole.first, shape.first):
                return None
            if whole.is_nullable and shape.is_nullable:
                return None
            whole = _Shape(
                whole.is_nullable or shape.is_nullable,
                _merged((*whole.first, *shape.first)),
                _merged((*whole.more, *shape.more)),
                whole.size + shape.size,
            )
        return whole

    def _of_repeat(self, node: Repeat, depth: int) -> _Shape | None:
        shape = self.shape(node.part, depth + 1)
        if shape is None or shape.is_nullable:
            return None
        if node.most != 1 and _overlap(shape.more, shape.first):
            return None
        goes_on = node.most is None or node.most > node.least
        more = _merged((*shape.more, *shape.first)) if goes_on else shape.more
        return _Shape(node.least == 0, shape.first, more, shape.size)


def _size(node: Node) -> int:
    match node:
        case Text(text):
            return 1 + len(text)
        case Chars(ranges):
            return 1 + len(ranges)
        case _:
            return 1


def _ranges_of(leaf: Text | Chars) -> Iterable[tuple[int, int]]:
    """All characters in it."""
    if isinstance(leaf, Chars):
        return leaf.ranges
    return ((ord(character), ord(character)) for character in set(leaf.text))


class _Writer:
    """The rules in Lark, each under a name of its own: those of GBNF may be what Lark knows
    otherwise."""

    def __init__(self, rules: dict[str, Node]) -> None:
        self._rules = rules
        self._names = {name: f"r{number}" for number, name in enumerate(rules)} | {"root": "start"}
        lexemes = _Lexemes(rules)
        self._spans = lexemes.spans
        self._terminals: list[str] = []
        self._whole = self._whole_texts(lexemes)

    def _whole_texts(self, lexemes: _Lexemes) -> frozenset[str]:
        """Those that are one lexeme: nothing else has the character that they begin with."""
        inside: list[Node] = []
        taken: list[tuple[int, int]] = []
        for root in self._rules.values():
            for node in _nodes(root):
                if isinstance(node, Sequence) and id(node) in self._spans:
                    first, end = self._spans[id(node)]
                    inside += node.parts[first:end]
                    shape = lexemes.shape(Sequence(node.parts[first:end]))
                    taken += shape.first if shape is not None else ALL
        texts: dict[str, set[str]] = {}
        beginning: set[str] = set()
        for leaf in lexemes.leaves(inside):
            if isinstance(leaf, Chars):
                taken += leaf.ranges
                continue
            beginning.add(leaf.text)
            for character in leaf.text:
                texts.setdefault(character, set()).add(leaf.text)
        others = _merged(taken)
        return frozenset(
            text
            for text in beginning
            if text
            and len(texts[text[0]]) == 1
            and not _overlap(((ord(text[0]), ord(text[0])),), others)
        )

    def lark(self) -> str:
        """The whole grammar."""
        rules = [f"{self._names[name]}: {self._of(node)}" for name, node in self._rules.items()]
        return "\n".join(["%llguidance {}", *rules, *self._terminals])

    def _of(self, node: Node, is_lexeme: bool = False) -> str:
        match node:
            case Text(text):
                if is_lexeme or text in self._whole:
                    return literal(text)
                return " ".join(map(literal, text)) or EMPTY
            case Chars(ranges):
                return f"/[{''.join(map(_written, ranges))}]/"
            case Rule(name):
                if is_lexeme:
                    return f"({self._of(self._rules[name], is_lexeme)})"
                return self._names[name]
            case Sequence():
                return self._of_sequence(node, is_lexeme)
            case Either(options):
                return "(" + " | ".join(self._of(option, is_lexeme) for option in options) + ")"
            case Repeat(part, least, most):
                return f"({self._of(part, is_lexeme)}){_times(least, most)}"

    def _of_sequence(self, node: Sequence, is_lexeme: bool) -> str:
        parts = node.parts
        if is_lexeme or id(node) not in self._spans:
            return " ".join(self._of(part, is_lexeme) for part in parts) or EMPTY
        first, end = self._spans[id(node)]
        name = f"T{len(self._terminals)}"
        self._terminals.append("")
        body = " ".join(self._of(part, is_lexeme=True) for part in parts[first:end])
        self._terminals[int(name[1:])] = f"{name}: {body}"
        before = [self._of(part) for part in parts[:first]]
        return " ".join([*before, name, *(self._of(part) for part in parts[end:])])


def _written(span: tuple[int, int]) -> str:
    low, high = span
    return f"\\u{{{low:x}}}" if low == high else f"\\u{{{low:x}}}-\\u{{{high:x}}}"


def _times(least: int, most: int | None) -> str:
    match (least, most):
        case (0, None):
            return "*"
        case (1, None):
            return "+"
        case (0, 1):
            return "?"
        case _:
            return f"{{{least},{'' if most is None else most}}}"
