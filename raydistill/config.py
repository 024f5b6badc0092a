"""Settings as trees of frozen dataclasses: dotted overrides, JSON, and a table a person can read.

Nothing here knows a particular setting. A tree is a dataclass instance; a field that holds another dataclass
instance is a section, every other field is a leaf, and a leaf is named by the dotted path to it
(`method.critic_updates_per_generator`). The command line, Tune spaces and tests all use these names.
"""

import ast
import dataclasses
import difflib
import enum
import functools
import inspect
import itertools
import json
import os
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

from raydistill.errors import ConfigError

T = TypeVar("T")

_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
    **dict.fromkeys(("none", "null"), None),
}


def apply_overrides(config: T, overrides: Sequence[str]) -> T:
    """A copy of `config` with `name=value` texts applied; the last of two for one name wins.

    A value is read as JSON, as a Python literal, as a word (`none`, `true`, `off`, `inf`), as plain text, or
    as a list without brackets (`999,749,499`): the first reading that the field's annotation accepts. All
    values are set together, so a check in `__post_init__` sees the final combination only.

    Raises ConfigError for a text that is not `name=value`, an unknown name (with the nearest valid one) and a
    value that the annotation refuses.
    """
    names = [name for name, _ in _leaves(config)]
    changes: dict[str, Any] = {}
    for override in overrides:
        name, separator, text = override.partition("=")
        name = name.strip()
        if not separator or not name:
            raise ConfigError(f"override {override!r} is not of the form name=value, as in {names[0]}=VALUE")
        owner, field = _find(config, name, override, names)
        changes[name] = _parse(text.strip(), _hints(type(owner))[field], name, getattr(owner, field))
    return typing.cast(T, _replace(config, changes, ""))


def to_dict(config: Any) -> dict[str, Any]:
    """The tree as JSON-able dictionaries: tuples become lists, paths text, enums their values.

    Raises ConfigError for a value that JSON has no form for.
    """
    return {field.name: _to_json(getattr(config, field.name), field.name) for field in _fields(config)}


def from_dict(template: T | type[T], data: Mapping[str, Any]) -> T:
    """The inverse of `to_dict`.

    `template` is an instance, which gives the class of every section and the value of each setting that
    `data` lacks, or a dataclass, whose annotations and defaults do. Raises ConfigError for an unknown
    setting, a refused value, or (with a class) a missing setting without default.
    """
    return typing.cast(T, _from_dict(template, data, ""))


def flatten(config: Any) -> dict[str, str | int | float | bool | None]:
    """Dotted name to JSON scalar, in the order of the fields; lists and mappings become compact JSON text."""
    flat: dict[str, str | int | float | bool | None] = {}
    for name, value in _leaves(config):
        plain = _to_json(value, name)
        flat[name] = json.dumps(plain, separators=(",", ":")) if isinstance(plain, (list, dict)) else plain
    return flat


def describe(config: Any, width: int = 110) -> str:
    """One line per setting: dotted name, value, and the string literal that stands under its field."""
    rows = [(name, _show(value), _help(config, name)) for name, value in _leaves(config)]
    name_width = max(len(name) for name, _, _ in rows)
    value_width = min(max(len(value) for _, value, _ in rows), 28)
    lines = []
    for name, value, text in rows:
        head = f"{name:<{name_width}}  {value:<{value_width}}"
        indent = " " * (name_width + value_width + 4)
        if len(value) > value_width and text:
            lines.append(head.rstrip())
            head = indent[:-2]
        wrapped = textwrap.wrap(
            text, max(width, len(indent) + 30), initial_indent=head + "  ", subsequent_indent=indent
        )
        lines.extend(wrapped or [head.rstrip()])
    return "\n".join(lines)


def _fields(config: Any) -> tuple[dataclasses.Field[Any], ...]:
    return tuple(field for field in dataclasses.fields(config) if field.init)


def _is_section(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in _fields(config):
        value = getattr(config, field.name)
        if _is_section(value):
            yield from _leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value


def _hints(owner: type) -> dict[str, Any]:
    return typing.get_type_hints(owner, include_extras=True)


def _find(config: Any, name: str, override: str, names: Sequence[str]) -> tuple[Any, str]:
    """The section that holds `name`, and the field's name in it."""
    *sections, last = name.split(".")
    owner = config
    for part in sections:
        owner = getattr(owner, part, None) if _is_section(owner) and _has(owner, part) else None
    if not _is_section(owner) or not _has(owner, last):
        raise ConfigError(f"unknown setting in {override!r}; did you mean {_nearest(name, names)}?")
    if _is_section(getattr(owner, last)) and type(None) not in typing.get_args(_hints(type(owner))[last]):
        inside = ", ".join(inner for inner in names if inner.startswith(f"{name}."))
        raise ConfigError(f"{override!r} names a section; set one of its settings instead: {inside}")
    return owner, last


def _has(owner: Any, name: str) -> bool:
    return any(field.name == name for field in _fields(owner))


def _nearest(name: str, names: Sequence[str]) -> str:
    """The valid name most like `name`, also where only the last part was written."""
    last = name.rpartition(".")[2]

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, name, candidate).ratio()
        end = difflib.SequenceMatcher(None, last, candidate.rpartition(".")[2]).ratio()
        return max(whole, 0.95 * end) + 0.01 * (whole + end)

    return max(names, key=likeness)


@functools.cache
def _adapter(annotation: Any) -> Any:
    # Imported here because `raydistill --help` has no use for it.
    from pydantic import TypeAdapter

    return TypeAdapter(annotation)


def _parse(text: str, annotation: Any, name: str, current: Any) -> Any:
    from pydantic import ValidationError

    problem: ValidationError | None = None
    for reading in _readings(text):
        try:
            return _validate(reading, annotation, name)
        except ValidationError as error:
            problem = problem or error
    assert problem is not None
    raise _refused(f"{name}={text}", annotation, problem, f"it is {_show(current)} now")


def _readings(text: str) -> Iterator[Any]:
    """What `text` may mean, the most literal reading first."""
    for read in (_read_json, ast.literal_eval):
        try:
            yield read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    if text.lower() in _WORDS:
        yield _WORDS[text.lower()]
    if text.lower() in ("inf", "+inf", "-inf"):
        yield float(text)
    yield text
    yield [_json_or_text(part.strip()) for part in text.split(",")] if text else []


def _json_or_text(text: str) -> Any:
    try:
        return _read_json(text)
    except ValueError:
        return text


def _read_json(text: str) -> Any:
    return json.loads(text, parse_constant=_infinity)


def _infinity(constant: str) -> float:
    if constant == "NaN":
        raise ValueError("NaN is never a setting")
    return float(constant)


def _validate(value: Any, annotation: Any, name: str) -> Any:
    """`value` (plain JSON types) as `annotation` wants it; ValidationError if it is something else.

    Strict, so that no text turns into a number and 5.0 is no integer. The detour over JSON lets a list stand
    for a tuple and text for a path, which strict mode refuses for Python objects.
    """
    from pydantic import PydanticUserError

    try:
        return _adapter(annotation).validate_json(json.dumps(value, default=str), strict=True)
    except PydanticUserError:
        raise ConfigError(f"{name} can't be set by text; its type is {_type_name(annotation)}") from None


def _refused(what: str, annotation: Any, error: Any, context: str) -> ConfigError:
    reasons = dict.fromkeys(problem["msg"].replace("Input should", "should") for problem in error.errors())
    return ConfigError(f"{what} is refused: {' or '.join(reasons)} ({_type_name(annotation)}; {context})")


def _type_name(annotation: Any) -> str:
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation.__name__
    return str(annotation).replace("typing.", "")


def _replace(config: Any, changes: Mapping[str, Any], prefix: str) -> Any:
    values: dict[str, Any] = {}
    for field in _fields(config):
        name = f"{prefix}{field.name}"
        current = getattr(config, field.name)
        if name in changes:
            values[field.name] = changes[name]
        elif _is_section(current) and any(change.startswith(f"{name}.") for change in changes):
            values[field.name] = _replace(current, changes, f"{name}.")
    return dataclasses.replace(config, **values) if values else config


def _to_json(value: Any, name: str) -> Any:
    if _is_section(value):
        return {
            field.name: _to_json(getattr(value, field.name), f"{name}.{field.name}")
            for field in _fields(value)
        }
    if isinstance(value, enum.Enum):
        return _to_json(value.value, name)
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)):
        return [_to_json(item, name) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _to_json(item, f"{name}.{key}") for key, item in value.items()}
    raise ConfigError(
        f"{name} is {value!r}, which has no form in JSON; settings are numbers, text, lists and mappings"
    )


def _from_dict(template: Any, data: Mapping[str, Any], prefix: str) -> Any:
    from pydantic import ValidationError

    owner = template if isinstance(template, type) else type(template)
    known = {field.name: field for field in _fields(owner)}
    values: dict[str, Any] = {} if template is owner else {name: getattr(template, name) for name in known}
    for key, value in data.items():
        name = f"{prefix}{key}"
        if key not in known:
            raise ConfigError(
                f"unknown setting {name}={value!r}; did you mean {prefix}{_nearest(key, list(known))}?"
            )
        section = values.get(key) if _is_section(values.get(key)) else _section_class(_hints(owner)[key])
        if section is not None and isinstance(value, Mapping):
            values[key] = _from_dict(section, value, f"{name}.")
            continue
        try:
            values[key] = _validate(value, _hints(owner)[key], name)
        except ValidationError as error:
            raise _refused(
                f"{name}={value!r}", _hints(owner)[key], error, "read from a saved config"
            ) from None
    for name, field in known.items():
        has_default = (
            field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        )
        if name not in values and not has_default:
            raise ConfigError(f"setting {prefix}{name} is missing and {owner.__name__} has no default for it")
    return owner(**values)


def _section_class(annotation: Any) -> type | None:
    """The dataclass that `X` or `X | None` names; None if there is none or a choice of several."""
    options = (
        typing.get_args(annotation)
        if typing.get_origin(annotation) in (typing.Union, types.UnionType)
        else (annotation,)
    )
    classes = [option for option in options if isinstance(option, type) and dataclasses.is_dataclass(option)]
    return classes[0] if len(classes) == 1 else None


def _show(value: Any) -> str:
    plain = _to_json(value, "value")
    return plain if isinstance(plain, str) and plain else json.dumps(plain)


def _help(config: Any, name: str) -> str:
    *sections, last = name.split(".")
    owner = functools.reduce(getattr, sections, config)
    kind: Any = type(owner)  # mypy takes no type object for hashable
    text = _field_docs(kind).get(last, "")
    annotation = _hints(kind)[last]
    if typing.get_origin(annotation) is not Literal:
        return text
    return f"{text} [{' | '.join(map(str, typing.get_args(annotation)))}]".strip()


@functools.cache
def _field_docs(owner: type) -> dict[str, str]:
    """The string literal under each annotated field, on one line, base classes included.

    They are in the source only, so this reads it; a class without source has no help texts.
    """
    docs: dict[str, str] = {}
    for base in reversed(owner.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError):
            continue
        body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
        for field, below in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                text = ast.literal_eval(below.value) if _is_text(below) else ""
                docs[field.target.id] = " ".join(text.split())
    return docs


def _is_text(node: ast.stmt) -> typing.TypeGuard[ast.Expr]:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
