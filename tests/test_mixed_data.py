"""Mixtures of tasks with other objectives: what a batch of them holds; real runs."""

import dataclasses

import numpy as np
import pytest
import seqio
import tensorflow as tf
import tiny_classifier
import tiny_mixed
import tiny_runs
from array_tasks import ArraySource

from vit22b_transfer import UserError
from vit22b_transfer.data import batches, label_preprocessors, objectives, preprocessors
from vit22b_transfer.data.mixed_converters import MixedFeatureConverter
from vit22b_transfer.demo import scenes
from vit22b_transfer.evaluation import evaluate, training_scores
from vit22b_transfer.inference import decoding
from vit22b_transfer.models import contrastive
from vit22b_transfer.training import inputs, optimizers

BYTES = seqio.ByteVocabulary()
LENGTHS = {"images": 16, "inputs": 6, "targets": 6, "labels": 2}
TEXT = preprocessors.image_text_features(BYTES)


def example(number, **others):
    return {
        "images": tf.fill([16, 16, 3], tf.cast(1 + number, tf.uint8)),
        "image_id": tf.strings.as_string(number),
        "image_error": tf.constant(""),
        **others,
    }


def text(number):
    tokens = tf.cast(tf.stack([10 + number, 20 + number]), tf.int32)
    tokens = tf.concat([tokens, [1]], axis=0)
    return example(number, inputs=tf.constant([7, 1]), targets=tokens)


def label(number):
    """Example 3 has none, though its task is one of labels."""
    labels = tf.cast(number, tf.int32)[None] % tiny_classifier.NUM_CLASSES
    return example(number, labels=labels[: tf.where(number == 3, 0, 1)])


@pytest.fixture(scope="module", autouse=True)
def registered():
    made = {
        "mix_captions": (text, TEXT, []),
        "mix_pairs": (text, TEXT, [objectives.marked("contrastive")]),
        "mix_both": (text, TEXT, [objectives.marked("captioning", "contrastive")]),
        "mix_labels": (label, label_preprocessors.label_features(), []),
    }
    for name, (make, features, steps) in made.items():
        seqio.TaskRegistry.add(
            name,
            source=ArraySource(4, make),
            preprocessors=steps,
            output_features=features,
        )
    objectives.mixture("mix_all", [(name, 1.0) for name in made])
    objectives.mixture("mix_two", [("mix_labels", 1.0), ("mix_captions", 1.0)])
    yield
    for name in made:
        seqio.TaskRegistry.remove(name)
    for name in ("mix_all", "mix_two"):
        seqio.MixtureRegistry.remove(name)


def read(mixture, model, lengths, size):
    """One batch and what was lost of it."""
    with batches.train_batches(
        mixture,
        "train",
        feature_lengths=lengths,
        converter_cls=model.FEATURE_CONVERTER_CLS,
        batch_size=size,
        seed=0,
        partitioning=tiny_runs.ONE_DEVICE,
    ) as found:
        batch = {name: np.asarray(array) for name, array in next(found).items()}
        return batch, found.counters.counts()


def test_a_batch_has_every_feature_and_zeros_where_an_objective_is_not():
    batch, counts = read("mix_all", tiny_mixed.model(vocabulary=BYTES), LENGTHS, 16)
    kinds = {}
    for row in range(16):
        written, labelled, paired = (
            bool(np.any(batch[name][row]))
            for name in ("decoder_loss_weights", "label_weights", contrastive.WEIGHTS)
        )
        kinds[written, labelled, paired] = kinds.get((written, labelled, paired), 0) + 1
        number = int(batch["encoder_input_images"][row, 0, 0, 0]) - 1
        tokens = np.array([10 + number, 20 + number, 1, 0, 0, 0])
        prompt = np.array([7, 1, 0, 0, 0, 0])
        for name, expected, has in (
            ("decoder_target_tokens", tokens, written),
            ("encoder_input_tokens", prompt, written),
            (contrastive.TEXTS, tokens, paired),
            ("labels", np.array([number % tiny_classifier.NUM_CLASSES, 0]), labelled),
        ):
            np.testing.assert_array_equal(batch[name][row], expected * has, name)
    # Four of each task; of the labelled ones one has no label, and is counted.
    assert kinds == {
        (True, False, False): 4,
        (False, True, False): 3,
        (False, False, True): 4,
        (True, False, True): 4,
        (False, False, False): 1,
    }
    assert counts["without_labels"] == 1 and counts["truncated_targets"] == 0


def test_texts_are_pairs_of_a_model_that_writes_none():
    model = tiny_mixed.model(
        objectives=("classification", "contrastive"), vocabulary=BYTES
    )
    lengths = {name: n for name, n in LENGTHS.items() if name != "inputs"}
    batch, _ = read("mix_two", model, lengths, 8)
    assert int(np.sum(batch[contrastive.WEIGHTS])) == 4
    assert int(np.sum(batch["label_weights"])) == 3
    assert "decoder_target_tokens" not in batch


def test_each_task_has_its_own_judge():
    model = tiny_mixed.model(vocabulary=BYTES)
    for task, objective, wanted in (
        ("mix_captions", "captioning", {"images", "inputs", "targets"}),
        ("mix_labels", "classification", {"images", "labels"}),
        ("mix_pairs", "contrastive", {"images", "targets"}),
        ("mix_both", "captioning", {"images", "inputs", "targets"}),
    ):
        judge, lengths = objectives.judge(model, task, LENGTHS)
        assert judge is model.part(objective) and set(lengths) == wanted
    plain = model.part("captioning")
    assert objectives.judge(plain, "mix_pairs", LENGTHS) == (plain, LENGTHS)


def test_what_cannot_be_learned_or_mixed_is_refused_by_name():
    two = tiny_mixed.model(objectives=NO_PAIRS, vocabulary=BYTES)
    data = inputs.TrainData("mix_all", "train", LENGTHS, 8)
    message = "'mix_pairs' has none of the objectives of the model, .* captioning, cl"
    with pytest.raises(UserError, match=message):
        data.batches(two, tiny_runs.ONE_DEVICE, seed=0, start_step=0)
    with pytest.raises(UserError, match="objectives are captioning, .*: 'caption'"):
        objectives.marked("caption")
    with pytest.raises(UserError, match="unknown objective 'pairs'"):
        MixedFeatureConverter(objectives=("pairs",))
    other = preprocessors.image_text_features(seqio.ByteVocabulary(extra_ids=3))
    seqio.TaskRegistry.remove("mix_other")
    seqio.TaskRegistry.add(
        "mix_other", source=ArraySource(4, text), output_features=other
    )
    with pytest.raises(UserError, match="'mix_other' has another feature 'inputs'"):
        objectives.mixture("mix_no", [("mix_captions", 1.0), ("mix_other", 1.0)])
    with pytest.raises(UserError, match="must name .*'labels'"):
        MixedFeatureConverter(objectives=NO_PAIRS, num_classes=4).shapes(
            {"images": 16, "inputs": 6, "targets": 6}
        )


NO_PAIRS = ("captioning", "classification")


@pytest.mark.slow
def test_a_run_on_drawn_scenes_is_judged_task_by_task(tmp_path, monkeypatch):
    import tasks.scenes

    sizes = {"train": 12, "validation": 6, "test": 6}
    scenes.write_scenes(tmp_path / "data", sizes=sizes)
    monkeypatch.setenv("VIT22B_DATA_DIR", str(tmp_path / "data"))
    found = seqio.TaskRegistry.get("scenes_labels").get_dataset(
        {"images": 16, "labels": 11}, "test", shuffle=False
    )
    captions = seqio.TaskRegistry.get("scenes_captioning").get_dataset(
        {"images": 16, "inputs": 32, "targets": 99}, "test", shuffle=False
    )
    for one, other in zip(
        found.as_numpy_iterator(), captions.as_numpy_iterator(), strict=True
    ):
        words = set(other["targets_pretokenized"].decode().replace(",", "").split())
        names = {tasks.scenes.CLASSES[number] for number in one["labels"]}
        assert names == words & set(tasks.scenes.CLASSES) and len(names) >= 2

    schedule = optimizers.cosine(3e-3, total_steps=100, warmup_steps=2)
    model = tiny_mixed.model(
        optimizers.adamw(schedule),
        vocabulary=seqio.ByteVocabulary(),
        decode_fn=decoding.greedy,
        num_classes=len(tasks.scenes.CLASSES),
        all_scores=True,
    )
    lengths = {"images": 16, "inputs": 40, "targets": 6, "labels": 11}
    names = ("scenes_captioning", "scenes_labels", "scenes_pairs")
    eval_data = inputs.EvalData(names, "validation", lengths, 8)
    result = tiny_runs.run(
        tmp_path / "run",
        model,
        data=inputs.TrainData("scenes_mixed", "train", lengths, 8),
        eval_data=eval_data,
        total_steps=2,
        scores=training_scores.TrainingScores(
            dataclasses.replace(eval_data, tasks=("scenes_labels",)), 2
        ),
    )
    measured = {n for n in result.metrics if n.startswith("eval/")}
    losses = {n for n in measured if "/loss/" in n}
    assert losses == {
        "eval/scenes_captioning/loss/captioning",
        "eval/scenes_labels/loss/classification",
        "eval/scenes_pairs/loss/contrastive",
    }
    scored = evaluate.evaluate_checkpoint(
        model,
        partitioning=tiny_runs.ONE_DEVICE,
        checkpoint=str(tmp_path / "run"),
        tasks=names,
        split="validation",
        feature_lengths=lengths,
        batch_size=8,
        output_dir=str(tmp_path / "run"),
    )
    own = {"scenes_captioning": "cider_d", "scenes_labels": "mean_average_precision"}
    own["scenes_pairs"] = "image_to_text_recall@1"
    for name, metric in own.items():
        assert np.isfinite(scored[name].metrics[metric])
        assert scored[name].num_scored == 6
    assert scored["scenes_labels"].metrics["accuracy"] == pytest.approx(
        result.metrics["generated/scenes_labels/accuracy"]
    )
    for name, kind in (("scenes_captioning", "token"), ("scenes_labels", "example")):
        objective = {"token": "captioning", "example": "classification"}[kind]
        assert scored[name].metrics[f"{kind}/loss"] == pytest.approx(
            result.metrics[f"eval/{name}/loss/{objective}"], rel=1e-5
        )
