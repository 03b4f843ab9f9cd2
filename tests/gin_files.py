"""The shipped gin files, and recipes with files behind them."""

import re
from pathlib import Path

from vit22b_transfer.recipes import loading

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "gin_configs"


def files(folder):
    return sorted((CONFIGS / folder).glob("*.gin"))


def model_files(*names):
    return [CONFIGS / f"models/{name}.gin" for name in names]


RECIPES = files("recipes")
# Read by T5X, before a recipe.
T5X_RUNS = sorted((CONFIGS / "runs").glob("t5x_*.gin"))
WHOLE_RUNS = [
    CONFIGS / f"runs/{name}.gin"
    for name in ("train", "eval", "infer", "given_images", "bench", "judge")
]
WHOLE_RUNS += [CONFIGS / f"runs/{name}.gin" for name in ("serve", "export_jax")]
WHOLE_RUNS += sorted((CONFIGS / "runs").glob("probe*.gin"))
# Each the first file of a `vit22b probe`.
PROBES = files("probes")
# And of a `vit22b measure`.
MEASURES = files("measures")
# What may stand behind a recipe.
BEHIND = [
    path
    for folder in ("models", "meshes", "runs")
    for path in files(folder)
    if path not in (*T5X_RUNS, *WHOLE_RUNS)
]
# What the command line sets where a file asks for it.
OPEN = {
    "MODEL_DIR": "'/nowhere'",
    "OUTPUT_DIR": "'/nowhere'",
    "INITIAL_CHECKPOINT": "'/nowhere/checkpoint_1'",
    "INITIAL_IMAGE_SIZE": "(32, 32)",
    "DATA_FOLDER": "'/nowhere/data'",
    "UNITS_PER_METRE": "1000.0",
    "VIT": "'S/16'",
    "TEACHER": "'B/16'",
    "TEACHER_CHECKPOINT": "'/nowhere/checkpoint_2'",
    "T5": "'small'",
    "GEMMA": "'gemma-2b'",
    "CACHE_DIR": "'/cache'",
    "TOWER_CHECKPOINT": "'/checkpoint_0'",
    "COOLDOWN_STEPS": "50",
    "DECODE_LENGTH": "5",
    "GENERATE_EVERY": "500",
    "BEST_METRIC": "'eval/scenes_vqa/loss'",
    "BEST_MODE": "'min'",
    "NUM_CLASSES": "7",
    "CLASSES": "'/classes.txt'",
    "EMBED_DIM": "192",
    "TEXT_LENGTH": "8",
    "HEAD": "'/head.npz'",
    "JUDGEMENTS": "'/real.json'",
    "TABLE": "'/attributes.csv'",
    "TARGET": "'Smiling'",
    "GROUPS": "('Male',)",
    "RESULTS": "('/measures.jsonl',)",
    "ANSWERS": "'/answers.txt'",
}


def required_macros(path):
    """Names that the header of a recipe says are required."""
    line = re.search(r"# REQUIRED macros?: (.*)\.", path.read_text())
    return line[1].split(", ")


def read_recipe(path, *overrides, behind=()):
    """A recipe with files behind it, and what they leave open set."""
    text, todo = "", list(behind)
    while todo:
        text += todo.pop().read_text()
        todo += [ROOT / name for name in re.findall("^include '(gin_.*)'", text, re.M)]
        text = text.replace("include", "included")
    used = set(re.findall(r"%(\w+)", text)) | set(
        re.findall(r"^(\w+) = %gin", text, re.M)
    )
    defined = set(re.findall(r"^(\w+) = (?!%gin)", text, re.M))
    needed = (used - defined) | set(required_macros(path))
    settings = [f"{name}={value}" for name, value in OPEN.items() if name in needed]
    names = [file.relative_to(ROOT).as_posix() for file in (path, *behind)]
    return loading.read(names, [*overrides, *settings], [str(ROOT)])
