"""What each option of our runtime is under T5X: carried over, T5X's own, or refused.

T5X reads the same recipe, but calls its own functions: what is bound to ours (`train`,
`inputs`, `evaluate`, `infer`, `Partitioning`) would do nothing, without a word.
`t5x_bindings.check` compares what gin has read with the table here. Models, data,
decoding and optimizers are the same objects in both runtimes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

# The jobs of T5X that a gin file of ours is for.
JOBS = ("train", "finetune", "eval", "infer", "precompile", "export")
_TRAINING = ("train", "finetune")
_STEPS = (*_TRAINING, "precompile")
# Modules whose functions and classes are the same objects in both runtimes.
SHARED = (
    "vit22b_transfer.models.",
    "vit22b_transfer.data.augmentation.",
    "vit22b_transfer.data.class_lists.",
    "vit22b_transfer.data.converters.",
    "vit22b_transfer.data.label_converters.",
    "vit22b_transfer.data.served_inputs.",
    "vit22b_transfer.data.t5x_tasks.",
    "vit22b_transfer.data.vocabularies.",
    "vit22b_transfer.inference.answer_lists.",
    "vit22b_transfer.inference.controls.",
    "vit22b_transfer.inference.decoding.",
    "vit22b_transfer.training.optimizers.",
    "vit22b_transfer.t5x_adapter.",
)
# Macros of T5X's own run files that may go unused: their values there, and what to set
# in their place. Of some nothing of ours makes use; the others are unused where the
# parameter that T5X gives them to is set itself.
UNUSED_MACROS: Mapping[str, tuple[Any, str]] = {
    "DROPOUT_RATE": (0.1, "name gin_configs/runs/regularization.gin behind the recipe"),
    "ACTIVATION_DTYPE": ("bfloat16", "set the dtype of the model's own files"),
    "BEAM_SIZE": (1, "name gin_configs/models/beam_search.gin behind the recipe"),
    "EVAL_PERIOD": (1000, "train.eval_period is set itself"),
    "EVAL_STEPS": (20, "train.eval_steps is set itself"),
    "EVALUATOR_NUM_EXAMPLES": (None, "seqio.Evaluator.num_examples is set itself"),
    "JSON_WRITE_N_RESULTS": (None, "seqio.JSONLogger.write_n_results is set itself"),
    "RANDOM_SEED": (None, "train.random_seed is set itself"),
    "SHUFFLE_TRAIN_EXAMPLES": (True, "train/utils.DatasetConfig.shuffle is set itself"),
    "USE_HARDWARE_RNG": (False, "train.use_hardware_rng is set itself"),
}


@dataclasses.dataclass(frozen=True)
class Meaning:
    """What a parameter of ours is under T5X.

    words: how it is carried; what T5X has of its own; or, of what is refused, the way
      out. harmless: values that T5X needs no word of. same_as: places in gin ('%MACRO'
      or 'configurable.parameter') of which one must say the same: else it is refused.
    """

    kind: str
    words: str
    harmless: Sequence[Any] = ()
    same_as: Sequence[str] = ()


def _carried(words: str) -> Meaning:
    return Meaning("carried", words)


def _own(words: str) -> Meaning:
    return Meaning("own", words)


def _refused(words: str, harmless: Sequence[Any] = (), same_as: Sequence[str] = ()):
    return Meaning("refused", words, harmless, same_as)


def _macro(name: str) -> Meaning:
    return _refused(f"T5X is told by the macro {name}: set that", (), (f"%{name}",))


def _made_by(selector: str, instead: str) -> Meaning:
    return _refused(instead, (f"@{selector}()",))


_INPUTS = "vit22b_transfer.training.inputs"
_TRAIN = "vit22b_transfer.training.train"
_RULES = "vit22b_transfer.partitioning.rules.Partitioning"
_T5X_RULES = "t5x.partitioning.standard_logical_axis_rules"
_MODEL = _refused(
    "T5X is told by t5x_adapter.for_t5x.model: bind the same model to that",
    (),
    ("vit22b_transfer.t5x_adapter.for_t5x.model",),
)
_MESH = _made_by(_RULES, "T5X lays arrays out by partitioning.PjitPartitioner")
_NO_CACHE = _refused(
    "T5X reads images, not cached features. Train with `vit22b train`, or leave "
    "gin_configs/runs/cached_features.gin out and name "
    "gin_configs/models/frozen_tower.gin and gin_configs/runs/from_checkpoint.gin, "
    "with INITIAL_CHECKPOINT a checkpoint that holds the tower",
    (None,),
)
_NO_TEACHER_CACHE = _refused(
    "T5X reads images, not the cached logits of a teacher. Train with `vit22b train`, "
    "or run the teacher: name gin_configs/runs/distill.gin in place of "
    "distill_cached.gin",
    (None,),
)
_ONE_SEED = _refused(
    "T5X draws samples from a seed of its own that nothing sets. Use `vit22b eval` or "
    "`vit22b infer` for another",
    (0,),
)
_TRAINED_WEIGHTS = _refused(
    "T5X reads the trained weights. Set it to 'trained' (with gin_configs/runs/ema.gin "
    "--gin.WEIGHTS=\"'trained'\"), or use `vit22b eval` or `vit22b infer`",
    ("trained",),
)
_PREDICTS: dict[str, Meaning] = {
    "model": _MODEL,
    "partitioning": _MESH,
    "checkpoint": _macro("CHECKPOINT"),
    "feature_lengths": _macro("FEATURE_LENGTHS"),
    "batch_size": _macro("BATCH_SIZE"),
    "seed": _ONE_SEED,
    "max_examples": _refused(
        "T5X reads the whole split. Leave gin_configs/runs/try.gin out, or set "
        "max_examples=None",
        (None,),
    ),
    "weights": _TRAINED_WEIGHTS,
    "fixed_rows": _refused(
        "T5X computes whole batches. Leave gin_configs/runs/deterministic.gin out, or "
        "use `vit22b eval` or `vit22b infer`",
        (None,),
    ),
}
_OF_CACHING = _own("it is of `vit22b cache-features` and cached training alone")
_OF_TRAINING = _own("it is of `vit22b train` alone")
_OF_BENCH = _own("it is of `vit22b bench` alone")

# Configurable -> (the jobs that it matters to, what each of its parameters is there).
TABLE: Mapping[str, tuple[Sequence[str], Mapping[str, Meaning]]] = {
    f"{_TRAIN}.fine_tune": (
        _STEPS,
        {
            "model": _MODEL,
            "model_dir": _macro("MODEL_DIR"),
            "data": _made_by(
                f"{_INPUTS}.TrainData", "T5X reads train/utils.DatasetConfig"
            ),
            "total_steps": _macro("TRAIN_STEPS"),
            "partitioning": _MESH,
            "eval_data": _made_by(
                f"{_INPUTS}.EvalData",
                "T5X reads train_eval/utils.DatasetConfig; to evaluate nothing say "
                "--gin.train.train_eval_dataset_cfg=None",
            ),
            "initial": _carried("parameters come from it, by its rules, at step 0"),
            "num_microbatches": _carried("the step is that of our runtime"),
            "periods": _made_by(
                f"{_TRAIN}.Periods",
                "T5X has train.stats_period, train.eval_period and "
                "utils.SaveCheckpointConfig.period",
            ),
            "keep": _refused(
                "T5X keeps all checkpoints unless told how many: set "
                "--gin.utils.SaveCheckpointConfig.keep",
                (),
                ("t5x.utils.SaveCheckpointConfig.keep",),
            ),
            "seed": _refused(
                "T5X takes a random seed unless told one: set --gin.RANDOM_SEED",
                (),
                ("%RANDOM_SEED",),
            ),
            "best": _refused(
                "T5X keeps the best by utils.SaveCheckpointConfig.checkpointer_cls = "
                "@checkpoints.SaveBestCheckpointer. Leave "
                "gin_configs/runs/keep_best.gin out",
                (None,),
            ),
            "instruments": _refused(
                "T5X's step tells nothing of layers. Leave "
                "gin_configs/runs/instruments.gin out",
                (None,),
            ),
            "guard": _refused(
                "every step of T5X counts. Leave gin_configs/runs/spike_guard.gin out",
                (None,),
            ),
            "run_files": _OF_TRAINING,
            "qk_clip": _refused(
                "T5X's step clips no heads. Leave gin_configs/runs/qk_clip.gin out",
                (None,),
            ),
            "scores": _own(
                "T5X generates every train.eval_period steps where "
                "train.infer_eval_dataset_cfg says what, as in t5x_finetune.gin"
            ),
            "allow_changes": _refused(
                "T5X goes on from what is in MODEL_DIR, and compares nothing. Leave it "
                "out",
                ((),),
            ),
        },
    ),
    "vit22b_transfer.checkpoints.best.KeepBest": (
        (),
        dict.fromkeys(("metric", "mode", "keep"), _OF_TRAINING),
    ),
    "vit22b_transfer.evaluation.training_scores.TrainingScores": (
        (),
        dict.fromkeys(("data", "generate_every", "generate_examples"), _OF_TRAINING),
    ),
    "vit22b_transfer.training.instruments.Instruments": ((), {"every": _OF_TRAINING}),
    "vit22b_transfer.training.qk_clip.QKClip": ((), {"threshold": _OF_TRAINING}),
    "vit22b_transfer.training.spike_guard.SpikeGuard": (
        (),
        dict.fromkeys(("deviations", "settle_steps", "max_skips"), _OF_TRAINING),
    ),
    f"{_TRAIN}.InitialCheckpoint": (
        _TRAINING,
        {
            "path": _carried("read by our own code at step 0"),
            "rules": _carried("as in our runtime"),
            "cast": _carried("as in our runtime"),
            "image_size": _carried("as in our runtime"),
        },
    ),
    f"{_TRAIN}.Periods": (
        _TRAINING,
        {
            "log": _own("T5X logs every train.stats_period steps"),
            "evaluate": _own("T5X evaluates every train.eval_period steps"),
            "checkpoint": _own(
                "T5X saves every utils.SaveCheckpointConfig.period steps"
            ),
        },
    ),
    f"{_INPUTS}.TrainData": (
        _STEPS,
        {
            "task": _macro("TRAIN_TASK"),
            "split": _refused(
                "T5X trains on train/utils.DatasetConfig.split: set that",
                (),
                ("train/t5x.utils.DatasetConfig.split",),
            ),
            "feature_lengths": _macro("FEATURE_LENGTHS"),
            "batch_size": _macro("BATCH_SIZE"),
            "cache": _NO_CACHE,
            "teacher_cache": _NO_TEACHER_CACHE,
            "augmentation": _macro("AUGMENTATION"),
        },
    ),
    f"{_INPUTS}.EvalData": (
        _TRAINING,
        {
            "tasks": _macro("EVAL_TASKS"),
            "split": _refused(
                "T5X evaluates on train_eval/utils.DatasetConfig.split: set that",
                (),
                ("train_eval/t5x.utils.DatasetConfig.split",),
            ),
            "max_examples": _own("T5X evaluates train.eval_steps batches of each task"),
            "feature_lengths": _macro("FEATURE_LENGTHS"),
            "batch_size": _macro("BATCH_SIZE"),
            "cache": _NO_CACHE,
            "teacher_cache": _NO_TEACHER_CACHE,
        },
    ),
    "vit22b_transfer.evaluation.evaluate.evaluate_checkpoint": (
        ("eval",),
        _PREDICTS
        | {
            "tasks": _macro("EVAL_TASKS"),
            "split": _macro("EVAL_SPLIT"),
            "output_dir": _macro("MODEL_DIR"),
        },
    ),
    "vit22b_transfer.inference.infer.infer_split": (
        ("infer",),
        _PREDICTS
        | {
            "task": _macro("INFER_TASK"),
            "split": _macro("INFER_SPLIT"),
            "output": _macro("OUTPUT"),
            "recipe": _own("T5X writes no manifest"),
            "shard": _refused("T5X deals out shards by infer.num_shards", (None,)),
        },
    ),
    _RULES: (
        JOBS,
        {
            "data": _refused(
                "T5X's mesh takes all devices. Start it on as many as you want", (-1,)
            ),
            "model": _refused(
                "T5X is told by --gin.partitioning.PjitPartitioner.num_partitions, or "
                "on CPUs by model_parallel_submesh=(1, 2) in its place",
                (1,),
                (
                    "t5x.partitioning.PjitPartitioner.num_partitions",
                    "t5x.partitioning.PjitPartitioner.model_parallel_submesh",
                ),
            ),
            **{
                name: _refused(
                    "T5X is told by --gin.partitioning.standard_logical_axis_rules."
                    f"{name}",
                    (1,),
                    (f"{_T5X_RULES}.{name}",),
                )
                for name in (
                    "activation_partitioning_dims",
                    "parameter_partitioning_dims",
                )
            },
            "ring_projections": _refused(
                "T5X has no such thing; gin_configs/meshes/activations_2d.gin lays "
                "arrays out alike without it",
                (False,),
            ),
        },
    ),
    "vit22b_transfer.data.feature_cache.FeatureCache": (
        (),
        dict.fromkeys(("directory", "tower", "storage"), _OF_CACHING),
    ),
    "vit22b_transfer.data.teacher_cache.TeacherCache": (
        (),
        dict.fromkeys(("directory", "teacher"), _OF_CACHING),
    ),
    "vit22b_transfer.inference.cache_features.cache_features": (
        (),
        dict.fromkeys(
            ("model", "partitioning", "data", "eval_data", "examples_per_shard"),
            _OF_CACHING,
        ),
    ),
    "vit22b_transfer.planning.bench.Vocabulary": ((), {"vocab_size": _OF_BENCH}),
    "vit22b_transfer.planning.bench.measure": (
        (),
        dict.fromkeys(
            (
                "model",
                "partitioning",
                "batch_size",
                "input_length",
                "target_length",
                "rounds",
                "json_file",
            ),
            _OF_BENCH,
        ),
    ),
}

# (job, configurable, parameter) -> what it is in that job alone.
IN_ONE_JOB: Mapping[tuple[str, str, str], Meaning] = {
    **{
        ("precompile", f"{_TRAIN}.fine_tune", name): _carried("no step depends on it")
        for name in (
            *("eval_data", "total_steps", "initial", "periods", "keep", "seed"),
            *("best", "scores", "allow_changes"),
        )
    },
    ("finetune", f"{_TRAIN}.fine_tune", "initial"): _carried(
        "T5X restores the same checkpoint; an error before step 0 if it is another, or "
        "taken by rules"
    ),
    ("precompile", f"{_TRAIN}.fine_tune", "num_microbatches"): _refused(
        "T5X compiles its own step on a whole batch. Leave it out", (1,)
    ),
    **{
        ("precompile", f"vit22b_transfer.models.{model}", "int8_tower"): _refused(
            "T5X compiles its own step, which differentiates int8 kernels as well. "
            "Leave gin_configs/models/int8_tower.gin out, or train with t5x_train.gin, "
            "whose step does not",
            (False,),
        )
        for model in ("multimodal.ImageTextModel", "classifier.ClassificationModel")
    },
    **{
        (job, "vit22b_transfer.models.mixed.MixedModel", part): _refused(
            "T5X asks one model for all predictions, where each task has its own part. "
            "Use `vit22b`; a model of one objective takes up the checkpoint, and T5X "
            "trains that",
            (None,),
        )
        for job in JOBS
        for part in ("captioning", "classification", "contrastive")
    },
}


def meaning(job: str, selector: str, parameter: str) -> Meaning | None:
    """What a bound parameter is in a job of T5X; None: it needs no word.

    A parameter of ours that the table lacks is refused.
    """
    if (job, selector, parameter) in IN_ONE_JOB:
        return IN_ONE_JOB[job, selector, parameter]
    if not selector.startswith("vit22b_transfer.") or selector.startswith(SHARED):
        return None
    jobs, parameters = TABLE.get(selector, (JOBS, {}))
    if job not in jobs:
        return None
    return parameters.get(parameter, _refused("T5X does not use it. Leave it out"))
