"""The layer rule and the fences, read from the source."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vit22b_transfer"

# A part may import itself, its own rank, and all ranks above it in this list.
RANKS = [
    {"models"},
    {"partitioning"},
    {"data"},
    {"training", "inference", "evaluation"},
]
BELOW = {
    part: set().union(*RANKS[: rank + 1])
    for rank, parts in enumerate(RANKS)
    for part in parts
} | {"weights": {"weights", "models"}}
EDGES = {
    "cli",
    "weights_commands",
    "demo",
    "bench",
    "plan_advice",
    "plan_commands",
    "planning",
    "recipes",
    "recipe_reader",
    "recipe_values",
    "t5x_adapter",
}

# Third-party package -> where alone it may be imported, relative to the root.
FENCES = {
    "array_record": ("vit22b_transfer/data/feature_shards.py",),
    "tensorflow": ("vit22b_transfer/data/", "tasks/", "tests/", "benchmarks/"),
    "tensorflow_datasets": ("vit22b_transfer/data/", "tasks/", "tests/"),
    "seqio": ("vit22b_transfer/data/", "tasks/", "tests/", "benchmarks/"),
    "gin": (
        "vit22b_transfer/recipes.py",
        "vit22b_transfer/recipe_reader.py",
        "tests/",
    ),
    "orbax": ("vit22b_transfer/training/checkpoints.py", "vit22b_transfer/weights/"),
    "tensorstore": (
        "vit22b_transfer/training/checkpoints.py",
        "vit22b_transfer/training/legacy_checkpoints.py",
        "vit22b_transfer/weights/",
        "tests/test_legacy_checkpoints.py",
    ),
    "t5x": ("vit22b_transfer/t5x_adapter.py", "tests/", "benchmarks/"),
    "torch": ("tests/", "benchmarks/"),
    "transformers": ("tests/", "benchmarks/"),
    "peft": ("tests/",),
    "timm": ("tests/", "benchmarks/"),
    "pycocoevalcap": ("tests/", "benchmarks/"),
}
MODELS_MAY_IMPORT = {"jax", "flax", "numpy", "clu", "jaxtyping"}
# What takes long to import: never before a command is known to need it.
HEAVY = {"jax", "flax", "numpy", "tensorflow", "seqio", "gin", "PIL", "rich"}
VAGUE = {"utils", "util", "common", "helpers", "helper", "base", "misc", "core", "lib"}
# All ways to create a parameter in flax Linen.
CREATES_PARAMETERS = re.compile(
    r"\bself\.param\(|\bself\.variable\(|\bparam_with_axes\(|\bvariable_with_axes\("
    r"|\bnn\.(Dense|DenseGeneral|Conv|Embed|LayerNorm|RMSNorm|Einsum|BatchNorm"
    r"|GroupNorm|MultiHeadAttention|MultiHeadDotProductAttention|SelfAttention)\("
)


def sources(*folders):
    return [path for folder in folders for path in sorted(folder.rglob("*.py"))]


ALL = sources(PACKAGE, ROOT / "tasks", ROOT / "tests", ROOT / "benchmarks")


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def imports(path, *, top_level_only=False):
    """Dotted names of all modules that the file imports, `from` names included."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name_of(path)}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(path):
    """The layer or edge module that a file of the package belongs to."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def test_every_module_of_the_package_is_a_layer_or_an_edge():
    parts = {part_of(path) for path in sources(PACKAGE)} - {"__init__"}
    assert parts <= set(BELOW) | EDGES


@pytest.mark.parametrize("path", sources(PACKAGE), ids=name_of)
def test_layers_import_only_the_layers_below(path):
    part = part_of(path)
    for module in imports(path):
        top, _, rest = module.partition(".")
        if top == "vit22b_transfer" and part in BELOW:
            used = rest.split(".")[0]
            assert used in BELOW[part], f"{part} imports {module}"


def test_training_inference_and_evaluation_do_not_import_in_a_circle():
    edges = {}
    for path in sources(PACKAGE):
        module = name_of(path).removesuffix(".py").replace("/", ".")
        known = {name_of(p).removesuffix(".py").replace("/", ".") for p in ALL}
        found = imports(path, top_level_only=True)
        edges[module] = {name for name in found if name in known}
    done = set()

    def visit(module, outer):
        assert module not in outer, " -> ".join([*outer, module])
        if module not in done:
            for used in edges.get(module, ()):
                visit(used, [*outer, module])
            done.add(module)

    for module in edges:
        visit(module, [])


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_third_party_packages_stay_behind_their_fences(path):
    for module in imports(path):
        allowed = FENCES.get(module.partition(".")[0])
        if allowed is not None:
            assert name_of(path).startswith(allowed), f"{name_of(path)}: {module}"


@pytest.mark.parametrize("path", sources(PACKAGE), ids=name_of)
def test_the_package_never_imports_tasks_or_tests(path):
    for module in imports(path):
        assert module.partition(".")[0] not in {"tasks", "tests", "benchmarks"}


@pytest.mark.parametrize("path", sources(PACKAGE / "models"), ids=name_of)
def test_models_need_little_more_than_jax_and_flax(path):
    for module in imports(path):
        top = module.partition(".")[0]
        assert top in MODELS_MAY_IMPORT | {"vit22b_transfer"} | sys.stdlib_module_names


@pytest.mark.parametrize("name", ["cli.py", "__init__.py"])
def test_the_entry_points_import_nothing_heavy_at_module_level(name):
    found = {module.partition(".")[0] for module in imports(PACKAGE / name)}
    tops = imports(PACKAGE / name, top_level_only=True)
    assert not {module.partition(".")[0] for module in tops} & HEAVY
    assert not any(module.startswith("vit22b_transfer") for module in tops)
    assert not found & {"jax", "gin"}


@pytest.mark.parametrize(
    "path", [p for p in sources(PACKAGE) if p.name != "layers.py"], ids=name_of
)
def test_parameters_are_created_in_layers_only(path):
    assert not CREATES_PARAMETERS.findall(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_file_names_say_what_is_inside(path):
    assert path.stem not in VAGUE


@pytest.mark.parametrize("path", sources(PACKAGE, ROOT / "tasks"), ids=name_of)
def test_files_open_with_a_docstring_and_stay_readable_in_one_sitting(path):
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)) or not text.strip()
    assert len(text.splitlines()) <= 500, "split it: about 400 lines is the aim"


def test_library_code_has_no_gin_decorators():
    for path in sources(PACKAGE):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            for decorator in getattr(node, "decorator_list", []):
                assert "gin" not in ast.unparse(decorator), name_of(path)
