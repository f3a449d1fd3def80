"""Read a RunConfig from one YAML file and command-line overrides.

Nothing is ignored: an unknown key is refused with its nearest match, a value of the wrong type with the type
that was expected, and both with the place they came from.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from metier.catalogue.method import Part
from metier.catalogue.options import option_types, read_option
from metier.catalogue.tree import method_of
from metier.config import DEFAULT_METHOD, RunConfig
from metier.errors import ConfigError

_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")
_NONE = ("none", "null", "~")
_COMMAND_LINE = "command line"


def load_run_config(
    path: str | Path | None, overrides: Sequence[str] = (), *, not_needed: Mapping[str, Any] | None = None
) -> RunConfig:
    """Read a run's configuration.

    Args:
        path: a YAML file of RunConfig's keys, or None.
        overrides: command-line tokens, which go before the file: `--key value`, `--key=value`, and for
            booleans `--key` and `--no-key`. Dashes within a key count as underscores.
        not_needed: keys that may be missing although a run needs them, and what stands for them then.

    Raises:
        ConfigError: an unknown key (naming the nearest one), a wrong type, a missing key, a value out of
            range.
    """
    values = dict(not_needed or {}) | ({} if path is None else _read_file(Path(path)))
    return _made(values | _read_overrides(overrides), "command line" if path is None else str(path))


def load_method_configs(
    path: str | Path | None,
    overrides: Sequence[str],
    methods: Sequence[str],
    *,
    left_out: Callable[[str], set[str]],
    not_needed: Mapping[str, Any] | None = None,
) -> tuple[list[RunConfig], dict[str, str]]:
    """One run with each of several methods: every key goes to those that may have it.

    Of the file, where a method goes (`targets`), its options and its format of the base are for its own method alone.

    Args:
        path, overrides, not_needed: as `load_run_config`.
        methods: of the catalogue.
        left_out: says which keys of a run a method would pass over or refuse.

    Returns:
        the runs, and the methods that cannot have these keys with the reason.

    Raises:
        ConfigError: as `load_run_config`; a key on the command line that none of the methods has; or all refuse.
    """
    file, said = {} if path is None else _read_file(Path(path)), _read_overrides(overrides)
    values, own = dict(not_needed or {}) | file | said, method_of(file.get("method", DEFAULT_METHOD)).name
    where = _COMMAND_LINE if path is None else str(path)
    if path is not None:
        for key in file:
            if not _may_have(own, key, file[key]):
                # a key that its own method has not is a mistake, and refused as it would be there
                _made(values | {"method": own}, where)
    of_own = {key for key, value in file.items() if isinstance(value, _Foreign) or key == "targets"}
    if file.get("base_format") is not None and file["base_format"] == method_of(own).base_format:
        of_own.add("base_format")
    configs: list[RunConfig] = []
    refused: dict[str, ConfigError] = {}
    taken: set[str] = set()
    for name in methods:
        mine = {
            key: value
            for key, value in values.items()
            if key != "method"
            and key not in left_out(name)
            and (key in said or name == own or key not in of_own)
            and _may_have(name, key, value)
        }
        taken |= mine.keys()
        try:
            configs.append(_made({**mine, "method": name}, where))
        except ConfigError as error:
            refused[name] = error
    for key in said:
        if key not in taken:
            known = {option for name in methods for option in option_types(name)} - set(_names())
            why = "is for none of" if key in _names() or key in known else "is unknown to"
            raise ConfigError(
                f"{_COMMAND_LINE}: --{key} {why} the methods {', '.join(methods)}. {_hint_for(key, methods[0], known)}"
            )
    if not configs:
        raise next(iter(refused.values()))
    return configs, {name: str(error).splitlines()[0] for name, error in refused.items()}


def _may_have(method: str, key: str, value: object) -> bool:
    """Whether a key is one of a run's own, or an option of the method, and names a place that this can go on."""
    if isinstance(value, _Foreign):
        return key in option_types(method) or key.removeprefix("no_") in option_types(method)
    if key != "targets" or value is None:
        return True
    found = method_of(method)
    wanted = {part.strip() for part in str(value).split(",")} & set(get_args(Part))
    return bool(found.targets or "routed" in found.can_target) and wanted <= set(found.can_target)


def run_config_of(values: Mapping[str, object], *, where: str) -> RunConfig:
    """A run's configuration from keys that another file has, such as a comparison's.

    Args:
        values: as YAML has them.
        where: the place they came from, for errors.

    Raises:
        ConfigError: as `load_run_config`.
    """
    own = _names()
    read = {key: _convert(key, value, where) if key in own else _Foreign(value, where) for key, value in values.items()}
    return _made(read, where)


def _made(values: dict[str, Any], where: str) -> RunConfig:
    foreign = {key: value for key, value in values.items() if isinstance(value, _Foreign)}
    values = {key: value for key, value in values.items() if key not in foreign}
    options = _method_options(method_of(values.get("method", DEFAULT_METHOD)).name, foreign)
    missing = [field.name for field in _own_fields() if _is_required(field, values)]
    if missing:
        raise ConfigError(
            f"{where}: missing {_plural(missing, 'key')} {', '.join(missing)}. "
            f"Add {'them' if len(missing) > 1 else 'it'} to the YAML file or the command line, "
            f"e.g. --{missing[0]} VALUE."
        )
    return RunConfig(**values, method_options=options)


@dataclasses.dataclass(frozen=True, slots=True)
class _Foreign:
    """The value of a key that is none of a run's own, so perhaps one of its method's."""

    value: object
    where: str


def _method_options(method: str, foreign: Mapping[str, _Foreign]) -> dict[str, Any]:
    """Those keys as the method's options.

    Raises:
        ConfigError: a key that is no option of it either.
    """
    if not foreign:
        return {}
    known = {name for name in option_types(method) if name not in _names()}
    options = {}
    for key, given in foreign.items():
        if key.startswith("no_") and given.value is True and key[3:] in known:
            key, given = key[3:], _Foreign(False, given.where)
        if key not in known:
            raise ConfigError(f"{given.where}: unknown key '{key}'. {_hint_for(key, method, known)}")
        options[key] = read_option(method, key, given.value, given.where)
    return options


def _hint_for(key: str, method: str, known: set[str]) -> str:
    nearest = difflib.get_close_matches(key, [*_names(), *known], n=1, cutoff=0.5)
    if nearest:
        return f"Did you mean '{nearest[0]}'?"
    options = f" Options of {method} are: {', '.join(sorted(known))}." if known else ""
    return f"The keys are: {', '.join(_names())}.{options}"


def _names() -> list[str]:
    """A run's own keys."""
    return [field.name for field in _own_fields()]


def _own_fields() -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(RunConfig) if field.name != "method_options"]


def describe_fields() -> list[tuple[str, str, str, str]]:
    """Name, type, default and meaning of each key, for help texts; the meaning is the field's docstring."""
    import ast
    import inspect

    body = ast.parse(inspect.getsource(RunConfig)).body[0]
    assert isinstance(body, ast.ClassDef)
    meanings = {
        statement.target.id: following.value.value
        for statement, following in zip(body.body, body.body[1:], strict=False)
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and isinstance(following, ast.Expr)
        and isinstance(following.value, ast.Constant)
    }
    hints = get_type_hints(RunConfig)
    return [
        (
            field.name,
            _type_name(hints[field.name]),
            "required" if field.default is dataclasses.MISSING else str(field.default),
            str(meanings[field.name]),
        )
        for field in _own_fields()
    ]


def _read_file(path: Path) -> dict[str, Any]:
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). Give a YAML file of a run's keys.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not YAML: {error}") from error
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}: expected `key: value` lines at the top level.")
    values: dict[str, Any] = {}
    constructor = yaml.SafeLoader("")
    for key_node, value_node in root.value:
        where = f"{path}:{key_node.start_mark.line + 1}"
        key = str(key_node.value)
        if key in values:
            raise ConfigError(f"{where}: key '{key}' stands in the file twice; keep one of them.")
        value = constructor.construct_object(value_node, deep=True)
        values[key] = _convert(key, value, where) if key in _names() else _Foreign(value, where)
    return values


def _read_overrides(tokens: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--") or token == "--":
            raise ConfigError(
                f"{_COMMAND_LINE}: got '{token}' where a --key was expected. "
                f"A run's YAML file stands first: metier train run.yaml --key value."
            )
        name, has_value, text = token[2:].partition("=")
        name = name.replace("-", "_")
        if name.startswith("no_") and _is_bool(name[3:]) and not has_value:
            values[name[3:]] = False
            continue
        key, is_foreign = name, name not in _names()
        follows_none = not rest or rest[0].startswith("--")
        if has_value:
            values[key] = _Foreign(text, _COMMAND_LINE) if is_foreign else _convert(key, text, _COMMAND_LINE)
        elif is_foreign:
            # without a value it may be a switch, which its type then says
            values[key] = _Foreign(True if follows_none else rest.pop(0), _COMMAND_LINE)
        elif _is_bool(key):
            follows = bool(rest) and rest[0].lower() in (*_TRUE, *_FALSE)
            values[key] = _convert(key, rest.pop(0), _COMMAND_LINE) if follows else True
        elif follows_none:
            raise ConfigError(f"{_COMMAND_LINE}: --{key} needs a value: {_type_name(_hint(key))}.")
        else:
            values[key] = _convert(key, rest.pop(0), _COMMAND_LINE)
    return values


def _convert(key: str, value: object, where: str) -> Any:
    """The value in its field's type. Texts are parsed: YAML reads 1e-4 as a text, for one."""
    hint = _hint(key)
    is_none = value is None or (isinstance(value, str) and value.lower() in _NONE)
    if is_none and type(None) in get_args(hint):
        return None
    kind = _without_none(hint)
    result = None if value is None else _parse(kind, value)
    if result is None:
        raise ConfigError(f"{where}: {key} must be {_type_name(hint)}, got {value!r}.")
    return result


def _parse(kind: Any, value: object) -> Any:
    """The value as `kind`, or None where it is not one."""
    if get_origin(kind) is Literal:
        return value if value in get_args(kind) else None
    if kind is bool:
        word = str(value).lower()
        return True if word in _TRUE else False if word in _FALSE else None
    if isinstance(value, bool):
        return None
    if kind is str:
        return value if isinstance(value, str) else str(value) if isinstance(value, int | float) else None
    if not isinstance(value, str | int | float) or (kind is int and isinstance(value, float)):
        return None
    try:
        number = kind(value)
    except ValueError:
        return None
    return number if number == number and abs(number) != float("inf") else None


def _is_required(field: dataclasses.Field[Any], values: dict[str, Any]) -> bool:
    return field.default is dataclasses.MISSING and field.name not in values


def _hint(key: str) -> Any:
    return get_type_hints(RunConfig)[key]


def _without_none(hint: Any) -> Any:
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    return next(kind for kind in get_args(hint) if kind is not type(None))


def _is_bool(key: str) -> bool:
    return key in RunConfig.__annotations__ and _hint(key) is bool


def _type_name(hint: Any) -> str:
    kind = _without_none(hint)
    if get_origin(kind) is Literal:
        name = " or ".join(get_args(kind))
    else:
        name = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}[kind]
    return name if kind is hint else f"{name} (or null)"


def _plural(items: Sequence[object], noun: str) -> str:
    return noun if len(items) == 1 else f"{noun}s"
