"""The command line: fast help, and one clear sentence for every mistake."""

import importlib
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import seqio

from vit22b_transfer import cli
from vit22b_transfer.models import encoder_decoder
from vit22b_transfer.recipes import loading
from vit22b_transfer.recipes.reader import RecipeError

ROOT = str(Path(__file__).parent.parent)
HEADER = """
from __gin__ import dynamic_registration
from vit22b_transfer.inference import decoding
from vit22b_transfer.models import encoder_decoder
from vit22b_transfer.models import multimodal
from vit22b_transfer.models import t5
from vit22b_transfer.models import vit
"""
MODEL = (
    HEADER
    + """
VOCAB_SIZE = 300
encoder_decoder.ImageTextModule.tower = @vit.ViTConfig()
encoder_decoder.ImageTextModule.text = @t5.T5Config()
vit.ViTConfig:
  width = 8
  depth = 1
  mlp_dim = 16
  num_heads = 2
  patch_size = 4
t5.T5Config:
  vocab_size = %VOCAB_SIZE
  width = 8
  num_encoder_layers = 1
  num_decoder_layers = 1
  num_heads = 2
  head_dim = 4
  mlp_dim = 16
"""
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current directory, with a correct recipe in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "model.gin").write_text(MODEL)
    return tmp_path


def read(*overrides, file="model.gin"):
    return loading.read([file], overrides, [""])


def error_of(*overrides, file="model.gin"):
    with pytest.raises(RecipeError) as caught:
        read(*overrides, file=file)
    return str(caught.value)


def error_in(folder, text, *overrides):
    (folder / "extra.gin").write_text(text)
    with pytest.raises(RecipeError) as caught:
        loading.read(["model.gin", "extra.gin"], overrides, [""])
    return str(caught.value)


HEAVY = ("jax", "flax", "tensorflow", "seqio", "gin", "torch", "numpy")


def test_help_imports_nothing_heavy(tmp_path):
    code = (
        "import sys; from vit22b_transfer import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print('loaded:', *sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ROOT},
        check=True,
    )
    help_text, loaded = result.stdout.split("loaded:")
    assert not set(HEAVY) & set(loaded.split())
    for command in ("demo", "train", "eval", "infer", "vocab", "tasks", "config"):
        assert f"\n    {command} " in help_text


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, vit22b_transfer; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ROOT},
        check=True,
    )
    assert not set(HEAVY) & set(result.stdout.split())


def test_versions_are_told_without_importing_what_they_are_of():
    code = (
        "import sys; from vit22b_transfer import cli\n"
        "try: cli.main(['--version'])\n"
        "except SystemExit as end: print('code:', end.code)\n"
        "print('loaded:', *sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    told, loaded = done.stdout.split("loaded:")
    names = ("vit22b_transfer", "jax", "flax")
    expected = [f"{name} {metadata.version(name)}" for name in names]
    assert told.splitlines() == [*expected, "code: 0"]
    assert not set(HEAVY) & set(loaded.split())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["trian"], "invalid choice: 'trian'"),
        (["cache-features"], "the following arguments are required: --gin_file"),
        (["train", "--gin_file=x", "--steps=3"], "unknown argument --steps=3"),
        (["train", "--gin_file=x", "--gin.A"], "--gin.A needs a value: --gin.A=VALUE"),
        (["demo", "--gin.A=3"], "unknown argument --gin.A=3"),
    ],
)
def test_wrong_usage_is_told_and_exits_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_recipe_error_is_one_line_and_exits_with_2(folder, capsys):
    arguments = ["config", "show", "--gin_file=model.gin", "--gin.T5Config.widht=3"]
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == (
        "vit22b: error: command line --gin.T5Config.widht: T5Config has no parameter "
        "'widht'. Did you mean width?\n"
    )
    assert cli.main([*arguments, "--traceback"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_config_show_resolves_macros_and_tells_where_values_come_from(folder, capsys):
    arguments = ["config", "show", "--gin_file=model.gin", "--gin.T5Config.width=16"]
    assert cli.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "VOCAB_SIZE = 300  # model.gin:9" in lines
    assert "t5.T5Config.vocab_size = 300  # model.gin:9" in lines
    assert "t5.T5Config.width = 16  # command line --gin.T5Config.width" in lines
    assert "t5.T5Config.tied_logits = False  # default" in lines
    assert (
        "encoder_decoder.ImageTextModule.tower = @vit.ViTConfig()  # model.gin:10"
        in lines
    )


def test_the_place_of_a_value_is_where_its_macros_were_set_last(folder):
    text = f"{HEADER}SIDE = 8\nOTHER = %SIDE\nvit.ViTConfig:\n  patch_size = %OTHER\n"
    (folder / "extra.gin").write_text(f"{text}  image_size = (%SIDE, %OTHER)\n")

    def shown(*overrides):
        recipe = loading.read(["model.gin", "extra.gin"], overrides, [""])
        lines = loading.show(recipe)
        return dict(line.split("  # ") for line in lines if "  # " in line)

    places = shown()
    assert places["vit.ViTConfig.patch_size = 8"] == "extra.gin:8"
    assert places["OTHER = 8"] == "extra.gin:8"
    assert places["vit.ViTConfig.image_size = (8, 8)"] == (
        "extra.gin:12; %SIDE extra.gin:8; %OTHER extra.gin:8"
    )
    places = shown("SIDE=4")
    assert places["vit.ViTConfig.patch_size = 4"] == "command line --gin.SIDE"
    assert places["OTHER = 4"] == "command line --gin.SIDE"
    for override, message in (
        ("SIDE=4.5", "command line --gin.SIDE: vit.ViTConfig.patch_size = %OTHER (ext"),
        ("OTHER=4.5", "command line --gin.OTHER: vit.ViTConfig.patch_size = %OTHER "),
    ):
        with pytest.raises(RecipeError) as caught:
            shown(override)
        assert str(caught.value).startswith(message)


def test_config_show_needs_no_tensorflow(folder):
    code = (
        "import sys; from vit22b_transfer import cli\n"
        "assert cli.main(['config', 'show', '--gin_file=model.gin']) == 0\n"
        "assert 'tensorflow' not in sys.modules and 'seqio' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        env={"PYTHONPATH": ROOT},
    )


def test_later_files_and_overrides_win(folder):
    (folder / "wide.gin").write_text(f"{HEADER}t5.T5Config.width = 32")
    recipe = loading.read(["model.gin", "wide.gin"], [], [""])
    bound = recipe.bound_to("vit22b_transfer.models.t5.T5Config")
    assert bound["width"].value == 32
    recipe = loading.read(["model.gin", "wide.gin"], ["T5Config.width=64"], [""])
    bound = recipe.bound_to("vit22b_transfer.models.t5.T5Config")
    assert bound["width"].value == 64


def test_files_are_found_in_every_search_path(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "top.gin").write_text("include 'model.gin'")
    recipe = loading.read(["top.gin"], [], ["sub", ""])
    assert "VOCAB_SIZE" in recipe.macros


RECIPES = "gin_configs/recipes"


@pytest.mark.parametrize(
    "file, message",
    [
        ("my_captions", f"Did you mean {RECIPES}/my_captions.gin?"),
        ("my_captions.gin", f"Did you mean {RECIPES}/my_captions.gin?"),
        ("recipes/my_vqa.gin", f"Did you mean {RECIPES}/my_vqa.gin?"),
        ("loras", "Did you mean gin_configs/models/lora.gin?"),
        ("modle.gin", "Did you mean model.gin?"),
        (f"{RECIPES}/my_vqas.gin", f"Did you mean {RECIPES}/my_vqa.gin or"),
        ("nothing/like/zzzz", f"Recipes: {RECIPES}/coco_captions.gin, "),
    ],
)
def test_a_gin_file_that_is_not_there_is_told_with_the_nearest(folder, file, message):
    with pytest.raises(RecipeError) as caught:
        loading.read([file], [], ["", str(ROOT)])
    assert f"no gin file {file} (named on the command line)" in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "override, message",
    [
        ("VOCB_SIZE=3", "VOCB_SIZE is set but nothing uses it. Did you mean VOCAB_S"),
        ("T5Confg.width=3", "names no 'T5Confg'. Did you mean T5Config"),
        ("T5Config.widht=3", "no parameter 'widht'. Did you mean width?"),
        ("T5Config.zzz=3", "Its parameters: activation, attention_form, dropout_rate"),
        ("T5Config.width=%WIDTH", "macro WIDTH is not defined. Defined macros: VOCAB"),
        ("T5Config.width=2.5", "t5.T5Config.width: must be int, got 2.5 (float)."),
        ("T5Config.width=True", "must be int, got True (bool)."),
        ("T5Config.dropout_rate='1'", "must be float, got '1' (str)."),
        ("T5Config.tied_logits=1", "must be bool, got 1 (int)."),
        ("T5Config.remat='all'", "must be Literal['none', 'dots', 'block'], got 'all'"),
        ("ViTConfig.image_size=[8, 8]", "(a list). Write a tuple, with round brackets"),
        ("ViTConfig.image_size=(8, 8, 3)", "must be tuple[int, int], got (8, 8, 3)"),
        ("ViTConfig.image_size=8", "must be tuple[int, int], got 8 (int)."),
        ("VOCAB_SIZE='300'", "command line --gin.VOCAB_SIZE: t5.T5Config.vocab_size ="),
        (
            "VOCAB_SIZE='300'",
            "vocab_size = %VOCAB_SIZE (model.gin:19): must be int, go",
        ),
        ("ImageTextModule.tower=@ViTConfig", "Write @ViTConfig() to pass what it retu"),
        (
            "ImageTextModule.tower=@T5Config()",
            "must be vit22b_transfer.models.towers.To",
        ),
        ("T5Config.width=@T5Config", "must be int, got @T5Config."),
        ("MODEL_DIR=/tmp/x", "Text needs quotes within quotes: '--gin.MODEL_DIR=\"/tm"),
        ("T5Config.width=eight", "'eight' is not a value"),
        ("T5Config.width=(1, 2", "'(1, 2' is not a value"),
    ],
)
def test_a_wrong_override_is_told_with_what_would_be_right(folder, override, message):
    assert message in error_of(override)


@pytest.mark.parametrize(
    "override",
    [
        "T5Config.dropout_rate=0",
        "T5Config.dtype='bfloat16'",
        "ImageTextModule.tower=None",
        "ViTConfig.image_size=(8, 16)",
        "ViTConfig.pixel_std=(1, 0.5, 0.25)",
        "vit.ViTConfig.scan_layers=True",
        "VOCAB_SIZE=400",
    ],
)
def test_right_overrides_are_accepted(folder, override):
    read(override)


@pytest.mark.parametrize(
    "text, message",
    [
        (
            f"{HEADER}t5.T5Confg.width = 3",
            "extra.gin:8: t5.T5Confg.width: vit22b_transfer.models.t5 has no "
            "'T5Confg'. Did you mean T5Config or t5_config?",
        ),
        (f"{HEADER}vt.ViTConfig.width = 3", "does not import 'vt'. Did you mean vit?"),
        (f"{HEADER}t5.T5Config.text = 1", "extra.gin:8: t5.T5Config has no parameter"),
        (f"{HEADER}t5.T5Config.dtype = @vit.Tower()", "Did you mean VisionTower"),
        ("A = (1,\n", "EOF in multi-line statement"),
        ("t5.T5Config.width = 3", "needs `from __gin__ import dynamic_registration`"),
        ("include 'modle.gin'", "included by extra.gin:1) in the current directory. D"),
        ("include 'extra.gin'", "extra.gin includes itself"),
        ("A = %B\nB = %A", "macros refer in a circle: A -> B -> A."),
        (f"{HEADER}from vit22b_transfer.models import vti", "there is no module"),
        ("A = = 3", "extra.gin:1: Unable to parse value."),
        ("A 3", "extra.gin:1: Couldn't parse statement"),
        ("A = 3\nB = %A", "extra.gin:2: macro B is set but nothing uses it."),
    ],
)
def test_a_wrong_file_is_told_with_its_line(folder, text, message):
    assert message in error_in(folder, text)


def test_parameters_of_functions_with_overrides_are_those_of_what_they_make(folder):
    text = f"{HEADER}vit.vit22b_config.variant = 'Ti/16'\n"
    (folder / "tower.gin").write_text(text)
    read("vit22b_config.image_size=(32, 32)", file="tower.gin")
    message = error_of("vit22b_config.image_sze=(32, 32)", file="tower.gin")
    assert "no parameter 'image_sze'. Did you mean image_size?" in message


def test_an_ambiguous_override_lists_what_it_may_mean(folder):
    imports = "from flax import linen\nfrom vit22b_transfer.models import layers\n"
    text = f"{HEADER}{imports}linen.Dense.use_bias = True\nlayers.Dense.inputs = 4"
    (folder / "two.gin").write_text(text)
    assert "it may be flax.linen.Dense or vit22b_transfer.models.layers.Dense" in (
        error_of("Dense.use_bias=False", file="two.gin")
    )
    read("layers.Dense.use_bias=False", file="two.gin")


def test_required_values_are_listed_together(folder):
    required = "VOCAB_SIZE = %gin.REQUIRED\n"
    (folder / "need.gin").write_text(
        f"include 'model.gin'\n{HEADER}{required}t5.T5Config.width = %gin.REQUIRED"
    )
    recipe = read(file="need.gin")

    with pytest.raises(RecipeError) as caught:
        loading.check_complete(recipe, encoder_decoder.ImageTextModule)
    assert re.search(
        r"must be set: VOCAB_SIZE \(need.gin:9\), t5.T5Config.width \(need.gin:10\). "
        r"Set them in the recipe or with --gin.NAME=VALUE.",
        str(caught.value),
    )


def test_unbound_parameters_of_everything_that_is_built_are_listed(folder):

    text = MODEL.replace("  depth = 1\n", "").replace("  head_dim = 4\n", "")
    (folder / "less.gin").write_text(text)
    with pytest.raises(RecipeError) as caught:
        loading.check_complete(read(file="less.gin"), encoder_decoder.ImageTextModule)
    message = str(caught.value)
    assert "must be bound: " in message
    assert "vit.ViTConfig.depth" in message
    assert "t5.T5Config.head_dim" in message
    assert "width" not in message


def test_a_recipe_that_does_not_configure_the_command_is_refused(folder):
    with pytest.raises(RecipeError, match="does not configure .*greedy"):
        from vit22b_transfer.inference import decoding

        loading.check_complete(read(), decoding.greedy)


def test_gin_builds_what_the_recipe_says(folder):
    from vit22b_transfer.models import vit

    recipe = read("ViTConfig.patch_size=2", "VOCAB_SIZE=512")
    module = loading.install(recipe, encoder_decoder.ImageTextModule, [""])()
    assert isinstance(module.tower, vit.ViTConfig)
    assert module.tower.patch_size == 2
    assert module.text.vocab_size == 512


def test_what_gin_alone_refuses_is_a_recipe_error_too(folder):

    recipe = read()
    (folder / "model.gin").write_text("A = %B")
    with pytest.raises(RecipeError, match="gin refuses the recipe"):
        loading.install(recipe, encoder_decoder.ImageTextModule, [""])


def test_errors_of_our_own_code_are_told_without_traceback(folder, capsys):
    arguments = ["vocab", "--out=o.model", "--vocab_size=300", "none.jsonl"]
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("vit22b: error: ") and "none.jsonl" in error
    assert "Traceback" not in error
    assert cli.main([*arguments, "--traceback"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_errors_of_other_code_keep_their_traceback(folder, capsys):
    (folder / "broken_source.py").write_text(BROKEN_SOURCE)
    assert cli.main(["tasks", "--import=broken_source"]) == 1
    seqio.TaskRegistry.remove("broken_source")
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert "ZeroDivisionError" in error


BROKEN_SOURCE = """
import seqio

class Source(seqio.FunctionDataSource):
    splits = property(lambda self: 1 / 0, lambda self, value: None)

def read(split, shuffle_files):
    return None

source = Source(read, ["train"])
task = seqio.Task("broken_source", source, output_features={}, preprocessors=[])
seqio.TaskRegistry.add_provider("broken_source", task)
"""


@pytest.mark.parametrize(
    "text, message",
    [
        ("1 / 0\n", r"cannot be imported: ZeroDivisionError: .*own.py, line 1\)"),
        ("import sys\n\nsys.exit(3)\n", r"SystemExit: 3 \(.*own.py, line 3\)"),
        ("import json\n\njson.loads('[')\n", r"JSONDecodeError: .*own.py, line 3\)"),
        ("raise ValueError('two\\nlines')\n", "ValueError: two lines"),
        ("def f(:\n", r"SyntaxError: .*own.py, line 1\)"),
        ("import not_there_at_all\n", "ModuleNotFoundError: No module named 'not_th"),
        ("from tasks import nothing\n", "ImportError: cannot import name 'nothing'"),
        ("import seqio\n", "registers no task or mixture; give one that does"),
        ("", "registers no task or mixture; give one that does"),
    ],
)
def test_a_module_that_raises_or_registers_nothing_is_told_in_one_line(
    folder, monkeypatch, capsys, text, message
):
    (folder / "own.py").write_text(text)
    monkeypatch.delitem(sys.modules, "own", raising=False)
    importlib.invalidate_caches()
    assert cli.main(["tasks", "--import=own"]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.startswith("vit22b: error: module own ") and error.count("\n") == 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("1 / 0\n", "cannot be imported: ZeroDivisionError: "),
        ("import sys; sys.exit(3)\n", "cannot be imported: SystemExit: 3"),
        ("def f(:\n", "cannot be imported: SyntaxError: "),
        ("raise ValueError('x' * 5000)\n", "cannot be imported: ValueError: xxx"),
    ],
)
def test_a_module_of_a_recipe_that_raises_is_told_with_the_recipes_line(
    folder, monkeypatch, text, message
):
    (folder / "own_2.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "own_2", raising=False)
    importlib.invalidate_caches()
    told = error_in(folder, f"{HEADER}import own_2\n")
    assert told.startswith("extra.gin:") and message in told and len(told) < 1000


@pytest.mark.parametrize("name", ["tasks/coco.py", "own.", "..", "tasks.coco.more", ""])
def test_what_is_no_name_of_a_module_is_told_in_one_line(folder, capsys, name):
    assert cli.main(["tasks", f"--import={name}"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("vit22b: error: ") and error.count("\n") == 1, error


def test_a_module_that_is_not_there_is_told_in_one_line(folder, capsys):
    assert cli.main(["tasks", "--import=nowhere_to_be_found"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("vit22b: error: there is no module nowhere_to_be_found in ")
    assert error.count("\n") == 1


def test_vocab_writes_a_vocabulary_and_says_its_size(folder, capsys):
    (folder / "captions.txt").write_text("a red cat\na blue dog sits\nthe red dog\n")
    arguments = ["vocab", "--out=my.model", "--vocab_size=290", "captions.txt"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == "my.model: 290 pieces\n"
    assert (folder / "my.model").stat().st_size
    assert (
        cli.main(["vocab", "--out=o.model", "--vocab_size=99999", "captions.txt"]) == 1
    )
    error = capsys.readouterr().err
    assert error.startswith("vit22b: error: vocab_size 99999 is too large for 3 texts")


def test_tasks_lists_what_the_modules_in_tasks_register(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert cli.main(["tasks"]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("scenes_vqa")
    assert lines[start + 1] == "  splits: test, train, validation"
    assert re.match(r"  features: images \(uint8, rank 3\), inputs", lines[start + 2])
    start = lines.index("scenes_mixture")
    rates = r"  mixture of: scenes_captioning x\S+, scenes_vqa x\S+"
    assert re.fullmatch(rates, lines[start + 1])
