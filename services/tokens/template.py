"""A chat template, as engines run it: text in Jinja, with the variables that `transformers` gives it.

Source: `transformers.utils.chat_template_utils` (environment, filters, functions) and vLLM's `renderers/hf.py` (in which
form a template wants the content of messages, which of a request's variables it gets).
"""

from __future__ import annotations

import json
from collections import deque
from typing import TYPE_CHECKING, Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvplane.services.tokens.errors import Elsewhere, Unusable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from jinja2.parser import Parser

LONGEST_TEMPLATE = 1 << 20


class _Generation(Extension):
    """`{% generation %}` marks what a model wrote; for a prompt it means nothing."""

    tags = {"generation"}  # noqa: RUF012 - as in jinja2

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox, which asks nothing about keys of plain data: templates do little else, and it takes half of their time."""

    def getattr(self, obj: Any, attribute: str) -> Any:  # noqa: ANN401 - as in jinja2
        if type(obj) is dict and attribute in obj and not hasattr(dict, attribute):
            return obj[attribute]
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:  # noqa: ANN401 - as in jinja2
        if type(obj) is dict and type(argument) is str and argument in obj:
            return obj[argument]
        return super().getitem(obj, argument)


def _refused(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _as_json(
    value: Any,  # noqa: ANN401 - whatever a template has
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002 - a filter's arguments are named by templates
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    if indent is None and separators is None and not ensure_ascii and not sort_keys and hasattr(value, "as_json"):
        return str(value.as_json())
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> _Sandbox:
    made = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    made.filters["tojson"] = _as_json
    made.globals["raise_exception"] = _refused
    return made


class Template:
    """One template. `special` are the special tokens that it may name, such as `bos_token`. Raises `Unusable`."""

    def __init__(self, text: str, special: Mapping[str, str]) -> None:
        if len(text) > LONGEST_TEMPLATE:
            raise Unusable(f"the chat template has {len(text):,} characters; the limit is {LONGEST_TEMPLATE:,}")
        environment = _environment()
        try:
            tree = environment.parse(text)
            self._compiled = environment.from_string(text)
        except jinja2.TemplateError as error:
            raise Unusable(f"the chat template is no Jinja: {error}") from None
        self._special = dict(special)
        self.variables = frozenset(meta.find_undeclared_variables(tree))
        self.by_date = "strftime_now" in self.variables
        """It writes today's date, of the engine's clock."""
        self.parts = next(_loops_over_content(tree), None) is not None
        """It takes the content of messages as a list of parts, not as text."""
        self.developer = '"developer"' in text or "'developer'" in text
        """It knows the role `developer`."""

    def text(
        self, messages: Sequence[Mapping[str, Any]], tools: object, variables: Mapping[str, Any], *, prompt: bool
    ) -> str:  # fmt: skip
        """What the model reads; with `prompt` it ends where the model answers. Raises `Elsewhere` if it refuses."""
        given = {name: value for name, value in variables.items() if name in self.variables}
        try:
            return self._compiled.render(
                **{**self._special, "documents": None, **given}, messages=messages, tools=tools,
                add_generation_prompt=prompt,
            )  # fmt: skip
        except Exception as error:  # noqa: BLE001 - a template is a program of somebody else's
            raise Elsewhere(f"the chat template refuses the request: {error}") from None


def _is_name(node: nodes.Node | None, name: str) -> bool:
    return isinstance(node, nodes.Name) and node.ctx == "load" and node.name == name


def _reads(node: nodes.Node | None, name: str, key: str = "") -> bool:
    """Whether it is the variable, or its field `key`, perhaps filtered or sliced."""
    while isinstance(node, (nodes.Filter, nodes.Test)) or (
        isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
    ):
        node = node.node
    if not key:
        return _is_name(node, name)
    if isinstance(node, nodes.Getitem):
        return _is_name(node.node, name) and isinstance(node.arg, nodes.Const) and node.arg.value == key
    return isinstance(node, nodes.Getattr) and _is_name(node.node, name) and node.attr == key


def _names_of_messages(tree: nodes.Template) -> Iterator[str]:
    """Variables that hold a message in a loop over all of them."""
    lists, found = deque(["messages"]), ["messages"]
    while lists:
        name = lists.popleft()
        for assign in tree.find_all(nodes.Assign):
            target = assign.target
            if _reads(assign.node, name) and isinstance(target, nodes.Name) and target.name not in found:
                found.append(target.name)
                lists.append(target.name)
    for loop in tree.find_all(nodes.For):
        if isinstance(loop.target, nodes.Name) and any(_reads(loop.iter, name) for name in found):
            yield loop.target.name


def _loops_over_content(tree: nodes.Template) -> Iterator[nodes.For]:
    """Loops over the content of a message, also inside macros to which it is given."""
    messages = list(_names_of_messages(tree))
    in_macros: dict[int, set[str]] = {}
    for macro in tree.find_all(nodes.Macro):
        arguments = [argument.name for argument in macro.args]
        taken = set()
        for call in tree.find_all(nodes.Call):
            if isinstance(call.node, nodes.Name) and call.node.name == macro.name:
                pairs = [*zip(arguments, call.args, strict=False), *((each.key, each.value) for each in call.kwargs)]
                taken |= {
                    argument for argument, value in pairs if any(_reads(value, each, "content") for each in messages)
                }
        for loop in macro.find_all(nodes.For):
            in_macros[id(loop)] = taken & set(arguments)
    for loop in tree.find_all(nodes.For):
        over = loop.iter.name if isinstance(loop.iter, nodes.Name) else ""
        inside = in_macros.get(id(loop))
        if (
            any(_reads(loop.iter, name, "content") for name in messages)
            or (inside is not None and over in inside)
            or (inside is None and over == "content")
        ):
            yield loop
