"""Every shipped gin file parses, finalizes, and builds what it describes."""

import argparse
import ast
import importlib
import re

import gin
import jax
import pytest
from gin_files import (
    BEHIND,
    CONFIGS,
    MEASURES,
    PROBES,
    RECIPES,
    ROOT,
    T5X_RUNS,
    WHOLE_RUNS,
    files,
    model_files,
    read_recipe,
    required_macros,
)

from vit22b_transfer import UserError, cli
from vit22b_transfer.commands import runs
from vit22b_transfer.experiments import probe
from vit22b_transfer.models import (
    encoder_decoder,
    gemma,
    prefix_lm,
    t5,
    t5_variants,
    vit,
    vit_variants,
)
from vit22b_transfer.partitioning import rules
from vit22b_transfer.recipes import loading


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


IMAGE_SIZE = "IMAGE_SIZE=(224, 224)"
VOCAB_SIZE = "VOCAB_SIZE=512"
# Large models: in bfloat16, scanned, recomputed.
AT_SCALE = dict(dtype="bfloat16", scan_layers=True, remat="block")


def built(root, names, *overrides):
    return installed(root, model_files(*names), *overrides)()


@pytest.mark.parametrize("name", ["vit", "vit_scanned", "vit_classic"])
def test_every_tower_has_the_size_that_it_is_called_by(name):
    make = vit.classic_config if name == "vit_classic" else vit.vit22b_config
    how = AT_SCALE | {"fused_projections": True} if name == "vit_scanned" else {}
    for size in vit_variants.VARIANTS:
        variant = f"VIT='{size}/14'"
        names = (name, "t5_tiny", "image_text")
        overrides = variant, "IMAGE_SIZE=(28, 28)", VOCAB_SIZE
        tower = built(encoder_decoder.ImageTextModule, names, *overrides).tower
        assert tower == make(f"{size}/14", image_size=(28, 28), **how)


@pytest.mark.parametrize("name", ["t5", "t5_scanned"])
def test_every_t5_has_the_size_that_it_is_called_by(name):
    how = AT_SCALE if name == "t5_scanned" else {}
    for size in t5_variants.VARIANTS:
        names, overrides = ("no_tower", name, "image_text"), (f"T5={size!r}",)
        root = encoder_decoder.ImageTextModule
        text = built(root, names, *overrides, VOCAB_SIZE).text
        assert text == t5.t5_config(size, vocab_size=512, **how)


def test_every_gemma_has_the_size_that_it_is_called_by():
    for variant in gemma.VARIANTS:
        names = ("no_tower", "gemma", "prefix_lm")
        overrides = f"GEMMA={variant!r}", VOCAB_SIZE
        text = built(prefix_lm.PrefixLMModule, names, *overrides).text
        assert text == gemma.gemma_config(variant, vocab_size=512, **AT_SCALE)


def test_every_paligemma_has_its_text_model_and_framing():
    for variant in ("gemma-2b", "gemma2-2b", "gemma2-9b", "gemma2-27b"):
        overrides = f"GEMMA={variant!r}", IMAGE_SIZE
        module = built(prefix_lm.PrefixLMModule, ["paligemma"], *overrides)
        assert (module.bos_id, module.separator_id) == (2, 108)
        assert module.tower == vit.classic_config("So400m/14")
        expected = gemma.gemma_config(variant, vocab_size=257_152, **AT_SCALE)
        assert module.text == expected


def test_the_headers_name_all_sizes():
    for name, table in (("t5", t5_variants), ("gemma", gemma), ("vit", vit_variants)):
        header = (CONFIGS / f"models/{name}.gin").read_text().partition("from __gin__")
        assert set(table.VARIANTS) <= set(re.split(r"[\s,/]+", header[0])), name


@pytest.mark.parametrize(
    "make, override, message",
    [
        (t5.t5_config, "T5='bsae'", "unknown T5 variant 'bsae'; nearest: base"),
        (gemma.gemma_config, "GEMMA='gemma3'", "unknown Gemma .* nearest: gemma3-4b"),
        (vit.vit22b_config, "VIT='BB/16'", "unknown ViT .* Nearest sizes: "),
    ],
)
def test_an_unknown_size_is_refused_with_the_nearest_ones(make, override, message):
    overrides = [override, VOCAB_SIZE]
    names = ("no_tower", override.partition("=")[0].lower(), "image_text")
    if make is vit.vit22b_config:
        names = ("vit", "t5_tiny", "image_text")
        overrides.append(IMAGE_SIZE)
    with pytest.raises(UserError, match=message):
        built(make, names, *overrides)


@pytest.mark.parametrize("name", ["t5_tiny", "gemma_tiny", "vit_mini"])
def test_every_small_model_file_builds(name):
    if name == "gemma_tiny":
        names, root = ("no_tower", name, "prefix_lm"), prefix_lm.PrefixLMModule
    else:
        tower = "vit_mini" if name == "vit_mini" else "no_tower"
        names = (tower, "t5_tiny", "image_text")
        root = encoder_decoder.ImageTextModule
    sizes = [IMAGE_SIZE] if name == "vit_mini" else []
    module = built(root, names, VOCAB_SIZE, *sizes)
    assert module.text.vocab_size == 512 and module.text.width == 128
    assert (module.tower is None) == (name != "vit_mini")


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


COMMANDS = [
    ("training.train", "fine_tune"),
    ("evaluation.evaluate", "evaluate_checkpoint"),
    ("inference.infer", "infer_split"),
]


@pytest.mark.parametrize("path", RECIPES, ids=stem)
def test_every_recipe_serves_train_eval_and_infer(path):
    for module, function in COMMANDS:
        module = importlib.import_module(f"vit22b_transfer.{module}")
        root = getattr(module, function)
        assert callable(loading.install(read_recipe(path), root, [str(ROOT)]))


@pytest.mark.parametrize("path", PROBES, ids=stem)
def test_every_probe_is_complete_and_of_a_kind_that_the_command_knows(path):
    args, _ = cli._parser().parse_known_args(["probe", path.stem])
    root = runs.root_of(args)
    given = loading.arguments(read_recipe(path), root, [str(ROOT)])
    assert path.stem in runs.PROBES
    assert {"source", "output_dir", "probe" if root is probe.run_probe else "data"} <= {
        *given
    }
    assert f"vit22b probe {path.stem} " in path.read_text()


@pytest.mark.parametrize("path", MEASURES, ids=stem)
def test_every_measure_is_complete_and_of_a_kind_that_the_command_knows(path):
    args = argparse.Namespace(command="measure", kind=path.stem)
    loading.check_complete(read_recipe(path), runs.root_of(args))
    assert f"vit22b measure {path.stem} " in path.read_text()


def test_every_kind_of_measure_has_a_recipe():
    assert {path.stem for path in MEASURES} == {*runs.MEASURES}


@pytest.mark.parametrize("path", [*RECIPES, *PROBES, *MEASURES], ids=stem)
def test_every_recipe_requires_exactly_what_its_header_says(path):
    name = path.relative_to(ROOT).as_posix()
    unset = loading.read([name], [], [str(ROOT)]).required()
    macros = {text.split()[0] for text in unset if "." not in text.split()[0]}
    assert macros == set(required_macros(path))


LORA = CONFIGS / "models/lora.gin"
# Of both text models, without a tower, with a frozen one, and without a text model.
WITH_LORA = [p for p in RECIPES if re.search("pali|blind|vqav2|folder", p.stem)]
BUILT = [(path, ()) for path in RECIPES] + [(path, (LORA,)) for path in WITH_LORA]


@pytest.mark.slow
@pytest.mark.parametrize(
    "path,behind",
    BUILT,
    ids=lambda x: "LoRA" if x == (LORA,) else getattr(x, "stem", ""),
)
def test_every_recipe_builds_its_model_on_its_mesh(path, behind):
    from vit22b_transfer.data import batches

    # Scanned layers have the same parameters, stacked, and are traced once.
    shown = "\n".join(loading.show(read_recipe(path)))
    text = re.search(r"text = @(.*)\(\)", shown)
    scanned = [f"{text[1]}.scan_layers=True"] if text else []
    recipe = read_recipe(path, *scanned, behind=behind)
    root = recipe.macros["RUN_MODEL"][0].target
    model = loading.install(recipe, root, [str(ROOT)])()
    if behind:
        assert model.frozen[0] == model.lora.frozen
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
@pytest.mark.parametrize("path", T5X_RUNS, ids=stem)
def test_t5x_run_files_bind_what_the_adapter_has(path):
    tree = ast.parse((ROOT / "vit22b_transfer/t5x_adapter.py").read_text())
    arguments = {}
    for node in tree.body:
        name = getattr(node, "name", "")
        if isinstance(node, ast.ClassDef):
            node = next(n for n in node.body if isinstance(n, ast.FunctionDef))
        if isinstance(node, ast.FunctionDef):
            arguments[name] = {a.arg for a in node.args.args + node.args.kwonlyargs}
    text = path.read_text()
    for block in re.findall(r"^t5x_adapter\.\w+:\n(?:  .*\n)+", text, re.M):
        head, *lines = block.splitlines()
        single = [f"{head[:-1]}.{line.strip()}" for line in lines]
        text = text.replace(block, "\n".join(single) + "\n")
    for function in re.findall(r"@t5x_adapter\.(\w+)", text):
        assert function in arguments
    for function, name in re.findall(r"^t5x_adapter\.(\w+)\.(\w+) =", text, re.M):
        assert name in arguments[function]
    assert re.search(r"include 't5x/configs/runs/\w+\.gin'", text)


def test_every_gin_file_is_built_by_a_test():
    """Those behind a recipe in test_gin_behind.py, bench.gin in test_bench.py."""
    assert {*CONFIGS.rglob("*.gin")} == {
        *BEHIND,
        *MEASURES,
        *PROBES,
        *RECIPES,
        *T5X_RUNS,
        *WHOLE_RUNS,
    }
