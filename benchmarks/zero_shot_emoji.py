"""Zero-shot on held-out names of emoji, after locked-image tuning of a tower.

Claim: names that neither the tower nor the text tower has seen, with all their
pictures, are told apart at least five times as well as by chance, after a LiT run of
minutes.

    npm pack emoji-datasource-google@16.0.0
    tar xzf emoji-datasource-google-16.0.0.tgz
    python benchmarks/lay_out_pictures.py emoji package emoji
    python benchmarks/zero_shot_emoji.py emoji

A tower is trained from nothing to tell the words of the names (a sigmoid for each word,
several to a picture). Then a text tower learns to read the locked tower, from pictures
and whole names. Held out are the men and women in 26 roles, in each skin tone: their
words are known from others (somebody else has the role, other roles have the tone), the
names are not. Prompts are the names alone.
"""

import argparse
import pathlib
import tempfile
import time

import interleave
from real_pictures import ONE_DEVICE, optimizer

from vit22b_transfer.data import (
    augmentation,
    class_lists,
    label_converters,
    vocabularies,
)
from vit22b_transfer.data.labelled_sources import LabelFiles, LabelFileSource
from vit22b_transfer.data.pair_converters import PairFeatureConverter
from vit22b_transfer.data.sources import (
    CaptionFiles,
    CaptionFileSource,
    CocoCaptionsSource,
)
from vit22b_transfer.evaluation import evaluate, label_metrics
from vit22b_transfer.models import contrastive, text_towers, vit
from vit22b_transfer.models.classifier import ClassificationModel, ClassifierModule
from vit22b_transfer.recipes import shipped
from vit22b_transfer.training import inputs
from vit22b_transfer.training.train import InitialCheckpoint, Periods, fine_tune

SIDE, TEXT_LENGTH, LABELS, PIECES = 32, 24, 16, 900
CROPS = augmentation.Augmentation(crop_area=(0.7, 1.0))
RULES = ((r"encoder/tower/.*", r"\g<0>"), (".*", None))


def register(folder):
    """Registers `words`, `names` and `held_out`; how many words, and the vocabulary."""
    shipped.offer_tasks()
    from tasks.classification import register_classification
    from tasks.contrastive import register_pairs, register_zero_shot

    images, classes = folder / "images", folder / "classes.txt"
    vocabulary = vocabularies.train(
        [folder / "train.json"], folder / "pieces.model", vocab_size=PIECES
    )
    register_classification(
        "words",
        LabelFileSource(
            {"train": LabelFiles(folder / "words.jsonl", images)}, classes=classes
        ),
        metric_fns=(label_metrics.multi_label,),
    )
    names = {"train": CaptionFiles(folder / "train.json", images)}
    register_pairs("names", CocoCaptionsSource(names), vocabulary=vocabulary)
    table = folder / "held_out.csv"
    lines = table.read_text().splitlines()[1:]
    register_zero_shot(
        "held_out",
        CaptionFileSource({"test": CaptionFiles(table, images)}),
        sorted({line.partition(",")[2] for line in lines}),
        templates=["{}"],
        vocabulary=vocabulary,
    )
    return len(class_lists.read(classes).names), vocabulary


def image_tower():
    return vit.ViTConfig(
        width=96,
        depth=3,
        mlp_dim=384,
        num_heads=6,
        patch_size=8,
        image_size=(SIDE, SIDE),
        pooling="gap",
    )


def text_tower():
    return text_towers.TransformerConfig(
        vocab_size=PIECES,
        embed_dim=96,
        max_length=TEXT_LENGTH,
        width=96,
        depth=2,
        num_heads=6,
        mlp_dim=384,
        pooling="mean",
    )


def train(model, task, lengths, batch, steps, directory, seed, **more):
    fine_tune(
        model,
        model_dir=directory,
        data=inputs.TrainData(task, "train", lengths, batch, augmentation=CROPS),
        total_steps=steps,
        partitioning=ONE_DEVICE,
        periods=Periods(log=max(steps // 10, 1), evaluate=steps, checkpoint=steps),
        seed=seed,
        **more,
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--tower-steps", type=int, default=600, help="of 64 pictures")
    parser.add_argument("--steps", type=int, default=400, help="of 128 pairs")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    words, vocabulary = register(args.folder.resolve())
    pair_lengths = {"images": (SIDE, SIDE), "targets": TEXT_LENGTH}
    with tempfile.TemporaryDirectory() as work:
        began = time.perf_counter()
        train(
            ClassificationModel(
                ClassifierModule(image_tower(), words, head_bias=-5.0),
                optimizer(3e-3, args.tower_steps),
                label_converters.ImageLabelFeatureConverter,
                loss="sigmoid",
            ),
            "words",
            {"images": (SIDE, SIDE), "labels": LABELS},
            64,
            args.tower_steps,
            f"{work}/tower",
            args.seed,
        )
        tower_seconds = time.perf_counter() - began
        model = contrastive.ContrastiveModel(
            contrastive.ContrastiveModule(
                image_tower(), text_tower(), first_bias=-2.71
            ),
            vocabulary,
            optimizer(2e-3, args.steps),
            PairFeatureConverter,
            frozen_tower=True,
        )
        began = time.perf_counter()
        initial = InitialCheckpoint(f"{work}/tower", RULES)
        train(
            model,
            "names",
            pair_lengths,
            128,
            args.steps,
            f"{work}/lit",
            args.seed,
            initial=initial,
        )
        seconds = time.perf_counter() - began
        scores = evaluate.evaluate_checkpoint(
            model,
            partitioning=ONE_DEVICE,
            checkpoint=f"{work}/lit",
            tasks="held_out",
            split="test",
            feature_lengths=pair_lengths,
            batch_size=64,
            output_dir=f"{work}/eval",
        )["held_out"].metrics
    chance = 100 / scores["classes"]
    interleave.print_table(
        ["held-out names", "chance, %", "top-1, %", "times", "top-5, %", "LiT, s"],
        [
            [
                f"{scores['classes']:.0f}",
                f"{chance:.2f}",
                f"{scores['top1']:.1f}",
                f"{scores['top1'] / chance:.1f}",
                f"{scores['top5']:.1f}",
                f"{seconds:.0f}",
            ]
        ],
    )
    print(f"the tower took {tower_seconds:.0f} s")
    return scores["top1"], chance


if __name__ == "__main__":
    main()
