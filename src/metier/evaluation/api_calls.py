"""`api_iou` and `call_iou`: how much the APIs that a reply names have in common with the right ones.

`api_iou` is the text-to-API measure of MEFT (arXiv:2406.04984, "Tool"): a reply lists APIs, and an API is the first
three fields of its line. `call_iou` is for replies that are calls themselves, as JSON or as code, and counts their
names and arguments.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from metier.errors import DataError
from metier.evaluation.code_block import code_of
from metier.evaluation.item_scores import ItemScores, mean_of_items

_LISTED_BEFORE = "API MAIN INFO:"
_NUM_FIELDS = 3
_TOOL_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_UNREADABLE = (SyntaxError, ValueError, TypeError, RecursionError, MemoryError)
"""What Python's and JSON's parsers raise on a text that is none of theirs, however deep it nests."""

Elements = frozenset[tuple[str, ...]]


def api_iou(replies: Sequence[str], references: Sequence[str]) -> ItemScores:
    """Mean of 100 × |reply ∩ reference| / |reply ∪ reference| over the APIs that each lists.

    APIs are parted by blank lines. One is told from another by its first three fields between commas (category,
    tool, API), without regard to case or white space around them; what follows, such as a description, does not
    count, nor do lines' beginnings "API MAIN INFO:". An empty reply is counted as unreadable.

    Source: the evaluation that MEFT published, which does not strip white space and counts an empty piece as an API.

    Raises:
        DataError: a reference that lists no API.
    """
    return _mean_iou(replies, references, _listed_apis, "api_iou", "lists no API")


def call_iou(replies: Sequence[str], references: Sequence[str]) -> ItemScores:
    """Mean of 100 × |reply ∩ reference| / |reply ∪ reference| over names and arguments of calls.

    A call of `f` with two arguments is three elements: the name, and each argument with the name and its value. So
    the right function with one of two arguments right scores 2 of 4. An argument given by position equals none that
    is given by keyword; values are compared as JSON values (1 equals 1.0 but not true), other expressions as code.

    Calls are read from JSON (`{"name": …, "arguments": {…}}`, a list of such, OpenAI's `tool_calls`), between
    `<tool_call>` tags, or from Python (`f(1, b=2)`, also assigned to a name, several in lines or in one list), each
    inside a code fence or not. Anything else is counted as unreadable.

    Raises:
        DataError: a reference that is no call.
    """
    return _mean_iou(replies, references, _called, "call_iou", "is no call")


def _mean_iou(
    replies: Sequence[str], references: Sequence[str], read: Callable[[str], Elements], metric: str, fault: str
) -> ItemScores:
    items: list[float] = []
    num_unparsed = 0
    for position, (reply, reference) in enumerate(zip(replies, references, strict=True)):
        expected, got = read(reference), read(reply)
        if not expected:
            raise DataError(
                f"test item {position}: the reference {fault}: got {reference[:80]!r}.\n"
                f"{metric} compares with what the reference names; mend the record or use another metric."
            )
        num_unparsed += not got
        items.append(100.0 * len(expected & got) / len(expected | got))
    return mean_of_items(items, num_unparsed=num_unparsed)


def _listed_apis(text: str) -> Elements:
    listed = (part.replace(_LISTED_BEFORE, "").strip().lower() for part in re.split(r"\n\s*\n", text))
    return frozenset(tuple(field.strip() for field in part.split(",")[:_NUM_FIELDS]) for part in listed if part)


def _called(text: str) -> Elements:
    tagged = _TOOL_CALL.findall(text)
    found: set[tuple[str, ...]] = set()
    for part in tagged or [code_of(text)]:
        try:
            found.update(_elements(part.strip()))
        except _UNREADABLE:
            return frozenset()
    return frozenset(found)


def _elements(text: str) -> Iterator[tuple[str, ...]]:
    try:
        value = json.loads(text)
    except ValueError:
        yield from _python_elements(ast.parse(text).body)
    else:
        yield from _json_elements(value)


def _json_elements(value: Any) -> Iterator[tuple[str, ...]]:
    if isinstance(value, list):
        for item in value:
            yield from _json_elements(item)
        return
    if not isinstance(value, dict):
        raise ValueError(f"got a JSON {type(value).__name__}, expected calls")
    if "tool_calls" in value or "function" in value:
        yield from _json_elements(value.get("tool_calls", value.get("function")))
        return
    name, arguments = value.get("name"), value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):  # OpenAI's form: the JSON text of an object
        arguments = json.loads(arguments)
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ValueError("a call without a name or with arguments that are no object")
    yield (name,)
    for argument, given in arguments.items():
        yield (name, argument, _written(given))


def _python_elements(statements: Sequence[ast.stmt]) -> Iterator[tuple[str, ...]]:
    for statement in statements:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            continue
        if not isinstance(statement, ast.Expr | ast.Assign):
            raise ValueError(f"got {type(statement).__name__}, expected calls")
        listed = isinstance(statement.value, ast.List | ast.Tuple)
        for call in statement.value.elts if listed else [statement.value]:  # type: ignore[attr-defined]
            if not isinstance(call, ast.Call):
                raise ValueError(f"got {type(call).__name__}, expected a call")
            name = ast.unparse(call.func)
            yield (name,)
            for position, given in enumerate(call.args):
                yield (name, str(position), _value(given))
            for keyword in call.keywords:
                yield (name, keyword.arg or "**", _value(keyword.value))


def _value(node: ast.expr) -> str:
    try:
        return _written(ast.literal_eval(node))
    except ValueError:  # a name, a call, an expression
        return ast.unparse(node)


def _written(value: Any) -> str:
    """One text for equal values, in which true differs from 1."""
    return json.dumps(_plain(value), sort_keys=True, default=repr)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
