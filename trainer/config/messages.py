"""Error messages for invalid configurations: what was found, what was expected, what to do."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from comfy_tdpo.user_files import check_name

AT_ONCE = 3  # errors reported at once
ON_COMMAND_LINE = ("preset", "config", "run_dir", "resume", "print_config")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
_ESCAPES = {"\n": "a line break", "\t": "a tab", "\b": "a backspace", "\f": "a form feed", "\r": "a carriage return"}


def check_text(value: Any, name: str = "") -> None:
    """Raise ValueError if a text in nested plain values has characters that no setting may contain."""
    if isinstance(value, dict):
        for key, inner in value.items():
            check_text(str(key), name)
            check_text(inner, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list):
        for inner in value:
            check_text(inner, name)
    elif isinstance(value, str) and (found := _CONTROL.search(value)):
        what = _ESCAPES.get(found[0], f"the control character U+{ord(found[0]):04X}")
        raise ValueError(
            f"{name}: got {value!r:.200}, which contains {what}; expected text on one line: in TOML, write a path in "
            "single quotes or with forward slashes, since a backslash in double quotes starts an escape"
        )
    elif isinstance(value, str):
        check_name(value)


def nearest(name: str, known: Mapping[str, str]) -> list[str]:
    """At most three settings a wrong `name` may mean, likeliest first; `known` maps dotted names to descriptions."""
    last = _last(name)
    if elsewhere := [other for other in known if _last(other) == last]:
        return get_close_matches(name, elsewhere, n=1, cutoff=0.75) or elsewhere[:3]
    if close := get_close_matches(name, known, n=1, cutoff=0.75):
        return close
    ends = get_close_matches(last, {_last(other) for other in known}, n=1, cutoff=0.75)
    words = last.replace("_", " ").replace("-", " ")
    described = [other for other, text in known.items() if len(words) > 6 and text.startswith(words)]
    return described[:3] or [other for other in known if _last(other) in ends][:3]


def _last(name: str) -> str:
    return name.lstrip("-").rpartition(".")[2]


def explain(
    errors: Sequence[Any], fields: Mapping[str, FieldInfo], elsewhere: Callable[[str], list[str]] = lambda name: []
) -> str:
    """Pydantic's errors in one line.

    fields: the dotted names of all settings, and their fields; elsewhere: of a setting or a section that is not among
    them, the names of the algorithms that use it.
    """
    told = [_explain(detail, fields, elsewhere) for detail in errors[:AT_ONCE]]
    more = len(errors) - len(told)
    return "; ".join(told) + (f"; and {more} more like these" if more else "")


def _explain(detail: Any, fields: Mapping[str, FieldInfo], elsewhere: Callable[[str], list[str]]) -> str:
    name = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        if algorithms := elsewhere(name):
            return f"{name} is for other algorithms; remove it, or choose {', '.join(algorithms)}"
        return f"unknown setting {name!r}; {_remedy_for_unknown(name, detail['input'], fields)}"
    message = detail["msg"].removeprefix("Value error, ")
    if not name:
        return message
    got = f"{name}: got {detail['input']!r:.120}"
    if detail["type"] == "value_error":
        return f"{got}; {message}"
    return f"{got}; expected {_expected_at(name, fields) or message}{_remedy(detail, name in fields)}"


def _remedy_for_unknown(name: str, value: Any, fields: Mapping[str, FieldInfo]) -> str:
    section, _, _ = name.rpartition(".")
    if name.replace("-", "_") in ON_COMMAND_LINE:
        return f"it is a command-line option, --{name.replace('_', '-')}: remove it from the file"
    if name in ("reward", "eval_reward", "guard"):
        return f"did you mean {name}s?"
    if isinstance(value, dict):
        meant = [f"[{one}]" for one in nearest(name, {known.partition(".")[0]: "" for known in fields if "." in known})]
    else:
        meant = nearest(name, {known: str(info.description) for known, info in fields.items()})
    if meant:
        return f"did you mean {' or '.join(meant)}?"
    inside = [_last(known) for known in fields if section and known.startswith(f"{section}.")]
    return f"[{section}] has {', '.join(inside)}" if inside else "--print-config lists them all"


def _remedy(detail: Any, is_setting: bool) -> str:
    value, key = detail["input"], detail["loc"][-1]
    if isinstance(value, dict) and value and not is_setting and detail["type"] in ("float_type", "string_type"):
        return f'; a name with a dot needs quotes: "{key}.{next(iter(value))}" = ...'
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d+,\d+\s*", value):
        return "; write a decimal point, not a comma"
    return ""


# --- the values a field takes, in words


def _expected_at(name: str, fields: Mapping[str, FieldInfo]) -> str:
    """The values expected at a dotted name, which may be an entry of a table or a list; empty if they are unknown."""
    if name in fields:
        return expected(fields[name].annotation, fields[name].metadata)
    field = next((known for known in fields if name.startswith(f"{known}.")), None)
    if field:
        return expected(get_args(fields[field].annotation)[-1])
    return (
        f"a section, [{name}], with its own settings" if any(known.startswith(f"{name}.") for known in fields) else ""
    )


def expected(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """Describe the values of an annotated type: their kind and range, or the choices."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return expected(args[0], [*args[1:], *metadata])
    if origin in (Union, UnionType):
        metadata = list(metadata)
        return " or ".join('"none"' if part is type(None) else expected(part, metadata) for part in args)
    limits = _limits(metadata)
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if annotation is bool:
        return "true or false"
    if annotation in (int, float):
        return " ".join(filter(None, ["a whole number" if annotation is int else "a number", _range(limits)]))
    if annotation is str:
        return "text" + (" that is not empty" if limits.get("min_length") else "")
    if origin is list:
        return "a list of names"
    if origin is dict:
        return "a table, { NAME = VALUE }" + (" with at least one entry" if limits.get("min_length") else "")
    return ""


def _limits(metadata: Iterable[Any]) -> dict[str, Any]:
    limits: dict[str, Any] = {}
    for item in metadata:
        if isinstance(item, FieldInfo):
            limits |= _limits(item.metadata)
        for name in ("gt", "ge", "lt", "le", "min_length"):
            if getattr(item, name, None) is not None:
                limits[name] = getattr(item, name)
    return limits


def _range(limits: dict[str, Any]) -> str:
    if "ge" in limits and "le" in limits:
        return f"from {limits['ge']:g} to {limits['le']:g}"
    words = {"gt": "above", "ge": "of at least", "lt": "below", "le": "at most"}
    return " and ".join(f"{word} {limits[name]:g}" for name, word in words.items() if name in limits)
