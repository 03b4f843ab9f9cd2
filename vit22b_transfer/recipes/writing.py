"""A recipe as one gin file: what its files and overrides say, without them."""

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from vit22b_transfer.recipes import gin_values
from vit22b_transfer.recipes.gin_values import MacroUse, Reference
from vit22b_transfer.recipes.reader import Binding, Recipe

_HEAD = "from __gin__ import dynamic_registration"


def whole(
    recipe: Recipe, comments: Iterable[str], *, open_macros: Iterable[str] = ()
) -> str:
    """All that the recipe says, and the modules that it imports, by name.

    open_macros: those that whoever reads the file has to set.
    """
    macros = {name: value for name, (value, _) in recipe.macros.items()}
    left_open = {n: MacroUse("gin.REQUIRED") for n in open_macros if n in macros}
    return _text(
        comments, recipe.imports, [], macros | left_open, recipe.bindings.values()
    )


def part(
    recipe: Recipe,
    comments: Iterable[str],
    *,
    include: str,
    macros: Iterable[str],
    beside: Mapping[str, Any],
) -> str:
    """The macros of these names with all that they reach, behind another file.

    include: that file. beside: further macros and their values.
    """
    kept: dict[str, Any] = {}
    bindings: dict[int, Binding] = {}
    todo: list[Any] = [MacroUse(name) for name in macros if name in recipe.macros]
    while todo:
        value = todo.pop()
        if isinstance(value, MacroUse) and value.name in recipe.macros:
            if value.name not in kept:
                kept[value.name] = recipe.macros[value.name][0]
                todo.append(kept[value.name])
        elif isinstance(value, Reference):
            for binding in recipe.bindings.values():
                is_of = binding.name == value.name
                if is_of and id(binding) not in bindings:
                    bindings[id(binding)] = binding
                    todo.append(binding.value)
        else:
            todo += gin_values.find(value, (MacroUse, Reference))
    return _text(comments, [], [include], kept | dict(beside), bindings.values())


def _text(
    comments: Iterable[str],
    modules: Iterable[str],
    includes: Iterable[str],
    macros: Mapping[str, Any],
    bindings: Iterable[Binding],
) -> str:
    bindings = list(bindings)
    names = _Names()
    body = [
        f"{name} = {names.written(value)}" for name, value in sorted(macros.items())
    ]
    lines, last = [], None
    for binding in sorted(bindings, key=lambda b: (b.name, b.scope, b.parameter)):
        if (binding.name, binding.scope) != last:
            lines.append("")
            last = binding.name, binding.scope
        scope = f"{binding.scope}/" if binding.scope else ""
        selector = scope + names.of(binding.name, binding.target)
        lines.append(f"{selector}.{binding.parameter} = {names.written(binding.value)}")
    said = [f"# {_printable(comment)}" for comment in comments]
    imports = [f"import {module}" for module in dict.fromkeys(modules)]
    head = [*said, _HEAD, *imports, *names.imports(), ""]
    head += [f"include {name!r}" for name in includes]
    return "\n".join([*head, *body, *lines]) + "\n"


class _Names:
    """What configurables are called in the file: by modules of different names."""

    def __init__(self):
        self._modules: dict[str, str] = {}

    def of(self, name: str, target: Callable[..., Any]) -> str:
        """`vit.vit22b_config` of a full dotted name, whose module is imported."""
        module = name
        while module not in sys.modules:
            module = module.rpartition(".")[0]
            assert module, (name, target)
        attributes = name.removeprefix(module)
        if module not in self._modules:
            short = module.rpartition(".")[2]
            if short in self._modules.values():
                short = module.replace(".", "_")
            self._modules[module] = short
        return self._modules[module] + attributes

    def written(self, value: Any) -> str:
        """A value as gin reads it."""

        def renamed(reference: Reference) -> Reference:
            selector = self.of(reference.name, reference.target)
            return Reference(reference.scope, selector, reference.evaluate)

        return gin_values.text(gin_values.map_references(value, renamed))

    def imports(self) -> list[str]:
        """The lines that import the modules."""
        lines = []
        for module, short in sorted(self._modules.items()):
            package, _, own = module.rpartition(".")
            line = f"from {package} import {own}" if package else f"import {own}"
            lines.append(line if short == own else f"{line} as {short}")
        return lines


def _printable(text: str) -> str:
    """On one line, so that nothing of it is more than a comment."""
    return re.sub(r"[^\x20-\x7e]", "?", text)
