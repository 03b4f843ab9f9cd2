"""Reading gin files: every statement with its place, every name looked up."""

import contextlib
import dataclasses
import difflib
import importlib
import os
import re
import tokenize
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gin import config_parser

from vit22b_transfer import UserError
from vit22b_transfer.recipes import gin_values, modules
from vit22b_transfer.recipes.gin_values import MacroUse, Reference

REQUIRED = "gin.REQUIRED"
_OVERRIDES = "command line"
# Below each search path, where gin files are looked for to suggest them.
_CONFIGS = "gin_configs"


class RecipeError(UserError):
    """A mistake in a recipe, told in one message."""

    exit_code = 2


@dataclasses.dataclass(frozen=True)
class Where:
    """The file and line of a statement, or the name that an override gives a value."""

    file: str
    line: int
    override: str = ""

    def __str__(self):
        if self.file == _OVERRIDES:
            return f"{_OVERRIDES} --gin.{self.override}"
        return f"{self.file}:{self.line}"


@dataclasses.dataclass(frozen=True)
class Binding:
    """`configurable.parameter = value`, where configurable has a scope or none."""

    scope: str
    name: str
    target: Callable[..., Any]
    parameter: str
    value: Any
    where: Where

    @property
    def key(self) -> str:
        """How the parameter is written in messages."""
        scope = f"{self.scope}/" if self.scope else ""
        return f"{scope}{short_name(self.name)}.{self.parameter}"


@dataclasses.dataclass
class Recipe:
    """What files and overrides say together; the last word on each name wins.

    imports: modules that are none of this package, such as `tasks.coco`, in order.
    """

    files: tuple[str, ...]
    overrides: tuple[str, ...]
    macros: dict[str, tuple[Any, Where]] = dataclasses.field(default_factory=dict)
    bindings: dict[tuple[str, str, str], Binding] = dataclasses.field(
        default_factory=dict
    )
    configurables: dict[str, Callable[..., Any]] = dataclasses.field(
        default_factory=dict
    )
    imports: dict[str, None] = dataclasses.field(default_factory=dict)

    def nothing_yet(self) -> "Recipe":
        """A recipe to read more into, which knows what the names of this one name."""
        return dataclasses.replace(self, macros={}, bindings={})

    def take(self, said: "Recipe") -> None:
        """Adds what another says, in place of what this one says of the same names."""
        self.macros |= said.macros
        self.bindings |= said.bindings

    def statements(self) -> dict[Any, tuple[str, Any, Where]]:
        """Of each macro and parameter: how messages write it, its value, where."""
        macros = {name: (name, *said) for name, said in self.macros.items()}
        return macros | {
            key: (binding.key, binding.value, binding.where)
            for key, binding in self.bindings.items()
        }

    def resolved(self, value: Any) -> Any:
        """`value` with every macro replaced by what it stands for."""
        return gin_values.substitute(value, lambda name: self.macros[name][0])

    def place(self, value: Any, where: Where) -> str:
        """Where a value was set that is said at `where`, perhaps by macros.

        What a macro alone says was set at the macro's last assignment; macros inside of
        a value are told behind its own place.
        """
        while isinstance(value, MacroUse) and value.name in self.macros:
            value, where = self.macros[value.name]
        inside = dict.fromkeys(use.name for use in gin_values.find(value, MacroUse))
        parts = [
            f"%{name} {self.place(*self.macros[name])}"
            for name in inside
            if name in self.macros
        ]
        return "; ".join([str(where), *parts])

    def bound_to(self, name: str, scope: str = "") -> dict[str, Binding]:
        """Bindings of the configurable `name` by parameter, as seen in `scope`."""
        seen = {}
        for binding in self.bindings.values():
            if binding.name == name and binding.scope in ("", scope):
                if binding.parameter not in seen or binding.scope:
                    seen[binding.parameter] = binding
        return seen

    def required(self) -> list[str]:
        """Descriptions of what is still `%gin.REQUIRED`."""
        unset = [
            f"{name} ({where})"
            for name, (value, where) in self.macros.items()
            if value == MacroUse(REQUIRED)
        ]
        return unset + [
            f"{binding.key} ({binding.where})"
            for binding in self.bindings.values()
            if binding.value == MacroUse(REQUIRED)
        ]


def short_name(name: str) -> str:
    """The last module and the rest: `vit.ViTConfig` for the full dotted name."""
    return ".".join(name.rsplit(".", 2)[-2:])


def nearest(name: str, valid: Sequence[str], what: str = "Valid names") -> str:
    """A sentence with the valid names nearest to `name`, or all if none is near."""
    valid = sorted(set(valid))
    near = difflib.get_close_matches(name, valid, n=3, cutoff=0.6)
    if near:
        return f"Did you mean {' or '.join(near)}?"
    return f"{what}: {', '.join(valid)}." if valid else f"{what}: none."


@dataclasses.dataclass
class Reader:
    """The reader of one file: imports hold for the file that makes them only."""

    recipe: Recipe
    search_paths: Sequence[str]
    including: tuple[str, ...]
    dynamic: bool = False
    symbols: dict[str, tuple[str, Any]] = dataclasses.field(default_factory=dict)

    def read(self, file: str, why: str) -> None:
        """Adds all that `file` and its includes say to the recipe."""
        path = find_file(file, self.search_paths, why)
        if path in self.including:
            raise RecipeError(f"{file} includes itself ({why}).")
        self.including += (path,)
        with open(path, encoding="utf-8") as source, _syntax_errors(file):
            parser = config_parser.ConfigParser(source, gin_values.Collector())
            for statement in parser:
                self._take(statement, Where(file, statement.location.line_num))

    def read_override(self, override: str) -> None:
        """Adds "NAME=VALUE"."""
        name, _, value = override.partition("=")
        with _syntax_errors(f"--gin.{name}={value}", is_override=True):
            parser = config_parser.ConfigParser(override, gin_values.Collector())
            for statement in parser:
                self._take(statement, Where(_OVERRIDES, 1, name))

    def _take(self, statement: Any, where: Where) -> None:
        if isinstance(statement, config_parser.ImportStatement):
            self._import(statement, where)
        elif isinstance(statement, config_parser.IncludeStatement):
            nested = Reader(self.recipe, self.search_paths, self.including)
            nested.read(statement.filename, f"included by {where}")
        elif isinstance(statement, config_parser.BindingStatement):
            scope, selector, parameter, value, _ = statement
            value = self._resolve_references(value, where)
            if not parameter:
                name = f"{scope}/{selector}" if scope else selector
                self.recipe.macros[name] = (value, where)
                return
            full, target = self._resolve(selector, where, f"{selector}.{parameter}")
            known = gin_values.parameters(target)
            if parameter not in known:
                raise RecipeError(
                    f"{where}: {selector} has no parameter {parameter!r}. "
                    + nearest(parameter, list(known), "Its parameters")
                )
            binding = Binding(scope, full, target, parameter, value, where)
            self.recipe.bindings[scope, full, parameter] = binding

    def _import(self, statement: config_parser.ImportStatement, where: Where) -> None:
        if statement.module == "__gin__.dynamic_registration":
            self.dynamic = True
            return
        try:
            module = modules.imported(statement.module)
        except modules.ModuleError as error:
            raise RecipeError(f"{where}: {error}") from error
        if statement.module.partition(".")[0] != __name__.partition(".")[0]:
            self.recipe.imports[statement.module] = None
        name = statement.bound_name()
        if not statement.is_from and not statement.alias:
            root = statement.module.partition(".")[0]
            self.symbols[root] = (root, importlib.import_module(root))
        else:
            self.symbols[name] = (statement.module, module)

    def _resolve_references(self, value: Any, where: Where) -> Any:
        def resolve(reference: Reference) -> Reference:
            full, target = self._resolve(
                reference.selector, where, f"@{reference.selector}"
            )
            return dataclasses.replace(reference, name=full, target=target)

        return gin_values.map_references(value, resolve)

    def _resolve(self, selector: str, where: Where, text: str) -> tuple[str, Any]:
        """The full dotted name and the object that `selector` names."""
        if where.file == _OVERRIDES:
            return self._resolve_override(selector, text)
        if not self.dynamic:
            raise RecipeError(
                f"{where}: {text} needs `from __gin__ import dynamic_registration` as "
                "the first line of the file."
            )
        first, *rest = selector.split(".")
        if first not in self.symbols:
            raise RecipeError(
                f"{where}: {text}: this file does not import {first!r}. "
                + nearest(first, list(self.symbols), "It imports")
            )
        full, value = self.symbols[first]
        for attribute in rest:
            if not hasattr(value, attribute):
                public = [name for name in _defined(value) if name[0] != "_"]
                raise RecipeError(
                    f"{where}: {text}: {full} has no {attribute!r}. "
                    + nearest(attribute, public, "It has")
                )
            full, value = f"{full}.{attribute}", getattr(value, attribute)
        if not callable(value):
            raise RecipeError(f"{where}: {text} is not a function or class.")
        # One object is one configurable, whatever module it is reached through.
        for name, known in self.recipe.configurables.items():
            if known == value:
                return name, known
        self.recipe.configurables[full] = value
        return full, value

    def _resolve_override(self, selector: str, text: str) -> tuple[str, Any]:
        """As gin does: any suffix of a name that the files use."""
        known = self.recipe.configurables
        found = [name for name in known if f".{name}".endswith(f".{selector}")]
        if len({id(known[name]) for name in found}) == 1:
            return found[0], known[found[0]]
        if found:
            raise RecipeError(
                f"--gin.{text} is ambiguous: it may be {' or '.join(sorted(found))}."
            )
        depth = selector.count(".") + 1
        suffixes = [".".join(name.split(".")[-depth:]) for name in known]
        raise RecipeError(
            f"--gin.{text}: the recipe names no {selector!r}. "
            + nearest(selector, suffixes, "It names")
        )


def find_file(file: str, search_paths: Sequence[str], why: str) -> str:
    """The path of a gin file, looked for in each of `search_paths`."""
    for prefix in search_paths:
        path = os.path.join(prefix, file)
        if os.path.isfile(path):
            return os.path.realpath(path)
    hint = _nearest_files(file, search_paths)
    searched = " or ".join(prefix or "the current directory" for prefix in search_paths)
    raise RecipeError(f"no gin file {file} ({why}) in {searched}. {hint}".strip())


def _nearest_files(file: str, search_paths: Sequence[str]) -> str:
    """A sentence with the gin files whose names or paths are nearest to `file`."""
    folder, name = os.path.split(file)
    siblings, paths = [], []
    for prefix in search_paths:
        with contextlib.suppress(OSError):
            siblings += os.listdir(os.path.join(prefix, folder) or ".")
        shipped = os.path.join(prefix, _CONFIGS)
        paths += [
            os.path.join(_CONFIGS, os.path.relpath(os.path.join(root, one), shipped))
            for root, _, names in os.walk(shipped)
            for one in names
        ]
    siblings = [sibling for sibling in siblings if sibling.endswith(".gin")]
    beside = [os.path.join(folder, sibling) for sibling in siblings]
    if difflib.get_close_matches(name, siblings, n=1, cutoff=0.6):
        return nearest(file, beside)
    stems: dict[str, list[str]] = {}
    for path in sorted({path for path in paths if path.endswith(".gin")}):
        stems.setdefault(os.path.basename(path).removesuffix(".gin"), []).append(path)
    stem = name.removesuffix(".gin")
    near = [stem] if stem in stems else difflib.get_close_matches(stem, stems, n=3)
    if near:
        return f"Did you mean {' or '.join(path for n in near for path in stems[n])}?"
    if siblings:
        return nearest(file, beside, "Gin files there")
    recipes = [path for paths in stems.values() for path in paths if "recipes" in path]
    return nearest(file, recipes, "Recipes") if recipes else ""


@contextlib.contextmanager
def _syntax_errors(source: str, is_override: bool = False) -> Iterator[None]:
    try:
        yield
    except (SyntaxError, tokenize.TokenError) as error:
        line = error.lineno if isinstance(error, SyntaxError) else error.args[1][0]
        message = error.msg if isinstance(error, SyntaxError) else error.args[0]
        message = re.sub(r"\s+", " ", message).strip()
        if is_override:
            name, _, value = source.partition("=")
            raise RecipeError(
                f"{source}: {value!r} is not a value; 1, 0.5, True, None, (1, 2), "
                "@function and %MACRO are. Text needs quotes within quotes: "
                f"'{name}=\"{value}\"'."
            ) from error
        raise RecipeError(f"{source}:{line}: {message}") from error


def _defined(value: Any) -> list[str]:
    """Names in a module or class that gin could configure."""
    if not isinstance(value, types.ModuleType):
        return dir(value)
    return [
        name
        for name, member in vars(value).items()
        if callable(member) and getattr(member, "__module__", None) == value.__name__
    ]
