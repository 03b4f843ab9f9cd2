"""A recipe: gin files and overrides, read, checked, shown, and handed to gin.

gin accepts macros that nothing uses and values of the wrong type, and its errors do
not say which names exist. So the files are first read with gin's own parser, every
name is resolved and every value checked; only then does gin read them.
"""

import inspect
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import gin
from gin import config as gin_config

from vit22b_transfer.recipes import gin_values
from vit22b_transfer.recipes.gin_values import MacroUse, Reference
from vit22b_transfer.recipes.reader import (
    REQUIRED,
    Binding,
    Reader,
    Recipe,
    RecipeError,
    nearest,
    short_name,
)

# The file of trials, and the macro of the number of steps that it sets.
_TRIAL, _STEPS = "runs/try.gin", "TRAIN_STEPS"


def read(
    files: Sequence[str], overrides: Sequence[str], search_paths: Sequence[str]
) -> Recipe:
    """The recipe that `files` and then `overrides` ("NAME=VALUE") say.

    The files behind the first change it, in any order; overrides have the last word.

    Raises:
      RecipeError: if a file is missing, a name unknown, a value of the wrong type, or
        two files behind the first say different things.
    """
    recipe = Recipe(tuple(files), tuple(overrides))
    said = []
    for file in files:
        said.append(recipe.nothing_yet())
        Reader(said[-1], search_paths, ()).read(file, "named on the command line")
        recipe.take(said[-1])
    last = recipe.nothing_yet()
    for override in overrides:
        Reader(last, search_paths, ()).read_override(override)
    recipe.take(last)
    for one, other in itertools.combinations(said[1:], 2):
        _check_agreement(one, other, last)
    _check_macros(recipe)
    for binding in recipe.bindings.values():
        _check_type(recipe, binding)
    return recipe


def check_complete(recipe: Recipe, root: Callable[..., Any]) -> None:
    """Nothing, if `root` and all it reaches have the values they need.

    Raises:
      RecipeError: with everything that is missing.
    """
    if unset := recipe.required():
        raise RecipeError(
            f"these values must be set: {', '.join(unset)}. "
            "Set them in the recipe or with --gin.NAME=VALUE."
        )
    if root not in recipe.configurables.values():
        path = root.__module__.rpartition(".")[0] + "." + root.__name__
        raise RecipeError(
            f"the recipe {', '.join(recipe.files)} does not configure {path}; include "
            f"the file in gin_configs/runs that does."
        )
    reached = reachable(recipe, root)
    _check_models(recipe, reached)
    missing = []
    for reference in reached:
        bound = recipe.bound_to(reference.name, reference.scope)
        for parameter in gin_values.parameters(reference.target).values():
            if parameter.needed and parameter.name not in bound:
                missing.append(f"{short_name(reference.name)}.{parameter.name}")
    if missing:
        raise RecipeError(
            f"these parameters have no default and must be bound: {', '.join(missing)}."
        )


def install(
    recipe: Recipe, root: Callable[..., Any], search_paths: Sequence[str]
) -> Callable[..., Any]:
    """`root` with its arguments bound by gin, after gin has read and locked all."""
    check_complete(recipe, root)
    gin.clear_config()
    # gin also looks for files in Python packages, and fails where a folder on Python's
    # path, such as gin_configs, has no __init__.py.
    gin_config._FILE_READERS[:] = [(open, os.path.isfile)]
    for path in search_paths:
        gin.add_config_file_search_path(path)
    try:
        gin.parse_config_files_and_bindings(recipe.files, recipe.overrides)
    except (ValueError, SyntaxError, NameError, AttributeError, OSError) as error:
        raise RecipeError(f"gin refuses the recipe: {error}") from error
    return gin.get_configurable(root)


def arguments(
    recipe: Recipe, root: Callable[..., Any], search_paths: Sequence[str]
) -> dict[str, Any]:
    """What gin would call `root` with, built but not used."""
    install(recipe, root, search_paths)
    return gin.get_bindings(root)


def trial(recipe: Recipe, search_paths: Sequence[str]) -> str:
    """What a training says if gin_configs/runs/try.gin is behind its recipe; else "".

    Such as "a trial: 20 of the recipe's 5000 steps; its scores say nothing".
    """
    others = [file for file in recipe.files if not file.endswith(_TRIAL)]
    if len(others) == len(recipe.files) or _STEPS not in recipe.macros:
        return ""
    whole = recipe.nothing_yet()
    for file in others:
        Reader(whole, search_paths, ()).read(file, "named on the command line")
    taken, of = recipe.resolved(MacroUse(_STEPS)), whole.macros.get(_STEPS, (None,))[0]
    told = f"{taken} of the recipe's {of}" if isinstance(of, int) else taken
    return f"a trial: {told} steps; its scores say nothing"


def other_data(recipe: Recipe, root: Callable[..., Any], split: str) -> str:
    """A sentence on what chooses other data than `split`, "" if nothing bound does.

    Such as "--gin.INFER_SPLIT chooses another split, --gin.INFER_TASK another task."
    """
    options = {}
    for reference in reachable(recipe, root):
        bound = recipe.bound_to(reference.name, reference.scope)
        if "split" in bound and recipe.resolved(bound["split"].value) == split:
            options |= {_option(bound["split"]): "chooses another split"}
            options |= {
                _option(bound[name]): "another task"
                for name in ("task", "tasks")
                if name in bound
            }
    said = ", ".join(f"--gin.{option} {what}" for option, what in options.items())
    return f"{said}." if said else ""


def _option(binding: Binding) -> str:
    """The name that sets a parameter: the macro that it is bound to, or its own."""
    value = binding.value
    return value.name if isinstance(value, MacroUse) else binding.key


def _check_agreement(one: Recipe, other: Recipe, last: Recipe) -> None:
    """Raises RecipeError if the order of two files would decide what is said."""
    ours, others = one.statements(), other.statements()
    for key in ours.keys() & others.keys() - last.statements().keys():
        name, value, where = ours[key]
        _, theirs, there = others[key]
        if value == theirs:
            continue
        raise RecipeError(
            f"{where} sets {name} = {gin_values.text(value)} and {there} sets it to "
            f"{gin_values.text(theirs)}. Files behind the first are to go together in "
            f"any order: name one of the two, or set it with --gin.{name}=VALUE."
        )


def _check_macros(recipe: Recipe) -> None:
    values = [(value, where) for value, where in recipe.macros.values()]
    values += [(binding.value, binding.where) for binding in recipe.bindings.values()]
    used: set[str] = set()
    for value, where in values:
        for use in gin_values.find(value, MacroUse):
            used.add(use.name)
            if use.name not in recipe.macros and use.name != REQUIRED:
                raise RecipeError(
                    f"{where}: macro {use.name} is not defined. "
                    + nearest(use.name, list(recipe.macros), "Defined macros")
                )
    for name, (_, where) in recipe.macros.items():
        if name not in used:
            raise RecipeError(
                f"{where}: macro {name} is set but nothing uses it. "
                + nearest(name, list(used - {REQUIRED}), "Used macros")
            )
    for name in recipe.macros:
        _check_acyclic(recipe, name, ())


def _check_acyclic(recipe: Recipe, name: str, outer: tuple[str, ...]) -> None:
    if name in outer:
        raise RecipeError(f"macros refer in a circle: {' -> '.join(outer + (name,))}.")
    if name in recipe.macros:
        for use in gin_values.find(recipe.macros[name][0], MacroUse):
            _check_acyclic(recipe, use.name, outer + (name,))


def _check_type(recipe: Recipe, binding: Binding) -> None:
    said, value = binding.value, recipe.resolved(binding.value)
    place = recipe.place(said, binding.where)
    through = f" = {said} ({binding.where})" if isinstance(said, MacroUse) else ""
    annotation = gin_values.parameters(binding.target)[binding.parameter].annotation
    if problem := gin_values.mismatch(value, annotation):
        raise RecipeError(f"{place}: {binding.key}{through}: {problem}")


def _check_models(recipe: Recipe, reached: Sequence[Reference]) -> None:
    """Raises RecipeError for what is set of a model that the run does not build.

    Of such a file behind a recipe nothing would come: a model of pairs decodes no text.
    A file that says something of several kinds of models is for each of them.
    """
    built = {r.target for r in reached if hasattr(r.target, "loss_fn")}
    bindings = [b for b in recipe.bindings.values() if hasattr(b.target, "loss_fn")]
    files = {
        b.where.file for b in bindings if b.target in built and not b.where.override
    }
    for binding in bindings:
        other = binding.target not in built and binding.where.file not in files
        if built and other:
            names = ", ".join(sorted(target.__name__ for target in built))
            raise RecipeError(
                f"{binding.where} sets {binding.key}, but the model of this run is "
                f"{names}, of which it says nothing. Leave it out, or name the file "
                "for that model."
            )


def reachable(recipe: Recipe, root: Callable[..., Any]) -> list[Reference]:
    """Calls that gin makes to build the arguments of `root`, and root itself."""
    name = next(n for n, value in recipe.configurables.items() if value is root)
    queue = [Reference("", name, True, name, root)]
    seen: list[Reference] = []
    while queue:
        reference = queue.pop()
        if reference in seen:
            continue
        seen.append(reference)
        for binding in recipe.bound_to(reference.name, reference.scope).values():
            value = recipe.resolved(binding.value)
            found = gin_values.find(value, Reference)
            queue += [inner for inner in found if inner.evaluate]
    return seen


def show(recipe: Recipe) -> Iterator[str]:
    """Lines of text: every macro, then every configurable with all its parameters."""
    for name, (value, where) in sorted(recipe.macros.items()):
        place = recipe.place(value, where)
        yield f"{name} = {gin_values.text(recipe.resolved(value))}  # {place}"
    heads = {(b.scope, b.name): b.target for b in recipe.bindings.values()}
    used = {("", name): target for name, target in recipe.configurables.items()}
    for (scope, name), target in sorted((used | heads).items(), key=lambda kv: kv[0]):
        if inspect.isclass(target) and target.__module__ == "builtins":
            continue
        yield ""
        yield f"# {scope + '/' if scope else ''}{name}"
        bound = recipe.bound_to(name, scope)
        made = _made_by(recipe, target, bound)
        for parameter in gin_values.parameters(target).values():
            key = f"{scope + '/' if scope else ''}{short_name(name)}.{parameter.name}"
            if parameter.name in bound:
                binding = bound[parameter.name]
                value = gin_values.text(recipe.resolved(binding.value))
                place = recipe.place(binding.value, binding.where)
                yield f"{key} = {value}  # {place}"
            elif parameter.is_extra and hasattr(made, parameter.name):
                value = getattr(made, parameter.name)
                by = f"by {target.__name__}"
                by = "default" if value == parameter.default else by
                yield f"{key} = {gin_values.text(value)}  # {by}"
            elif not parameter.needed and not parameter.is_extra:
                default = gin_values.text(parameter.default)
                if not default.startswith("<"):  # flax's own sentinels
                    yield f"{key} = {default}  # default"


def _made_by(
    recipe: Recipe, target: Callable[..., Any], bound: Mapping[str, Binding]
) -> Any:
    """The dataclass that a function of its name and overrides makes, such as a tower.

    None for other functions, and where arguments are open or have to be made first.
    """
    if inspect.isclass(target):
        return None
    known = gin_values.parameters(target).values()
    values = {name: recipe.resolved(binding.value) for name, binding in bound.items()}
    is_open = bool(list(gin_values.find(values, (MacroUse, Reference))))
    is_open |= any(
        parameter.needed and parameter.name not in values for parameter in known
    )
    if is_open or not any(parameter.is_extra for parameter in known):
        return None
    return target(**values)
