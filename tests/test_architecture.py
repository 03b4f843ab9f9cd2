"""The layer rule, the fences and the shape of the tree, read from the source.

Each test names every offender. `imports` reads late imports too: an import inside a
function is an arrow like any other.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vit22b_transfer"

# A room may import itself, its own rank, and all ranks above it in this list.
RANKS = [
    {"host"},
    {"models"},
    {"partitioning"},
    {"checkpoints"},
    {"data", "weights"},
    {"training"},
    {"inference", "planning"},
    {"evaluation"},
    {"experiments"},
    {"demo", "reports", "serving"},
    {"commands"},
]
MAY_IMPORT = {
    room: set().union(*RANKS[: rank + 1])
    for rank, rooms in enumerate(RANKS)
    for room in rooms
} | {"recipes": {"host", "recipes"}}
MAY_IMPORT["commands"] |= {"recipes"}
# The gin file of an import is checked as a recipe would be.
MAY_IMPORT["weights"] |= {"recipes"}
# The only modules at the package's top; they may import every room.
DOORS = {"__init__", "cli", "t5x_adapter"}

# Third-party package -> where alone it may be imported, relative to the root.
FENCES = {
    "array_record": (
        "vit22b_transfer/data/feature_shards.py",
        "vit22b_transfer/data/packed_examples.py",
        "tests/",
    ),
    "tensorflow": (
        "vit22b_transfer/data/",
        "vit22b_transfer/demo/",
        "tasks/",
        "tests/",
        "benchmarks/",
    ),
    "tensorflow_datasets": ("vit22b_transfer/data/", "tasks/", "tests/"),
    "seqio": (
        "vit22b_transfer/data/",
        "vit22b_transfer/demo/",
        "tasks/",
        "tests/",
        "benchmarks/",
    ),
    "gin": ("vit22b_transfer/recipes/", "vit22b_transfer/cli.py", "tests/"),
    "orbax": (
        "vit22b_transfer/checkpoints/",
        "vit22b_transfer/weights/files/",
        "tests/test_hostile_checkpoints.py",
    ),
    "tensorstore": (
        "vit22b_transfer/checkpoints/",
        "vit22b_transfer/weights/files/",
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
# What the entry points may import before that: argument parsing alone.
LIGHT = {"vit22b_transfer.commands"}
VAGUE = {"utils", "util", "common", "helpers", "helper", "base", "misc", "core", "lib"}
MAX_LINES = 420
# All ways to create a parameter in flax Linen.
CREATES_PARAMETERS = re.compile(
    r"\bself\.param\(|\bself\.variable\(|\bparam_with_axes\(|\bvariable_with_axes\("
    r"|\bnn\.(Dense|DenseGeneral|Conv|Embed|LayerNorm|RMSNorm|Einsum|BatchNorm"
    r"|GroupNorm|MultiHeadAttention|MultiHeadDotProductAttention|SelfAttention)\("
)


def sources(*folders):
    return [path for folder in folders for path in sorted(folder.rglob("*.py"))]


PACKAGE_FILES = sources(PACKAGE)
ALL = sources(PACKAGE, ROOT / "tasks", ROOT / "tests", ROOT / "benchmarks")


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path, *, top_level_only=False):
    """Dotted names of all modules that the file imports, `from` names included."""
    tree = parsed(path)
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name_of(path)}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def top_of(module):
    return module.partition(".")[0]


def room_of(path):
    """The room of the package that a file lies in, or the file's own name."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_of(path):
    module = name_of(path).removesuffix(".py").replace("/", ".")
    return module.removesuffix(".__init__")


def arrows(paths=PACKAGE_FILES):
    """Module of the package -> the modules of the package that it imports."""
    known = {module_of(path) for path in paths}

    def target(name):
        # `from package.module import name` uses the module.
        return name if name in known else name.rpartition(".")[0]

    return {
        module_of(path): {target(name) for name in imports(path)}
        & known - {"vit22b_transfer"}
        for path in paths
    }


def circle(graph):
    """The nodes of one circle of `graph`, empty if there is none."""
    done = set()

    def visit(node, outer):
        if node in outer:
            return [*outer[outer.index(node) :], node]
        if node in done:
            return []
        for used in sorted(graph.get(node, ())):
            if used != node and (found := visit(used, [*outer, node])):
                return found
        done.add(node)
        return []

    for node in graph:
        if found := visit(node, []):
            return found
    return []


def test_only_the_doors_stand_at_the_top_of_the_package():
    assert {path.stem for path in PACKAGE.glob("*.py")} == DOORS
    assert {room_of(path) for path in PACKAGE_FILES} - DOORS == set(MAY_IMPORT)


def test_rooms_import_only_the_rooms_below():
    offenders = [
        f"{name_of(path)} imports {module}"
        for path in PACKAGE_FILES
        if room_of(path) in MAY_IMPORT
        for module in imports(path)
        if top_of(module) == "vit22b_transfer"
        and module.count(".")
        and module.split(".")[1] in set(MAY_IMPORT) | DOORS
        and module.split(".")[1] not in MAY_IMPORT[room_of(path)]
    ]
    assert not offenders


def test_modules_do_not_import_each_other_in_a_circle():
    assert not circle(arrows())


def test_rooms_do_not_import_each_other_in_a_circle():
    rooms = {}
    for module, used in arrows().items():
        room = module.split(".")[1] if module.count(".") else module
        rooms.setdefault(room, set()).update(name.split(".")[1] for name in used)
    assert not circle({room: used - {room} for room, used in rooms.items()})


def test_a_circle_through_a_late_import_is_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}
    assert circle(graph) == ["a", "b", "c", "a"]


def test_third_party_packages_stay_behind_their_fences():
    offenders = [
        f"{name_of(path)} imports {module}"
        for path in ALL
        for module in imports(path)
        if (allowed := FENCES.get(top_of(module)))
        and not name_of(path).startswith(allowed)
    ]
    assert not offenders


def test_the_package_never_imports_tasks_or_tests():
    outside = {"tasks", "tests", "benchmarks"}
    offenders = [
        f"{name_of(path)} imports {module}"
        for path in PACKAGE_FILES
        for module in imports(path)
        if top_of(module) in outside
    ]
    assert not offenders


def test_models_need_little_more_than_jax_and_flax():
    allowed = MODELS_MAY_IMPORT | {"vit22b_transfer"} | sys.stdlib_module_names
    offenders = [
        f"{name_of(path)} imports {module}"
        for path in sources(PACKAGE / "models")
        for module in imports(path)
        if top_of(module) not in allowed
    ]
    assert not offenders


def test_the_entry_points_import_nothing_heavy_at_module_level():
    entry_points = [PACKAGE / "cli.py", PACKAGE / "__init__.py"]
    for path in [*entry_points, *sources(PACKAGE / "commands")]:
        tops = list(imports(path, top_level_only=True))
        assert not {top_of(module) for module in tops} & HEAVY, name_of(path)
        ours = [module for module in tops if module.startswith("vit22b_transfer.")]
        heavy = [module for module in ours if not module.startswith(tuple(LIGHT))]
        assert heavy in ([], ["vit22b_transfer.UserError"]), name_of(path)


def test_parameters_are_created_in_layers_only():
    offenders = [
        name_of(path)
        for path in PACKAGE_FILES
        if path.name != "layers.py"
        and CREATES_PARAMETERS.search(path.read_text(encoding="utf-8"))
    ]
    assert not offenders


def test_file_names_say_what_is_inside():
    assert not [name_of(path) for path in ALL if path.stem in VAGUE]


def test_files_open_with_a_docstring():
    files = sources(PACKAGE, ROOT / "tasks")
    assert not [name_of(path) for path in files if not ast.get_docstring(parsed(path))]


def test_files_stay_readable_in_one_sitting():
    lengths = {
        name_of(path): len(path.read_text(encoding="utf-8").splitlines())
        for path in sources(PACKAGE, ROOT / "tasks")
    }
    long = {name: n for name, n in lengths.items() if n > MAX_LINES}
    assert not long, "split them: about 400 lines is the aim"


def test_library_code_has_no_gin_decorators():
    offenders = [
        name_of(path)
        for path in PACKAGE_FILES
        for node in ast.walk(parsed(path))
        for decorator in getattr(node, "decorator_list", [])
        if "gin" in ast.unparse(decorator).split(".")[0]
    ]
    assert not offenders
