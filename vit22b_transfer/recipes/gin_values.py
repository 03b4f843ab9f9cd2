"""Values of a recipe: literals, references, macros, and the types they must have."""

import collections.abc
import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any


@dataclasses.dataclass(frozen=True)
class MacroUse:
    """`%NAME` in a value."""

    name: str

    def __repr__(self):
        return f"%{self.name}"


@dataclasses.dataclass(frozen=True)
class Reference:
    """`@scope/selector` in a value, or `@scope/selector()` if `evaluate`."""

    scope: str
    selector: str
    evaluate: bool
    name: str = ""
    target: Any = None

    def __repr__(self):
        scope = f"{self.scope}/" if self.scope else ""
        return f"@{scope}{self.selector}{'()' if self.evaluate else ''}"


class Collector:
    """The parser delegate that takes values as they are written."""

    def configurable_reference(self, scoped_selector: str, evaluate: bool) -> Reference:
        """The reference, its name not looked up yet."""
        scope, _, selector = scoped_selector.rpartition("/")
        return Reference(scope, selector, evaluate)

    def macro(self, name: str) -> MacroUse:
        """The use of a macro, defined or not."""
        return MacroUse(name)


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter that gin can bind."""

    name: str
    annotation: Any
    default: Any
    is_extra: bool = False

    @property
    def needed(self) -> bool:
        """True if a call without it fails."""
        return self.default is inspect.Parameter.empty and not self.is_extra


@functools.cache
def parameters(target: Callable[..., Any]) -> dict[str, Parameter]:
    """Parameters by name, not to be changed.

    Where a function takes `**overrides` and returns a dataclass, the overrides are the
    fields of that dataclass.
    """
    function = target.__init__ if inspect.isclass(target) else target
    try:
        signature = inspect.signature(target)
    except ValueError:  # builtins may have no signature
        return {}
    hints = _hints(function)
    result, extra = {}, {}
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            returned = hints.get("return")
            if dataclasses.is_dataclass(returned) and isinstance(returned, type):
                fields = parameters(returned).values()
                extra = {f.name: dataclasses.replace(f, is_extra=True) for f in fields}
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            annotation = hints.get(parameter.name, Any)
            result[parameter.name] = Parameter(
                parameter.name, annotation, parameter.default
            )
    return extra | result


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    while isinstance(function, functools.partial):
        function = function.func
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError, AttributeError):
        # Annotations that exist only for type checkers say nothing here.
        return {}


def _rebuild(value: Any, leaf: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {_rebuild(k, leaf): _rebuild(v, leaf) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_rebuild(item, leaf) for item in value)
    return leaf(value)


def map_references(value: Any, function: Callable[[Reference], Reference]) -> Any:
    """`value` with `function` applied to each reference in it."""
    return _rebuild(value, lambda x: function(x) if isinstance(x, Reference) else x)


def substitute(value: Any, macro_value: Callable[[str], Any]) -> Any:
    """`value` with each macro replaced by its own, substituted, value."""

    def leaf(item: Any) -> Any:
        if isinstance(item, MacroUse) and item.name != "gin.REQUIRED":
            return substitute(macro_value(item.name), macro_value)
        return item

    return _rebuild(value, leaf)


def find(value: Any, kind: type | tuple[type, ...]) -> Iterator[Any]:
    """All items of type `kind`, or of one of these, anywhere in `value`."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from find(key, kind)
            yield from find(item, kind)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from find(item, kind)
    elif isinstance(value, kind):
        yield value


def text(value: Any) -> str:
    """`value` as gin would read it, as far as it is a literal."""
    if isinstance(value, (type, types.FunctionType)):
        return f"@{value.__module__}.{value.__qualname__}"
    if isinstance(value, functools.partial):
        return f"partial({text(value.func)})"
    return repr(value)


def mismatch(value: Any, annotation: Any) -> str:
    """What is wrong with `value` for a parameter annotated so; "" if nothing is.

    Checks what is certain; annotations it does not understand accept everything.
    """
    if fits(value, annotation):
        return ""
    problem = f"must be {_type_name(annotation)}, got {text(value)}"
    if isinstance(value, Reference):
        if not value.evaluate and fits(
            dataclasses.replace(value, evaluate=True), annotation
        ):
            return f"{problem}. Write {value!r}() to pass what it returns."
        return f"{problem}."
    if isinstance(value, list) and fits(tuple(value), annotation):
        return f"{problem} (a list). Write a tuple, with round brackets."
    return f"{problem} ({type(value).__name__})."


def fits(value: Any, annotation: Any) -> bool:
    """False if `value` is certainly not what `annotation` says."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if isinstance(value, MacroUse) or annotation is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is typing.Literal:
        return isinstance(value, Reference) or value in args
    if origin is typing.Annotated:
        return fits(value, args[0])
    if isinstance(value, Reference):
        return _reference_fits(value, annotation)
    if annotation in (None, type(None)):
        return value is None
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is tuple:
        return isinstance(value, tuple) and _items_fit(value, args)
    if origin in (list, collections.abc.Sequence, collections.abc.Iterable):
        kind = list if origin is list else (tuple, list)
        return isinstance(value, kind) and all(fits(item, *args) for item in value)
    if origin in (dict, collections.abc.Mapping):
        return isinstance(value, dict) and all(
            fits(key, args[0]) and fits(item, args[1]) for key, item in value.items()
        )
    if origin in (collections.abc.Callable, type):
        return False
    if origin is not None or not isinstance(annotation, type):
        return True
    return _is_instance(value, annotation)


def _is_instance(value: Any, annotation: type) -> bool:
    try:
        return isinstance(value, annotation)
    except TypeError:  # a protocol that cannot be checked at run time
        return True


def _items_fit(value: tuple[Any, ...], args: tuple[Any, ...]) -> bool:
    if not args:
        return True
    if len(args) == 2 and args[1] is Ellipsis:
        return all(fits(item, args[0]) for item in value)
    return len(value) == len(args) and all(map(fits, value, args))


def _reference_fits(value: Reference, annotation: Any) -> bool:
    plain = typing.get_origin(annotation) or annotation
    if not isinstance(plain, type):
        return plain is not None
    if not value.evaluate:
        # A class has the methods of a protocol, but it is not what it makes.
        if inspect.isclass(value.target) and getattr(plain, "_is_protocol", False):
            return False
        return plain is type or _is_instance(value.target, plain)
    is_class = inspect.isclass(value.target)
    made = value.target if is_class else _hints(value.target).get("return", Any)
    if not isinstance(made, type):
        return True
    try:
        # A function may return less than it promises, a class never does.
        return issubclass(made, plain) or (not is_class and issubclass(plain, made))
    except TypeError:
        return True


def _type_name(annotation: Any) -> str:
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation.__qualname__
    return str(annotation).replace("typing.", "").replace("collections.abc.", "")
