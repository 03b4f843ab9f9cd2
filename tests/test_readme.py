"""What README.md and docs/ say is so: their commands run, the tree is the tree."""

import json
import re
import shutil
from pathlib import Path

import gemma_peers
import jax
import numpy as np
import photographs
import PIL.Image
import pytest
import tiny_classifier
import tiny_dense
from shell_commands import (
    no_tasks,
    recorded_calls,
    run_in_process,
    use_one_device,
)
from torch_peers import import_peer

from vit22b_transfer import cli
from vit22b_transfer.commands import runs
from vit22b_transfer.data import vocabularies
from vit22b_transfer.demo import scenes
from vit22b_transfer.evaluation.sixteen_classes import NAMES
from vit22b_transfer.recipes import loading, shipped

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.name: page.read_text(encoding="utf-8") for page in PAGES}

# Each block of commands, by the HTML comment in the line before it. A mark is one of
#   ci: NAME            .ci/run runs the block
#   test: NAME          a test here runs it, test_NAME_runs_as_written
#   read: WHY           recipe and arguments are checked, WHY says what a run needs
#   elsewhere: FILE     the file of tests runs these commands
#   not run: WHY
_BLOCK = re.compile(r"(?:<!-- ([^\n]*) -->\n)?```(bash|python)\n(.*?)```", re.DOTALL)
BLOCKS = [
    (page, mark, commands)
    for page, text in TEXTS.items()
    for mark, _, commands in _BLOCK.findall(text)
]
READ = [(mark, commands) for _, mark, commands in BLOCKS if mark.startswith("read: ")]


def block(mark):
    (found,) = [commands for _, known, commands in BLOCKS if known == mark]
    return found


def test_every_block_is_run_or_says_why_not():
    ci = (ROOT / ".ci" / "run").read_text()
    tests = Path(__file__).read_text()
    marks = [mark for _, mark, _ in BLOCKS]
    named = [mark for mark in marks if not mark.startswith(("read: ", "not run: "))]
    assert len(set(named)) == len(named)
    unsupported = []
    for page, mark, commands in BLOCKS:
        kind, _, rest = mark.partition(": ")
        is_covered = {
            "ci": lambda name: re.search(rf"^ *run_(block|tests) {name}$", ci, re.M),
            "test": lambda name: f"test_{name.replace('-', '_')}_runs_as_w" in tests,
            "read": lambda why: len(why) > 5,
            "elsewhere": lambda file: (ROOT / file).is_file(),
            "not run": lambda why: len(why) > 5,
        }
        if kind not in is_covered or not is_covered[kind](rest):
            unsupported.append(
                f"{page}: {mark or 'no mark'}: {commands.splitlines()[0]}"
            )
    assert not unsupported


def test_links_between_pages_lead_somewhere():
    broken = [
        f"{page.name}: {link}"
        for page in PAGES
        for link in re.findall(r"\]\(([^)#:]+)", TEXTS[page.name])
        if not (page.parent / link).is_file()
    ]
    assert not broken


def test_readme_stays_short():
    assert len(TEXTS["README.md"].splitlines()) <= 120


def test_files_of_the_repository_that_are_named_exist():
    named = {
        name
        for text in TEXTS.values()
        for name in re.findall(r"(?:gin_configs|tasks|tests|benchmarks)/[\w./]+", text)
    }
    named |= {
        f"gin_configs/{name}"
        for name in re.findall(r"`((?:models|runs)/\w+\.gin)`", TEXTS["recipes.md"])
    }
    named |= {
        f"gin_configs/meshes/{name}"
        for name in re.findall(r"`(\w+\.gin)`", TEXTS["scale.md"])
    }
    missing = [name for name in named if not (ROOT / name.rstrip(".")).exists()]
    assert set(missing) <= {"tasks/NAME.py"}


@pytest.mark.parametrize("mark, commands", READ, ids=[mark[6:] for mark, _ in READ])
def test_what_is_only_read_has_a_complete_recipe(mark, commands, tmp_path):
    for _, _, arguments in recorded_calls(commands, tmp_path):
        args = cli.parsed(arguments)
        with no_tasks():
            shipped.offer_tasks()
            recipe = loading.read(args.gin_file, args.overrides, shipped.search_paths())
        loading.check_complete(recipe, runs.root_of(args))


@pytest.fixture
def own_data(tmp_path):
    """A user's folder: COCO captions, images, and new images, one of them broken."""
    sizes = {"train": 24, "validation": 8, "test": 6}
    drawn = scenes.write_scenes(tmp_path / "drawn", seed=3, sizes=sizes)
    (tmp_path / "images").mkdir()
    for split in ("train", "validation"):
        shutil.copy(drawn[split].captions, tmp_path / f"{split}.json")
        for image in drawn[split].images.iterdir():
            shutil.copy(image, tmp_path / "images")
    shutil.copytree(drawn["test"].images, tmp_path / "new_images")
    broken = sorted((tmp_path / "new_images").iterdir())[2]
    broken.write_bytes(broken.read_bytes()[:100])
    use_one_device(tmp_path)
    return tmp_path, broken.name


@pytest.mark.slow
def test_my_classes_runs_as_written(tmp_path, capfd):
    tiny_classifier.draw_folders(tmp_path, train=4, validation=2, size=32)
    shutil.copytree(tmp_path / "validation", tmp_path / "new_images")
    use_one_device(tmp_path)
    run_in_process(block("test: my-classes"), tmp_path)
    path = tmp_path / "trial" / "my_unlabelled_images-test-checkpoint_20.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    names = (tmp_path / "classes.txt").read_text().split()
    assert len(lines) == 8 and {line["class_name"] for line in lines} <= set(names)
    assert not any("metadata" in line for line in lines)
    assert "without_labels" not in capfd.readouterr().err


@pytest.mark.slow
def test_mixed_runs_as_written(tmp_path, monkeypatch):
    sizes = {"train": 24, "validation": 4, "test": 4}
    scenes.write_scenes(tmp_path / "scenes", sizes=sizes)
    monkeypatch.setenv("VIT22B_DATA_DIR", str(tmp_path / "scenes"))
    use_one_device(tmp_path)
    # Of few steps compilation takes the time.
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        run_in_process(block("test: mixed"), tmp_path)
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    scored = json.loads((tmp_path / "mixed" / "metrics.json").read_text())
    (labels,) = scored.values()
    assert labels["num_scored"] == 4
    assert labels["metrics"]["classes_with_images"] > 4


@pytest.mark.slow
def test_pre_training_runs_as_written(tmp_path, capfd):
    tiny_classifier.draw_folders(tmp_path, train=4, validation=2, size=32)
    use_one_device(tmp_path)
    run_in_process(block("test: pre-training"), tmp_path)
    assert "embedding, resampled from" in capfd.readouterr().out
    assert (tmp_path / "at_128" / "checkpoint_20").is_dir()


@pytest.mark.slow
def test_cached_teacher_runs_as_written(tmp_path, capfd):
    tiny_classifier.draw_folders(tmp_path, train=4, validation=2, size=32)
    shutil.copytree(tmp_path / "validation", tmp_path / "new_images")
    use_one_device(tmp_path)
    # One layer, which compiles in a tenth of the time.
    tower = tmp_path / "gin_configs" / "models" / "vit.gin"
    tower.parent.mkdir()
    shipped_one = (ROOT / "gin_configs" / "models" / "vit.gin").read_text()
    tower.write_text(f"{shipped_one}\nvit.vit22b_config.depth = 1\n")
    run_in_process(block("test: cached-teacher"), tmp_path)
    shown = capfd.readouterr().out
    assert "1 shards; the teacher was run on 16 images" in shown
    assert "eval/my_image_folder/teacher_agreement" in shown
    written = tmp_path / "student" / "my_unlabelled_images-test-checkpoint_20.jsonl"
    assert len(written.read_text().splitlines()) == 8


@pytest.mark.slow
def test_my_captions_runs_as_written(own_data):
    folder, broken = own_data
    run_in_process(block("test: my-captions"), folder)
    name = "my_new_images-test-checkpoint_20.jsonl"  # of six images, the whole
    lines = [
        json.loads(x) for x in (folder / "captions" / name).read_text().splitlines()
    ]
    assert len(lines) == 6
    assert [line["index"] for line in lines] == list(range(6))
    failed = [line for line in lines if "error" in line]
    assert len(failed) == 1 and broken in json.dumps(failed[0])
    assert all(isinstance(x["prediction"], str) for x in lines if "error" not in x)
    metrics = json.loads((folder / "trial" / "metrics.json").read_text())
    assert "cider_d" in metrics["my_captions/validation"]["metrics"]
    assert (folder / "trial" / "checkpoint_20").is_dir()


@pytest.mark.slow
def test_front_door_runs_as_written(tmp_path, capfd):
    (tmp_path / "photos").mkdir()
    photographs.write(tmp_path / "photos")
    (tmp_path / "photos" / "tall.png").rename(tmp_path / "photos" / "cat.png")
    model = gemma_peers.paligemma_model("Gemma2", vocab_size=320, num_hidden_layers=1)
    model.save_pretrained(tmp_path / "paligemma")
    (tmp_path / "texts.txt").write_text("a cat and a dog\n")
    vocabularies.train(
        [str(tmp_path / "texts.txt")],
        str(tmp_path / "paligemma" / "tokenizer.model"),
        vocab_size=280,
    )
    use_one_device(tmp_path)
    run_in_process(block("test: front-door"), tmp_path)
    lines = (tmp_path / "captions.jsonl").read_text().splitlines()
    assert len(lines) == 12 and all("prediction" in json.loads(x) for x in lines)
    assert capfd.readouterr().out.splitlines()[-1].startswith("photos/cat.png\t")


@pytest.mark.slow
def test_own_model_runs_as_written(own_data, capfd):
    folder, broken = own_data

    def edit():
        with open(folder / "my_project" / "recipe.gin", "a") as file:
            file.write("TRAIN_STEPS = 2\nWARMUP_STEPS = 1\nIMAGE_SIZE = (32, 32)\n")
        use_one_device(folder / "my_project")

    run_in_process(block("test: own-model"), folder, edit=edit)
    scores = json.loads((folder / "my_project" / "run" / "metrics.json").read_text())
    assert "cider_d" in scores["my_captions/validation"]["metrics"]
    shown = capfd.readouterr().out.splitlines()[-6:]
    assert [("error: " in line) for line in shown].count(True) == 1
    assert broken in next(line for line in shown if "error: " in line)


def save_public_siglip(folder, *, depth=1, width=16):
    """`siglip`, tiny, in the files of a published one."""
    transformers = import_peer("transformers")
    sizes = dict(num_hidden_layers=depth, num_attention_heads=2, intermediate_size=32)
    config = transformers.SiglipVisionConfig(
        hidden_size=width, image_size=32, patch_size=16, **sizes
    )
    transformers.SiglipVisionModel(config).save_pretrained(folder / "siglip")
    pixels = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
    pixels["size"] = {"height": 32, "width": 32}
    (folder / "siglip" / "preprocessor_config.json").write_text(json.dumps(pixels))


def save_public_models(folder):
    """`siglip` and `t5`, tiny, in the files of the published ones."""
    save_public_siglip(folder)
    transformers = import_peer("transformers")
    config = transformers.T5Config(
        vocab_size=384,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder / "t5")
    vocabularies.train(
        [str(folder / "train.json")],
        str(folder / "t5" / "spiece.model"),
        vocab_size=320,
    )


@pytest.mark.slow
def test_probes_runs_as_written(tmp_path, capsys):
    tiny_classifier.draw_folders(tmp_path, train=6, validation=2, size=32)
    save_public_siglip(tmp_path)
    use_one_device(tmp_path)
    run_in_process(block("test: probes"), tmp_path)
    lines = (tmp_path / "probes" / "probes.jsonl").read_text().splitlines()
    kinds = [json.loads(line)["probe"] for line in lines]
    few_shot = ["FewShot"] * 4
    assert kinds == ["NearestNeighbours"] * 2 + few_shot + [
        "LogisticProbe",
        "LinearProbe",
    ]
    assert capsys.readouterr().out.count("the tower was run on") == 2


def write_measured_data(folder):
    """What the block on measures reads, beside classes: all that its layouts say."""
    rng = np.random.default_rng(0)
    names = [f"{n:03}.png" for n in range(60)]
    signs = rng.choice([-1, 1], (60, 2))
    rows = [f"{name},{a},{b}" for name, (a, b) in zip(names, signs, strict=True)]
    (folder / "faces.csv").write_text("\n".join(["image_id,Smiling,Male", *rows]))
    shapes = [f"cue-conflict/{n}/{n}1-{m}2.png" for n in NAMES for m in ("cat", "dog")]
    sides = [f"cnn/{side}/{n}.png" for side in ("ref", "p0", "p1") for n in range(3)]
    pictures = {"new_images": names[:9], "faces": names, "stimuli": shapes}
    for where, files in (pictures | {"2afc": sides}).items():
        for number, name in enumerate(files):
            path = folder / where / name
            path.parent.mkdir(parents=True, exist_ok=True)
            kind = list(tiny_classifier.ANGLES)[number % 4]
            picture = tiny_classifier.stripes(kind, rng, 32)
            PIL.Image.fromarray(picture).save(path)
    (folder / "2afc" / "cnn" / "judge").mkdir()
    for number in range(3):
        np.save(folder / "2afc" / "cnn" / "judge" / f"{number}.npy", np.array([0.2]))
    ids = {name: [number % 4] for number, name in enumerate(NAMES)}
    (folder / "sixteen.json").write_text(json.dumps(ids))
    (folder / "real.json").write_text(json.dumps([[0, 1]] * 30 + [[2]] * 2))
    raw = folder / "raw-data" / "cue-conflict"
    raw.mkdir(parents=True)
    columns = "subj,session,trial,rt,object_response,category,condition,imagename"
    trials = [
        f"subject-01,1,{n},1.0,na,{name.split('/')[1]},0,{name.split('/')[2]}"
        for n, name in enumerate(shapes)
    ]
    file = raw / "cue-conflict_subject-01_session_1.csv"
    file.write_text("\n".join([columns, *trials]) + "\n")


@pytest.mark.slow
def test_own_shapes_runs_as_written(tmp_path, capsys):
    tiny_classifier.draw_folders(tmp_path, train=6, validation=2, size=32)
    save_public_siglip(tmp_path)
    use_one_device(tmp_path)
    first = block("test: probes").splitlines()[0]
    run_in_process(f"{first}\n{block('test: own_shapes')}", tmp_path)
    lines = (tmp_path / "probes" / "probes.jsonl").read_text().splitlines()
    facts = json.loads(lines[0])["features"]
    assert facts["image_size"] == [256, 256]
    assert "in their own shapes, in patches of" in facts["preparation"]
    assert capsys.readouterr().out.count("the tower was run on") == 2


@pytest.mark.slow
def test_measures_runs_as_written(tmp_path):
    tiny_classifier.draw_folders(tmp_path, train=30, validation=8, size=32)
    save_public_siglip(tmp_path)
    write_measured_data(tmp_path)
    # One file name is one image.
    for number, path in enumerate(sorted((tmp_path / "validation").rglob("*.png"))):
        path.rename(path.with_name(f"{number:04}.png"))
    use_one_device(tmp_path)
    # Of the probes before it, those whose results are read.
    lines = block("test: probes").splitlines()
    needed = [x for x in lines if not re.match("vit22b probe (knn|linear)", x)]
    run_in_process("\n".join(needed), tmp_path)
    run_in_process(block("test: measures"), tmp_path)
    text = (tmp_path / "probes" / "measures.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert {line["measure"] for line in lines} == {*runs.MEASURES}
    for picture in {name for line in lines for name in line["pictures"]}:
        assert (tmp_path / "probes" / picture).is_file()


def make_heads_small(folder):
    """Recipes of heads that are run in the folder take few steps on small crops."""
    smaller = {
        "TRAIN_STEPS": "3",
        "WARMUP_STEPS": "1",
        "SHOWN_SIZE": "(32, 32)",
        "STRIDE": "(16, 32)",
        "TRAIN_BATCH_SIZE": "2",
        "FRAMES": "3",
        "statistics_batches": "1",
        "fused": "8",
        "depth": "1",
    }
    names = ["runs/probe_head.gin", "runs/probe_dense.gin", "probes/video.gin"]
    names += ["runs/probe_segmentation.gin", "probes/segmentation_upernet.gin"]
    for path in (*names, "runs/probe_depth.gin", "probes/depth_dpt.gin"):
        text = (ROOT / "gin_configs" / path).read_text()
        for name, value in smaller.items():
            old = rf"^( *{name}) = [^\n]*$"
            text = re.sub(old, rf"\1 = {value}", text, flags=re.M)
        text = text.replace("= 512", "= 8").replace("96, 192, 384, 768", "8, 8, 8, 8")
        (folder / "gin_configs" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "gin_configs" / path).write_text(text)


@pytest.mark.slow
def test_suite_runs_as_written(tmp_path, capsys):
    tiny_classifier.draw_folders(tmp_path / "pictures", train=3, validation=2, size=32)
    use_one_device(tmp_path)
    run_in_process(block("test: suite"), tmp_path)
    shown = capsys.readouterr().out
    assert shown.count("row 8: few-shot, ImageNet and others") == 2
    assert (tmp_path / "compared" / "suite.html").is_file()


@pytest.mark.slow
def test_dense_runs_as_written(tmp_path, capsys):
    tiny_dense.write_pairs(tmp_path / "scenes")
    tiny_dense.write_pairs(tmp_path / "rooms", units=1000)
    for split in ("training", "validation"):
        tiny_dense.write_clips(tmp_path / "clips", split, 2)
    save_public_siglip(tmp_path, depth=4, width=64)
    use_one_device(tmp_path)
    make_heads_small(tmp_path)
    run_in_process(block("test: dense"), tmp_path)
    text = (tmp_path / "probes" / "probes.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    first = [
        line for line in lines if line["metric"] in ("mean_iou", "mse", "accuracy")
    ]
    kinds = [line["probe"] for line in first]
    assert kinds == ["Segmentation"] * 3 + ["Depth"] * 2 + ["Video"]
    heads = [line["protocol"]["head"]["kind"] for line in first]
    linear = "LinearHead"
    assert heads == [linear, "UperNet", linear, linear, "Dpt", "TemporalHead"]
    assert first[2]["train"]["images"] == 3 and first[2]["protocol"]["train_trunk"]
    for line in first[:-1]:
        assert line["pictures"] and all(map(Path.is_file, map(Path, line["pictures"])))
    assert capsys.readouterr().out.count("the tower was run on") == 2


@pytest.mark.slow
def test_public_weights_runs_as_written(own_data, capsys):
    folder, _ = own_data
    save_public_models(folder)
    recipe = ["--gin_file=gin_configs/recipes/my_captions.gin"]
    recipe += [f"--gin.MODEL_DIR='{folder}/tuned'", "--gin.BATCH_SIZE=8"]
    recipe += ["--gin.TRAIN_STEPS=6", "--gin.WARMUP_STEPS=2"]
    run_in_process(
        block("test: public-weights"),
        folder,
        RECIPE=" ".join(recipe),
        MY_CAPTIONS_JSON="train.json",
        MY_VALIDATION_JSON="validation.json",
        MY_IMAGES="images",
    )
    shown = capsys.readouterr().out
    assert "initial checkpoint" in shown and "encoder/projection" in shown
    assert (folder / "exported" / "model.safetensors").is_file()
    assert "shared.weight" in shown


def test_init_runs_as_written(tmp_path, capfd):
    run_in_process(block("test: init"), tmp_path)
    shown = capfd.readouterr().out
    assert "cd my_project && VIT22B_VOCABULARY=bytes vit22b train" in shown
    assert "my_new_images" in shown.splitlines()[-5:]
    assert "coco_captions" not in shown  # its own tasks only


def test_tasks_runs_as_written(tmp_path, capsys):
    run_in_process(block("test: tasks"), tmp_path)
    assert {"scenes_mixture", "my_captions"} <= set(capsys.readouterr().out.split())


def test_own_task_runs_as_written(own_data, monkeypatch):
    import seqio

    folder, _ = own_data
    with no_tasks():
        shipped.offer_tasks()
        monkeypatch.chdir(folder)
        exec(block("test: own-task"), {})
        task = seqio.TaskRegistry.get("mine")
        assert task.num_input_examples("train") == 24 * 5
        assert task.num_input_examples("validation") == 8


def test_vocab_runs_as_written(own_data, capsys):
    run_in_process(block("test: vocab"), own_data[0])
    assert capsys.readouterr().out == "my.model: 320 pieces\n"


def test_config_runs_as_written(tmp_path, capsys):
    run_in_process(block("test: config"), tmp_path)
    assert "BATCH_SIZE = 32  # command line" in capsys.readouterr().out


@pytest.mark.slow
def test_plan_runs_as_written(tmp_path, capsys):
    run_in_process(block("test: plan"), tmp_path)
    assert "h100, 64 devices: mesh 64 data x 1 model" in capsys.readouterr().out


def test_the_tree_names_every_module():
    contributing = TEXTS["contributing.md"]
    tree = contributing[contributing.index("## The tree") :]
    package = ROOT / "vit22b_transfer"
    modules = {p.name for p in package.rglob("*.py") if p.name != "__init__.py"}
    named = set(re.findall(r"\w+\.py", tree))
    assert named == modules
