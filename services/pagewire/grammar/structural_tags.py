"""Structural tags as a Lark grammar: free text, in which some texts begin parts that must match.

Two forms are read. vLLM's older one has `structures` (begin, schema, end) and `triggers`;
xgrammar's has a `format`, a tree of which these types are known: const_string, json_schema, regex,
any_text, sequence, or, tag, triggered_tags, tags_with_separator.
"""

from collections.abc import Callable
from typing import Any, Final

from .errors import GrammarError
from .lark import escaped

Node = dict[str, Any]
Pieces = Callable[[str], list[str]]
EMPTY: Final = '""'
FREE_TEXT: Final = "/(.|\\n)*/"
_KNOWN: Final[dict[str, tuple[str, ...]]] = {
    "const_string": ("value",),
    "json_schema": ("json_schema",),
    "any_text": ("excludes",),
    "regex": ("pattern",),
    "sequence": ("elements",),
    "or": ("elements",),
    "tag": ("begin", "content", "end"),
    "triggered_tags": ("triggers", "tags", "at_least_one", "stop_after_first", "excludes"),
    "tags_with_separator": ("tags", "separator", "at_least_one", "stop_after_first"),
}
"""What each type of a `format` may have beside its type. Anything else would change what matches,
and is refused."""
_USUAL_STYLE: Final = ("json_schema", "style", "json")
"""What programs write that give each field of theirs: as if not given."""


class _Rules:
    """The rules of one grammar, as they are made."""

    def __init__(
        self,
        schema_rule: Callable[[Any], str],
        regex_term: Callable[[str], str],
        pieces: Pieces,
    ) -> None:
        self.lines: list[str] = []
        self._schema_rule = schema_rule
        self._regex_term = regex_term
        self._pieces = pieces

    def text(self, value: Any) -> str:
        """A fixed text; nothing for an empty one."""
        if not isinstance(value, str):
            raise GrammarError(f"a structural tag has {value!r:.40} where a text belongs")
        return " ".join(self._pieces(value))

    def add(self, body: str, *, lexeme: bool = False, options: str = "") -> str:
        """A new rule, by its name."""
        name = f"{'T' if lexeme else 'r'}{len(self.lines)}"
        self.lines.append(f"{name}{options}: {body or EMPTY}")
        return name

    def schema(self, schema: Any) -> str:
        """Text that matches a JSON schema."""
        return self.add(self._schema_rule(schema))

    def regex(self, pattern: str) -> str:
        """Text that matches a regular expression."""
        return self.add(self._regex_term(pattern), lexeme=True)

    def free_text(self, excludes: list[str]) -> str:
        """Any text without special tokens and without the texts `excludes`."""
        if not excludes:
            return self.add(FREE_TEXT, lexeme=True)
        texts = "|".join(map(escaped, excludes))
        return self.add(f"{FREE_TEXT} & ~/(.|\\n)*({texts})(.|\\n)*/", lexeme=True)

    def up_to(self, text: str, excludes: list[str]) -> str:
        """Free text that ends with `text` where that first comes."""
        terms = self._pieces(text)
        free = self.free_text(excludes)
        if terms[0].startswith("<["):
            return self.add(" ".join([free, *terms]))
        if len(terms) > 1:
            raise GrammarError(f"a special token within {text[:80]!r} cannot end free text")
        return self.add(f"{free} {terms[0]}", options="[lazy]")


def lark_of_tags(
    tag: Any,
    schema_rule: Callable[[Any], str],
    regex_term: Callable[[str], str],
    pieces: Pieces,
) -> str:
    """`schema_rule` gives the body of a rule for JSON by a schema, `regex_term` that for an
    expression, `pieces` the terms of a rule for a fixed text. Raises GrammarError."""
    if not isinstance(tag, dict):
        raise GrammarError("a structural tag must be an object")
    rules = _Rules(schema_rule, regex_term, pieces)
    form = tag.get("format")
    older = form is None
    start = _triggered(_older_tags(tag, rules), tag, rules) if older else _node(form, rules)
    return "\n".join(["%llguidance {}", f"start: {start}", *rules.lines])


def _older_tags(tag: Node, rules: _Rules) -> list[tuple[str, str]]:
    structures = tag.get("structures")
    if not isinstance(structures, list) or not structures:
        raise GrammarError("a structural tag needs `structures`, or a `format`")
    tags: list[tuple[str, str]] = []
    for structure in structures:
        if not isinstance(structure, dict) or not isinstance(structure.get("begin"), str):
            raise GrammarError("each of `structures` needs a `begin`")
        rest = rules.schema(structure.get("schema") or {})
        tags.append((structure["begin"], f"{rest} {rules.text(structure.get('end') or '')}"))
    return tags


def _triggered(tags: list[tuple[str, str]], node: Node, rules: _Rules) -> str:
    """Free text in which the tags (how each begins; the rest of it) come, each by one of the
    triggers of `node`."""
    triggers = node.get("triggers")
    excludes = _excludes(node)
    if not isinstance(triggers, list) or not all(isinstance(t, str) and t for t in triggers):
        raise GrammarError("a structural tag needs `triggers`, texts that are not empty")
    options: list[str] = []
    for trigger in triggers:
        bodies = [
            f"{rules.text(begin[len(trigger) :])} {rest}"
            for begin, rest in tags
            if begin.startswith(trigger)
        ]
        if bodies:
            options.append(f"{rules.up_to(trigger, excludes)} ({' | '.join(bodies)})")
    if sum(any(begin.startswith(t) for t in triggers) for begin, _ in tags) < len(tags):
        raise GrammarError("every `begin` of a structural tag must start with one of `triggers`")
    tag_rule = rules.add(" | ".join(options))
    at_least_one = bool(node.get("at_least_one"))
    end = rules.free_text(excludes)
    if node.get("stop_after_first"):
        return tag_rule if at_least_one else f"{tag_rule} | {end}"
    return f"{tag_rule}{'+' if at_least_one else '*'} {end}"


def _excludes(node: Node) -> list[str]:
    """The texts that free text must not have in it."""
    excludes = node.get("excludes") or []
    if not isinstance(excludes, list) or not all(isinstance(e, str) and e for e in excludes):
        raise GrammarError("the `excludes` of a structural tag are texts that are not empty")
    return excludes


def _check_keys(node: Node, kind: str) -> None:
    for name, value in node.items():
        if name in ("type", *_KNOWN[kind]) or value is None:
            continue
        if (kind, name, value) != _USUAL_STYLE:
            raise GrammarError(f"a structural tag's {kind} with `{name[:40]}` is not supported")


def _node(node: Any, rules: _Rules) -> str:
    """The expression for one node of a `format`."""
    if not isinstance(node, dict):
        raise GrammarError("a `format` of a structural tag is an object with a `type`")
    kind = node.get("type")
    if isinstance(kind, str) and kind in _KNOWN:
        _check_keys(node, kind)
    match kind:
        case "const_string":
            return rules.text(node.get("value")) or EMPTY
        case "json_schema":
            return rules.schema(node.get("json_schema", {}))
        case "any_text":
            return rules.free_text(_excludes(node))
        case "regex":
            return rules.regex(_text(node, "pattern"))
        case "sequence":
            return rules.add(" ".join(_node(part, rules) for part in _list(node, "elements")))
        case "or":
            return rules.add(" | ".join(_node(part, rules) for part in _list(node, "elements")))
        case "tag":
            begin, rest = _tag(node, rules)
            return rules.add(f"{rules.text(begin)} {rest}")
        case "triggered_tags":
            tags = [_tag(part, rules) for part in _list(node, "tags")]
            return rules.add(_triggered(tags, node, rules))
        case "tags_with_separator":
            return _separated(node, rules)
        case other:
            raise GrammarError(f"a structural tag's format of type {other!r:.40} is not supported")


def _tag(node: Any, rules: _Rules) -> tuple[str, str]:
    """How it begins, and the expression for the rest."""
    if not isinstance(node, dict):
        raise GrammarError("a tag of a structural tag is an object")
    _check_keys(node, "tag")
    end = node.get("end") or ""
    content = node.get("content", {})
    ends = end if isinstance(end, list) else [end]
    if isinstance(content, dict) and content.get("type") == "any_text":
        if not all(isinstance(e, str) and e for e in ends):
            raise GrammarError("a tag with any text in it needs an `end`")
        _check_keys(content, "any_text")
        excludes = _excludes(content)
        texts = " | ".join(rules.up_to(end, excludes) for end in ends)
        return _text(node, "begin"), f"({texts})"
    closing = " | ".join(rules.text(e) or EMPTY for e in ends)
    return _text(node, "begin"), f"{_node(content, rules)} ({closing})"


def _separated(node: Node, rules: _Rules) -> str:
    tags = [_tag(part, rules) for part in _list(node, "tags")]
    tag_rule = rules.add(" | ".join(f"{rules.text(begin)} {rest}" for begin, rest in tags))
    body = tag_rule
    if not node.get("stop_after_first"):
        body += f" ({rules.text(node.get('separator') or '')} {tag_rule})*"
    return rules.add(body if node.get("at_least_one") else f"({body})?")


def _list(node: Node, name: str) -> list[Any]:
    values = node.get(name)
    if not isinstance(values, list) or not values:
        raise GrammarError(f"a structural tag's {node.get('type')} needs `{name}`")
    return values


def _text(node: Node, name: str) -> str:
    value = node.get(name)
    if not isinstance(value, str) or not value:
        raise GrammarError(f"a structural tag's {node.get('type', 'tag')} needs `{name}`")
    return value
