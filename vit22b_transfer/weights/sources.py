"""A source of weights: where it lies, its config, its family, what travels with it."""

import dataclasses
import difflib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vit22b_transfer import UserError
from vit22b_transfer.host.file_errors import naming, quoted
from vit22b_transfer.models.preparation import Preparation
from vit22b_transfer.weights import model_sizes
from vit22b_transfer.weights.files import config_values, tensor_files
from vit22b_transfer.weights.files.stored_tensors import (
    StoredTensor,
    refuse_other_content,
)
from vit22b_transfer.weights.mapping import Family, Model

CONFIG = "config.json"
# Small files beside the weights: sizes, preprocessing, tokenizer.
_COMPANIONS = (
    CONFIG,
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_TOKENIZER = ".model"
# What says the number of patches: NaFlex's config and PaliGemma's, and processors.
_COUNTS = ("num_patches", "num_image_tokens", "max_num_patches", "image_seq_length")


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights that were opened and understood; nothing is read yet.

    config: config.json, with the image processor's as `preprocessor` if there is one;
      empty without either.
    """

    name: str
    folder: str | None
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    family: Family
    model: Model

    def companions(self) -> list[str]:
        """Names of the files that travel with the weights."""
        if self.folder is None:
            return []
        names = sorted(os.listdir(self.folder))
        return [
            name
            for name in names
            if (name in _COMPANIONS or name.endswith(_TOKENIZER))
            and os.path.isfile(os.path.join(self.folder, name))
        ]

    def tokenizer(self) -> str | None:
        """The name of the SentencePiece file, if there is one."""
        found = [name for name in self.companions() if name.endswith(_TOKENIZER)]
        return found[0] if found else None

    def copy_companions(self, to: str) -> None:
        """Copies config, preprocessing and tokenizer files into the directory `to`."""
        os.makedirs(to, exist_ok=True)
        for name in self.companions():
            assert self.folder is not None
            shutil.copyfile(os.path.join(self.folder, name), os.path.join(to, name))

    def check_companions(self) -> None:
        """Raises UserError for a tokenizer file that is none."""
        if (name := self.tokenizer()) and self.folder is not None:
            refuse_other_content(os.path.join(self.folder, name))


def open_source(
    name: str,
    families: Sequence[Family],
    family: str | None = None,
    open_tensors: Callable[[str], dict[str, StoredTensor]] = tensor_files.open_tensors,
) -> Source:
    """The weights at `name`, of the family called `family` or the one that fits.

    open_tensors: reads formats that `tensor_files` does not, too.

    Raises:
      UserError: if they cannot be read, or are of no family we know.
    """
    tensors = open_tensors(name)
    path = os.path.abspath(os.path.expanduser(name))
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    config = read_config(folder)
    # A file of another kind may lie beside configs of something else.
    if path.endswith(".npz"):
        folder, config = None, {}
    found = choose(families, config, tensors, family, name)
    with naming(name):
        model = found.read(config, tensors)
        model_sizes.check(model, tensors)
    return Source(name, folder, config, tensors, found, model)


def read_config(folder: str) -> dict[str, Any]:
    """config.json of a directory, with its image processor as `preprocessor`.

    transformers 5 writes that into processor_config.json if there is a tokenizer too.

    Raises:
      UserError: if one of them is damaged.
    """
    config = config_values.read_json(folder, CONFIG)
    config.pop("preprocessor", None)
    found: Mapping[str, Any] = config_values.read_json(
        folder, "preprocessor_config.json"
    )
    if not found:
        whole = config_values.read_json(folder, "processor_config.json")
        with naming(os.path.join(folder, "processor_config.json")):
            found = config_values.part(whole, "image_processor")
    if found:
        config["preprocessor"] = found
    return config


def write_sizes(folder: str, old: Model, new: Model) -> None:
    """Gives what `copy_companions` wrote the sizes of a resized model."""
    sizes: dict[str, Any] = {}
    if old.text is not None and old.text.vocab_size != new.text.vocab_size:
        sizes["vocab_size"] = new.text.vocab_size
    if old.tower is not None and old.tower.image_size != new.tower.image_size:
        height, width = new.tower.image_size
        rows, columns = new.tower.grid_of(height, width)
        sizes["image_size"] = height if height == width else [height, width]
        for name in _COUNTS:
            sizes[name] = rows * columns
        # As much larger than what is kept as they were.
        how = old.tower.preparation or Preparation()
        for name, side in (("size", how.resized), ("crop_size", how.cropped)):
            sizes[name] = tuple(side * x // how.kept for x in (height, width))
    for name in (CONFIG, "preprocessor_config.json", "processor_config.json"):
        path = os.path.join(folder, name)
        if sizes and os.path.isfile(path):
            config = config_values.read_json(folder, name)
            with open(path, "w", encoding="utf-8") as file:
                json.dump(_replaced(config, sizes), file, indent=2)


def _replaced(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the values at every place that has their names."""
    result = {}
    for name, value in config.items():
        new = values.get(name, value)
        if isinstance(new, tuple) and value is not None:
            result[name] = _in_form_of(value, *new)
        elif isinstance(value, dict):
            result[name] = _replaced(value, values)
        else:
            result[name] = value if value is None else new
    return result


def _in_form_of(said: Any, height: int, width: int) -> Any:
    """A size as a processor said another one."""
    if not isinstance(said, dict):
        return height if height == width else [height, width]
    sides = dict(height=height, width=width, shortest_edge=max(height, width))
    return {side: sides.get(side, said[side]) for side in said}


def by_name(families: Sequence[Family], name: str) -> Family:
    """The family called `name`; an unknown name is a UserError."""
    for family in families:
        if family.name == name:
            return family
    names = [family.name for family in families]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.0)
    raise UserError(
        f"there is no family {name!r}; nearest: {', '.join(near)}; "
        f"all: {', '.join(sorted(names))}."
    )


def choose(
    families: Sequence[Family],
    config: Mapping[str, Any],
    tensors: Mapping[str, Any],
    family: str | None,
    source: str,
) -> Family:
    """The family called `family`, or the only one that recognises the source."""
    if family is not None:
        return by_name(families, family)
    found = [each for each in families if each.recognises(config, tensors)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"{source} may be of several families: "
            f"{', '.join(each.name for each in found)}; say which with --family."
        )
    first = ", ".join(list(tensors)[:3])
    kind = config.get("model_type")
    raise UserError(
        f"{source} is of no family that can be imported: "
        + (
            f"its config.json says model_type {quoted(kind)}"
            if kind
            else "no config.json"
        )
        + f", its tensors are called {first}, ... Families: "
        f"{', '.join(sorted(each.name for each in families))}; say which with --family."
    )
