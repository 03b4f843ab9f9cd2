"""Every shipped gin file parses, finalizes, and builds what it describes."""

import ast
import dataclasses
import importlib
import re
from pathlib import Path

import gin
import jax
import pytest

from vit22b_transfer.models import (
    encoder_decoder,
    gemma,
    lora,
    multimodal,
    prefix_lm,
    t5,
    vit,
    vit_variants,
)
from vit22b_transfer.partitioning import rules
from vit22b_transfer.recipes import loading

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "gin_configs"


def files(folder):
    return sorted((CONFIGS / folder).glob("*.gin"))


def stem(path):
    return path.stem


def installed(root, paths, *overrides):
    """The configured `root`; paths relative to the repository."""
    names = [path.relative_to(ROOT).as_posix() for path in paths]
    recipe = loading.read(names, overrides, [str(ROOT)])
    return loading.install(recipe, root, [str(ROOT)])


@pytest.fixture(autouse=True)
def no_gin_left_over():
    yield
    gin.clear_config()


TOWERS = [
    path
    for path in files("models")
    if path.stem.startswith("vit_") and path.stem != "vit_mini"
]
TEXT_MODELS = [path for path in files("models") if path.stem.startswith("t5_")]
GEMMAS = [path for path in files("models") if path.stem.startswith("gemma")]
PALIGEMMAS = [path for path in files("models") if path.stem.startswith("paligemma")]
MACROS = {"vit": "IMAGE_SIZE=(224, 224)", "t5": "VOCAB_SIZE=512"}


def module_of(tower, text):
    overrides = [MACROS["t5"]]
    if tower.stem.startswith("vit_"):
        overrides.append(MACROS["vit"])
    paths = [tower, text, CONFIGS / "models/image_text.gin"]
    return installed(encoder_decoder.ImageTextModule, paths, *overrides)()


@pytest.mark.parametrize("path", TOWERS, ids=stem)
def test_every_tower_file_gives_the_size_it_names(path):
    module = module_of(path, CONFIGS / "models/t5_tiny.gin")
    names = {"giant": "g", "gigantic": "G", "so400m": "So400m", "22b": "22B", "e": "e"}
    name = path.stem.removeprefix("vit_").removesuffix("_classic")
    variant = vit_variants.VARIANTS[names.get(name, name.capitalize())]
    assert module.tower.width == variant.width
    assert module.tower.depth == variant.depth
    assert module.tower.parallel == ("classic" not in path.stem)


def test_every_variant_has_a_file():
    assert len([path for path in TOWERS if "classic" not in path.stem]) == len(
        vit_variants.VARIANTS
    )


@pytest.mark.parametrize("path", TEXT_MODELS, ids=stem)
def test_every_text_model_file_builds(path):
    module = module_of(CONFIGS / "models/no_tower.gin", path)
    assert isinstance(module.text, t5.T5Config)
    assert module.text.vocab_size == 512


# Parameters in millions, token tables of 32,128 rows included, untied.
@pytest.mark.parametrize(
    "name, expected", [("t5_small", 77), ("t5_base", 248), ("t5_large", 783)]
)
def test_text_models_have_the_published_sizes(name, expected):
    names = ("no_tower", name, "image_text")
    paths = [CONFIGS / f"models/{name}.gin" for name in names]
    overrides = ["VOCAB_SIZE=32128", "T5Config.scan_layers=True"]
    module = installed(encoder_decoder.ImageTextModule, paths, *overrides)()
    tokens = jax.ShapeDtypeStruct((1, 4), "int32")
    params = jax.eval_shape(module.init, jax.random.key(0), None, tokens, tokens)
    count = sum(leaf.size for leaf in jax.tree.leaves(params["params"]))
    assert round(count / 1e6) == expected


@pytest.mark.parametrize("path", GEMMAS, ids=stem)
def test_every_gemma_file_gives_the_size_it_names(path):
    names = ("no_tower", path.stem, "prefix_lm")
    paths = [CONFIGS / f"models/{name}.gin" for name in names]
    module = installed(prefix_lm.PrefixLMModule, paths, MACROS["t5"])()
    assert module.text.vocab_size == 512
    if path.stem != "gemma_tiny":
        variant = gemma.VARIANTS[path.stem.replace("_", "-")]
        own = dataclasses.asdict(module.text) | {"vocab_size": variant["vocab_size"]}
        assert variant.items() <= own.items()


def test_every_gemma_has_a_file():
    assert len(GEMMAS) == len(gemma.VARIANTS) + 1


@pytest.mark.parametrize("path", PALIGEMMAS, ids=stem)
def test_every_paligemma_file_builds_with_its_framing(path):
    module = installed(prefix_lm.PrefixLMModule, [path], MACROS["vit"])()
    assert (module.bos_id, module.separator_id) == (2, 108)
    assert module.tower == vit.classic_config("So400m/14")
    assert module.text.vocab_size == 257_152


@pytest.mark.parametrize("path", files("meshes"), ids=stem)
def test_every_mesh_file_builds_on_eight_devices(path):
    layout = installed(rules.Partitioning, [path])()
    assert layout.mesh.size == jax.device_count()


def test_the_mesh_files_cover_all_settings_of_t5x():
    layouts = [installed(rules.Partitioning, [path])() for path in files("meshes")]
    settings = {
        (x.activation_partitioning_dims, x.parameter_partitioning_dims) for x in layouts
    }
    assert settings == {(1, 1), (1, 2), (2, 1), (2, 2)}
    assert {x.model for x in layouts} == {1, 2}


RECIPES = files("recipes")
COMMANDS = [
    ("training.train", "fine_tune"),
    ("evaluation.evaluate", "evaluate_checkpoint"),
    ("inference.infer", "infer_split"),
]
SETTINGS = {
    "MODEL_DIR": "MODEL_DIR='/nowhere'",
    "INITIAL_CHECKPOINT": "INITIAL_CHECKPOINT='/nowhere/checkpoint_1'",
}


def required_macros(path):
    """Names that the header of a recipe says are required."""
    line = re.search(r"# REQUIRED macros?: (.*)\.", path.read_text())
    return line[1].split(", ")


def read_recipe(path, *overrides, behind=()):
    overrides = [*overrides, *(SETTINGS[name] for name in required_macros(path))]
    names = [file.relative_to(ROOT).as_posix() for file in (path, *behind)]
    return loading.read(names, overrides, [str(ROOT)])


@pytest.mark.parametrize("path", RECIPES, ids=stem)
def test_every_recipe_serves_train_eval_and_infer(path):
    for module, function in COMMANDS:
        module = importlib.import_module(f"vit22b_transfer.{module}")
        root = getattr(module, function)
        assert callable(loading.install(read_recipe(path), root, [str(ROOT)]))


@pytest.mark.parametrize("path", RECIPES, ids=stem)
def test_every_recipe_requires_exactly_what_its_header_says(path):
    name = path.relative_to(ROOT).as_posix()
    unset = loading.read([name], [], [str(ROOT)]).required()
    macros = {text.split()[0] for text in unset if "." not in text.split()[0]}
    assert macros == set(required_macros(path))


LORA = CONFIGS / "models/lora.gin"
# Of both text models, without a tower, and with a frozen one.
WITH_LORA = [path for path in RECIPES if re.search("pali|blind|vqav2", path.stem)]
BUILT = [(path, ()) for path in RECIPES] + [(path, (LORA,)) for path in WITH_LORA]


@pytest.mark.parametrize(
    "path,behind",
    BUILT,
    ids=lambda x: "LoRA" if x == (LORA,) else getattr(x, "stem", ""),
)
def test_every_recipe_builds_its_model_on_its_mesh(path, behind):
    from vit22b_transfer.data import batches

    # Scanned layers have the same parameters, stacked, and are traced once.
    text = "GemmaConfig" if "paligemma" in path.stem else "T5Config"
    recipe = read_recipe(path, f"{text}.scan_layers=True", behind=behind)
    model = loading.install(recipe, multimodal.ImageTextModel, [str(ROOT)])()
    if behind:
        assert model.frozen == lora.ALL_BUT_LORA
    layout = gin.get_configurable(rules.Partitioning)()
    lengths, batch_size = (
        recipe.resolved(recipe.macros[name][0])
        for name in ("FEATURE_LENGTHS", "BATCH_SIZE")
    )
    shapes, types = batches.batch_shapes(
        model.FEATURE_CONVERTER_CLS, lengths, batch_size
    )
    assert batch_size % layout.mesh.shape["data"] == 0
    variables = jax.eval_shape(
        lambda rng: model.get_initial_variables(rng, shapes, types), jax.random.key(0)
    )
    layout.params_shardings(variables["params"], variables["params_axes"])


@pytest.mark.parametrize("path", RECIPES, ids=stem)
def test_every_recipe_names_registered_tasks(path):
    import seqio

    macros = read_recipe(path).macros
    known = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    assert macros["TRAIN_TASK"][0] in known
    assert {*macros["EVAL_TASKS"][0], macros["INFER_TASK"][0]} <= known


@pytest.mark.parametrize("path", RECIPES, ids=stem)
def test_recipes_stay_short_and_say_what_to_expect(path):
    text = path.read_text()
    header = text[: text.index("from __gin__")]
    assert "vit22b train --gin_file=gin_configs/recipes/" + path.name in header
    assert "# Expected: " in header
    body = [line for line in text[len(header) :].splitlines() if line.strip()]
    assert len([line for line in body if " = " in line]) <= 20
    assert len(body) <= 30


# Run only where T5X is installed (tests/test_t5x_runs.py); this holds anywhere.
T5X_RUNS = sorted((CONFIGS / "runs").glob("t5x_*.gin"))


@pytest.mark.parametrize("path", T5X_RUNS, ids=stem)
def test_t5x_run_files_bind_what_the_adapter_has(path):
    tree = ast.parse((ROOT / "vit22b_transfer/t5x_adapter.py").read_text())
    arguments = {
        node.name: {a.arg for a in node.args.args + node.args.kwonlyargs}
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
    }
    text = path.read_text()
    for function in re.findall(r"@t5x_adapter\.(\w+)", text):
        assert function in arguments
    for function, name in re.findall(r"^t5x_adapter\.(\w+)\.(\w+) =", text, re.M):
        assert name in arguments[function]
    assert re.search(r"include 't5x/configs/runs/\w+\.gin'", text)


def test_every_gin_file_is_built_by_a_test():
    included = set()
    for path in RECIPES:
        included |= set(re.findall("^include '(.*)'", path.read_text(), re.MULTILINE))
    tested = {*TOWERS, *TEXT_MODELS, *GEMMAS, *PALIGEMMAS}
    tested |= {*files("meshes"), *RECIPES, *T5X_RUNS}
    tested |= {ROOT / name for name in included}
    tested |= {CONFIGS / "runs/cached_features.gin"}  # in test_feature_cache.py
    tested |= {CONFIGS / "models/int8_tower.gin"}  # in test_int8.py
    tested |= {CONFIGS / "runs/bench.gin"}  # in test_bench.py
    tested |= {LORA, CONFIGS / "models/no_tower.gin"}
    assert set(CONFIGS.rglob("*.gin")) == tested
