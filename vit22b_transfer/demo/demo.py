"""`vit22b demo`: the main job on drawn scenes, as the commands a user would type.

It draws the data, trains a vocabulary, fine-tunes one model on captions and questions
together, evaluates and infers over the test splits, and sets a text-only (blind)
baseline and a majority baseline beside the model. No network connection is opened.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence

import rich.console

from vit22b_transfer.host import tables

Cli = Callable[[Sequence[str]], int]

RECIPE = "gin_configs/recipes/scenes_caption_vqa.gin"
BLIND_RECIPE = "gin_configs/recipes/scenes_blind.gin"
VOCAB_SIZE = 448

# Task, what its headline metric is called, and the row it gets in the table.
HEADLINES = (
    ("scenes_vqa", "vqa_accuracy", "VQA accuracy, test"),
    ("scenes_vqa_compositional", "vqa_accuracy", "VQA accuracy, compositional"),
    ("scenes_captioning", "cider_d", "CIDEr-D, test"),
    ("scenes_captioning_compositional", "cider_d", "CIDEr-D, compositional"),
)
_SHOWN = 12  # images in the picture of predictions


@dataclasses.dataclass(frozen=True)
class DemoPaths:
    """Where the demo writes, all below one directory."""

    root: pathlib.Path

    @property
    def data(self) -> pathlib.Path:
        """The drawn scenes."""
        return self.root / "data"

    @property
    def vocabulary(self) -> pathlib.Path:
        """The SentencePiece model trained on their texts."""
        return self.root / "vocabulary.model"

    @property
    def model(self) -> pathlib.Path:
        """Checkpoint, logs, predictions and metrics of the model."""
        return self.root / "model"

    @property
    def blind(self) -> pathlib.Path:
        """The same of the text-only baseline."""
        return self.root / "blind"


def run(cli: Cli, *, out: str, steps: int | None = None, seed: int = 0) -> None:
    """Runs the whole job below the directory `out`; started again, it goes on.

    `cli` runs one command line and returns its exit code: `cli.main`.
    `steps` shortens or lengthens training of both the model and the blind baseline.
    """
    paths = DemoPaths(pathlib.Path(out).absolute())
    paths.root.mkdir(parents=True, exist_ok=True)
    console = rich.console.Console()
    began = time.perf_counter()
    with _stage(console, "drawing scenes in COCO and VQAv2 format"):
        _draw(paths, seed)
    with _stage(console, "training a vocabulary on their texts"):
        _train_vocabulary(cli, paths)
    limit = []
    if steps is not None:
        warmup = f"--gin.WARMUP_STEPS={steps // 9}"
        limit = [f"--gin.TRAIN_STEPS={steps}", warmup]
    runs = ((RECIPE, paths.model, "the model"), (BLIND_RECIPE, paths.blind, "blind"))
    for recipe, directory, name in runs:
        common = [f"--gin_file={recipe}", f"--gin.MODEL_DIR={str(directory)!r}"]
        common += limit
        with _stage(console, f"fine-tuning {name} on captions and questions"):
            _command(cli, "train", *common, f"--gin.train.fine_tune.seed={seed}")
        if directory == paths.model:
            with _stage(console, "inference over the test splits"):
                # The others are predicted by the evaluation, which reuses these.
                for task in ("scenes_captioning", "scenes_vqa"):
                    _command(cli, "infer", *common, f"--gin.INFER_TASK={task!r}")
        with _stage(console, f"evaluating {name}"):
            tasks = tuple(task for task, _, _ in HEADLINES)
            _command(cli, "eval", *common, f"--gin.EVAL_TASKS={tasks!r}")
    with _stage(console, "baselines and pictures"):
        results = _results(paths)
        results["seconds"] = round(time.perf_counter() - began, 1)
        (paths.root / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        _draw_predictions(paths)
    _print_table(console, results)
    console.print(f"{results['seconds']:.0f} s in all", highlight=False)
    console.print(
        f"predictions, metrics, checkpoints, logs and predictions.png: {paths.root}",
        soft_wrap=True,
        highlight=False,
    )


@contextlib.contextmanager
def _stage(console: rich.console.Console, title: str) -> Iterator[None]:
    began = time.perf_counter()
    console.rule(title, align="left")
    yield
    console.print(f"({time.perf_counter() - began:.1f} s)", highlight=False)


def _command(cli: Cli, *argv: str) -> None:
    """Runs one `vit22b` command in this process, showing it as it would be typed."""
    print("$ vit22b", *(f'"{a}"' if "'" in a else a for a in argv), flush=True)
    code = cli(argv)
    if code:
        raise SystemExit(code)


def _draw(paths: DemoPaths, seed: int) -> None:
    from vit22b_transfer.demo import scene_layout, scenes

    # Left out: comparing two objects takes longer to learn than a demonstration lasts.
    kinds = tuple(k for k in scene_layout.QUESTION_TYPES if k != "compare")
    config = scenes.SceneConfig(question_types=kinds)
    scenes.write_scenes(paths.data, config=config, seed=seed)
    os.environ["VIT22B_DATA_DIR"] = str(paths.data)


def _train_vocabulary(cli: Cli, paths: DemoPaths) -> None:
    if not paths.vocabulary.exists():
        annotations = paths.data / "annotations"
        kinds = ("captions", "questions", "answers")
        files = [str(annotations / f"{kind}_train.json") for kind in kinds]
        _command(
            cli,
            "vocab",
            f"--out={paths.vocabulary}",
            f"--vocab_size={VOCAB_SIZE}",
            *files,
        )
    os.environ["VIT22B_VOCABULARY"] = str(paths.vocabulary)


def _results(paths: DemoPaths) -> dict:
    """Headline metrics of the model and the baselines, by task."""
    from vit22b_transfer.evaluation import evaluate, text_metrics

    scored = {
        name: json.loads((directory / evaluate.METRICS_FILE).read_text())
        for name, directory in (("model", paths.model), ("blind", paths.blind))
    }
    table = {}
    for task, metric, _ in HEADLINES:
        entry = scored["model"][f"{task}/test"]
        row = {name: scored[name][f"{task}/test"]["metrics"][metric] for name in scored}
        # The compositional tasks have no training split: the ordinary task's serves.
        # No lengths: the sources of drawn scenes give texts without reading images.
        text, majority = evaluate.score_majority(
            entry["predictions"],
            task,
            {},
            train_task=task.removesuffix("_compositional"),
        )
        row |= {"majority": majority.metrics[metric], "majority_text": text}
        if metric == "cider_d":
            references = [line["references"] for line in _lines(entry["predictions"])]
            row["references"] = text_metrics.reference_agreement(references)
        table[task] = row
    return {"results": table}


def _lines(path: str) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _print_table(console: rich.console.Console, results: dict) -> None:
    rows = [results["results"][task] for task, _, _ in HEADLINES]
    columns = {
        name: [f"{row[name]:.3f}" if name in row else "" for row in rows]
        for name in ("model", "blind", "majority", "references")
    }
    titles = [title for _, _, title in HEADLINES]
    tables.print_table(console, titles, columns, title="Drawn scenes")
    captions = results["results"]["scenes_captioning"]
    console.print(
        "blind: the same text model without images. majority: always the most frequent "
        "training target. references: each caption against the other four, of which "
        f"the model reaches {100 * captions['model'] / captions['references']:.0f} %.",
        highlight=False,
    )


def _predictions(paths: DemoPaths, task: str) -> str:
    scored = json.loads((paths.model / "metrics.json").read_text())
    return scored[f"{task}/test"]["predictions"]


def _draw_predictions(paths: DemoPaths) -> None:
    """Writes predictions.png: test images, what is predicted of them, what is true."""
    from vit22b_transfer.demo import picture, scenes

    by_image: dict[str, list[picture.Line]] = {}
    for task in ("scenes_captioning", "scenes_vqa"):
        for line in _lines(_predictions(paths, task)):
            lines = by_image.setdefault(line["image_id"], [])
            question = line["prompt"].removeprefix("answer en ")
            if question == line["prompt"]:
                said = picture.caption_lines(line["prediction"], line["references"])
            else:
                said = picture.answer_lines(
                    question, line["prediction"], line["references"]
                )
            lines += said
    folder = scenes.scene_paths(paths.data, "test").images
    chosen = list(by_image.items())[:_SHOWN]
    panels = [
        (folder / scenes.IMAGE_FILE.format(image_id=int(image_id)), lines)
        for image_id, lines in chosen
    ]
    picture.draw(panels, str(paths.root / "predictions.png"))
