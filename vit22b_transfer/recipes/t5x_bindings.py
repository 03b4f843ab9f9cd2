"""The bindings that gin has read for a run of T5X, and whether T5X heeds them."""

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

from gin import config as gin_config

from vit22b_transfer.recipes import t5x_options
from vit22b_transfer.recipes.reader import RecipeError, nearest, short_name

_MACRO = "gin.macro"


def check(job: str) -> list[str]:
    """What of the recipe is T5X's own matter, a sentence each; an error for the rest.

    job: one of `t5x_options.JOBS`.

    Raises:
      RecipeError: naming every option of the recipe that would do nothing in this job
        of T5X, and what to do instead.
    """
    refused, own = [], []
    for scope, selector, parameter, value in _bound():
        meaning = t5x_options.meaning(job, selector, parameter)
        if meaning is None:
            continue
        key = f"{scope}/" if scope else ""
        said = f"{key}{short_name(selector)}.{parameter} = {_text(value)}"
        if meaning.kind == "own":
            own.append(f"{said} does nothing under T5X: {meaning.words}.")
        elif meaning.kind == "refused" and not _is_heeded(value, meaning):
            refused.append(f"{said}: {meaning.words}.")
    refused += _unused_macros()
    if refused:
        raise RecipeError(
            "the recipe sets what would do nothing under T5X:\n  "
            + "\n  ".join(refused)
        )
    return own


def bound_to(selector: str, parameter: str, default: Any = None) -> Any:
    """What the recipe binds to a parameter, built; `default` if nothing."""
    bound = gin_config._CONFIG.get(("", selector), {})
    # gin builds what a copy refers to.
    return copy.deepcopy(bound[parameter]) if parameter in bound else default


def _bound() -> Iterator[tuple[str, str, str, Any]]:
    """(scope, configurable, parameter, value without macros) of every binding."""
    for (scope, selector), parameters in gin_config._CONFIG.items():
        if selector != _MACRO:
            for parameter, value in parameters.items():
                yield scope, selector, parameter, _plain(value)


def _is_heeded(value: Any, meaning: t5x_options.Meaning) -> bool:
    """Whether T5X does with `value` what our runtime does."""
    if any(_same(value, harmless) for harmless in meaning.harmless):
        return True
    return any(_same(value, _value_at(place)) for place in meaning.same_as)


def _same(value: Any, other: Any) -> bool:
    if isinstance(value, int) and isinstance(other, tuple):  # a mesh of T5X
        other = math.prod(other)
    return type(value) is type(other) and value == other


def _value_at(place: str) -> Any:
    """The value of '%MACRO' or 'scope/configurable.parameter'; Ellipsis if unbound."""
    if place.startswith("%"):
        key, parameter = (place[1:], _MACRO), "value"
    else:
        scope, _, name = place.rpartition("/")
        selector, _, parameter = name.rpartition(".")
        key = (scope, selector)
    value = gin_config._CONFIG.get(key, {}).get(parameter, ...)
    return _plain(value)


def _unused_macros() -> list[str]:
    """Of each macro that nothing uses what to do; gin takes them without a word."""
    macros = {
        scope: parameters["value"]
        for (scope, selector), parameters in gin_config._CONFIG.items()
        if selector == _MACRO
    }
    values = [
        value
        for (_, selector), parameters in gin_config._CONFIG.items()
        if selector != _MACRO
        for value in parameters.values()
    ]
    used: set[str] = set()
    todo = values + list(macros.values())
    for value in todo:
        used |= set(_macros_in(value))
    said = []
    for name in macros.keys() - used:
        value = _plain(macros[name])
        default, instead = t5x_options.UNUSED_MACROS.get(name, (..., ""))
        if not _same(value, default):
            way_out = f"{instead}." if instead else nearest(name, list(used), "Used")
            said.append(f"{name} = {_text(value)}, which nothing uses: {way_out}")
    return sorted(said)


def _macros_in(value: Any) -> Iterator[str]:
    if isinstance(value, gin_config.ConfigurableReference):
        if _is_macro(value):
            yield "/".join(value.scopes)
    elif isinstance(value, Mapping):
        for item in (*value.keys(), *value.values()):
            yield from _macros_in(item)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _macros_in(item)


def _plain(value: Any) -> Any:
    """`value` with what macros stand for, and references as text: '@name()'."""
    if isinstance(value, gin_config.ConfigurableReference):
        if _is_macro(value):
            name = "/".join(value.scopes)
            if (name, _MACRO) not in gin_config._CONFIG:
                raise RecipeError(f"macro {name} is used, but nothing sets it.")
            return _plain(gin_config._CONFIG[name, _MACRO]["value"])
        scopes = "".join(f"{scope}/" for scope in value.scopes)
        call = "()" if value.evaluate else ""
        return f"@{scopes}{value.config_key[1]}{call}"
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_plain(item) for item in value)
    return value


def _is_macro(reference: gin_config.ConfigurableReference) -> bool:
    return reference.config_key[1] == _MACRO


def _text(value: Any) -> str:
    return value if isinstance(value, str) and value[:1] == "@" else repr(value)
