"""Gin files behind a recipe: in any order, and each does what its header says."""

import dataclasses
import functools
import itertools
import re

import gin
import jax
import jax.numpy as jnp
import pytest
from flax.traverse_util import flatten_dict
from gin_files import BEHIND, CONFIGS, ROOT, files, model_files, read_recipe

from vit22b_transfer import UserError
from vit22b_transfer.data.augmentation import Augmentation
from vit22b_transfer.models import contrastive, freezing, multimodal, preparation
from vit22b_transfer.planning import jobs
from vit22b_transfer.recipes import loading
from vit22b_transfer.recipes.reader import Reader, Recipe
from vit22b_transfer.training import optimizers, train


@pytest.fixture(autouse=True)
def no_gin_left_over():
    yield
    gin.clear_config()


RECIPE = CONFIGS / "recipes/scenes_caption_vqa.gin"


def names_in(path):
    """What a file and its includes set."""
    recipe = Recipe((), ())
    Reader(recipe, [str(ROOT)], ()).read(path.relative_to(ROOT).as_posix(), "tested")
    return recipe.statements().keys()


def said_by(recipe):
    return {key: value for key, (_, value, _) in recipe.statements().items()}


# In each list, files of different sets contradict each other.
ALTERNATIVES = [
    [{"vit", "vit_scanned"}, {"vit_classic", "paligemma"}, {"vit_mini"}, {"no_tower"}],
    [{"t5", "t5_scanned"}, {"t5_tiny"}],
    [{"gemma", "paligemma"}, {"gemma_tiny"}],
    [{"image_text"}, {"prefix_lm", "paligemma"}],
    [{"text_tower"}, {"text_tower_t5"}],
    [
        {"answer_list"},
        {"beam_search"},
        {"sample"},
        {"image_text", "prefix_lm", "paligemma"},
    ],
    [{path.stem} for path in files("meshes")],
    [{"optimizer_adafactor"}, {"optimizer_sgd"}, {"optimizer_vit22b"}],
    [{"schedule_constant"}, {"schedule_rsqrt", "schedule_vit22b"}],
    [{"classifier"}, {"contrastive"}, {"mixed"}],
    # What a training starts from.
    [
        {"distill", "distill_tokens", "distill_tokens_cosine"},
        {"from_checkpoint", "from_other_size"},
    ],
    [{"distill_tokens"}, {"distill_tokens_cosine"}],
    [{"distill", "distill_tokens", "distill_tokens_cosine"}, {"distill_cached"}],
    [{"try"}, {"schedule_vit22b"}],  # both say how long the warmup is
]


def contradict(*names):
    return any(
        len([some for some in sets if some & set(names)]) > 1
        and all(any(name in some for some in sets) for name in names)
        for sets in ALTERNATIVES
    )


def outcome(*paths):
    """What a recipe with these files behind it says, or the words of the refusal."""
    try:
        return said_by(read_recipe(RECIPE, behind=paths))
    except UserError as error:
        return sorted(word.strip(".,") for word in str(error).split())


@pytest.mark.slow
def test_two_files_behind_a_recipe_say_the_same_in_either_order_or_are_refused():
    wrong, names = [], {path: names_in(path) for path in BEHIND}
    for one, other in itertools.combinations(BEHIND, 2):
        if not names[one] & names[other]:  # the order of these decides nothing
            if contradict(one.stem, other.stem):
                wrong.append((one.stem, other.stem))
            continue
        first, second = outcome(one, other), outcome(other, one)
        refused = isinstance(first, list)
        if first != second or refused != contradict(one.stem, other.stem):
            wrong.append((one.stem, other.stem, refused))
        if refused and not {"behind", "order:"} <= set(first):
            wrong.append((one.stem, other.stem, first))
    assert not wrong


def test_the_refusal_names_both_places_and_what_to_do():
    paths = model_files("beam_search", "sample")
    with pytest.raises(UserError) as error:
        read_recipe(RECIPE, behind=paths)
    said = str(error.value)
    for expected in (
        "gin_configs/models/beam_search.gin:6 sets multimodal.ImageTextModel.decode_fn",
        "gin_configs/models/sample.gin:8 sets it to @decoding.sample",
        "name one of the two, or set it with --gin.multimodal.ImageTextModel.decode_fn",
    ):
        assert expected in said
    names = [file.relative_to(ROOT).as_posix() for file in (RECIPE, *paths)]
    decided = ["MODEL_DIR='/x'", "ImageTextModel.decode_fn=@decoding.sample"]
    assert loading.read(names, decided, [str(ROOT)])


def test_a_file_behind_a_recipe_takes_the_place_of_what_the_recipe_says():
    for name, parameter, expected in (
        ("sample", "decode_fn", "@decoding.sample"),
        ("prefix_lm", "module", "@prefix_lm.PrefixLMModule()"),
    ):
        recipe = read_recipe(RECIPE, behind=model_files(name))
        lines = "\n".join(loading.show(recipe))
        assert f"multimodal.ImageTextModel.{parameter} = {expected}" in lines


def test_jpegs_at_a_scale_are_what_every_tower_asks_for():
    for tower in ("vit", "vit_classic", "vit_mini", "paligemma"):
        behind = [*model_files(tower), CONFIGS / "runs/scaled_jpegs.gin"]
        read = read_recipe(RECIPE, "IMAGE_SIZE=(224, 224)", behind=behind)
        model = loading.arguments(read, train.fine_tune, [str(ROOT)])["model"]
        assert preparation.of_model(model) == preparation.Preparation(jpegs="scaled")


TOWER_KERNEL = "encoder/tower/layers.*(attention|mlp)/.*/kernel$"
# Names of the files that decide what is trained -> what their headers promise.
FREEZING = {
    "models/frozen_tower": lambda p: not any("/tower/" in x for x in p.trained),
    "models/int8_tower": lambda p: (
        {d for x, d in p.params.items() if re.search(TOWER_KERNEL, x)} <= {"int8"}
        and not any("/tower/" in x and "/lora_" not in x for x in p.trained)
    ),
    "models/lora": lambda p: all("/lora_" in x for x in p.trained),
    "models/no_tower": lambda p: not any("/tower/" in x for x in p.params),
    "runs/cached_features": lambda p: not any("/tower/" in x for x in p.params),
}
# A blind model has nothing to store or to cache; a tower that moves is not cached.
IMPOSSIBLE = {
    ("models/int8_tower", "models/no_tower"): "the model has no tower",
    ("models/no_tower", "runs/cached_features"): "needs a model with a tower",
    ("models/lora", "runs/cached_features"): "Freeze the tower",
}


SMALL = (
    "T5Config.num_encoder_layers=1",
    "T5Config.num_decoder_layers=1",
    "ViTConfig.depth=1",
)


@dataclasses.dataclass
class Parts:
    params: dict[str, str]
    trained: set[str]


@functools.cache
def parts_of(*names, recipe=RECIPE, small=SMALL):
    """Path and dtype of the parameters of a training, and the paths of the trained."""
    paths = [CONFIGS / f"{name}.gin" for name in names]
    read = read_recipe(recipe, *small, behind=paths)
    # What says the same, as another order of the files should, is traced once.
    said = frozenset((key, repr(value)) for key, value in said_by(read).items())
    if said not in TRACED:
        TRACED[said] = traced_parts(read)
    return TRACED[said]


TRACED = {}


def traced_parts(read):
    arguments = loading.arguments(read, train.fine_tune, [str(ROOT)])
    job = jobs.Job.from_arguments(arguments)
    params = job.variables()["params"]
    optimizers.freeze(job.model.optimizer_def, params, job.model.frozen)
    trained, _ = freezing.split_frozen(params, job.model.frozen)
    flat = flatten_dict(params, sep="/")
    return Parts(
        {path: str(leaf.dtype) for path, leaf in flat.items()},
        set(flatten_dict(trained, sep="/")),
    )


@pytest.mark.slow
def test_all_that_freezes_keeps_its_promise_beside_the_others():
    """In either order, as both say the same."""
    for name, kept in FREEZING.items():
        parts = parts_of(name)
        assert parts.trained and kept(parts), name
    for names in itertools.combinations(FREEZING, 2):
        if message := IMPOSSIBLE.get(names):
            for order in (names, names[::-1]):
                with pytest.raises(UserError, match=message):
                    parts_of(*order)
            continue
        parts = parts_of(*names)
        assert parts == parts_of(*names[::-1]), names
        assert parts.trained and all(FREEZING[name](parts) for name in names), names


def test_updates_beside_a_frozen_tower_are_those_of_the_text_model():
    everywhere = parts_of("models/lora").trained
    text = {path for path in everywhere if "/tower/" not in path}
    assert text < everywhere
    for names in itertools.permutations(["models/lora", "models/frozen_tower"]):
        parts = parts_of(*names)
        assert parts.trained == text
        assert not any("/tower/" in path and "/lora_" in path for path in parts.params)
    three = ["models/lora", "models/frozen_tower", "runs/cached_features"]
    for names in itertools.permutations(three):
        assert parts_of(*names).trained == text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vqav2", "scenes_blind"])
def test_a_recipe_that_freezes_composes_with_what_comes_behind(name):
    recipe = CONFIGS / f"recipes/{name}.gin"
    small = SMALL
    if name == "vqav2":
        small = ("t5_config.scan_layers=True", "vit22b_config.scan_layers=True")
    for behind in ("models/lora", "models/no_tower", "models/frozen_tower"):
        parts = parts_of(behind, recipe=recipe, small=small)
        assert parts.trained
        assert not any("/tower/" in path for path in parts.trained)
        assert all("/lora_" in x for x in parts.trained) == (behind == "models/lora")


def model_behind(name, recipe=RECIPE):
    read = read_recipe(recipe, behind=[CONFIGS / f"{name}.gin"])
    return loading.install(read, multimodal.ImageTextModel, [str(ROOT)])()


@pytest.mark.parametrize(
    "behind, overrides, expected",
    [
        ((), (), None),
        (("runs/augment",), (), Augmentation(crop_area=(0.05, 1.0), flip=True)),
        (
            ("runs/augment",),
            ("CROP_AREA=(0.5, 1.0)", "FLIP=False"),
            Augmentation(crop_area=(0.5, 1.0)),
        ),
    ],
)
def test_random_crops_and_flips_are_of_training_and_off_by_default(
    behind, overrides, expected
):
    paths = [CONFIGS / f"{name}.gin" for name in behind]
    read = read_recipe(RECIPE, *overrides, behind=paths)
    made = loading.arguments(read, train.fine_tune, [str(ROOT)])
    assert made["data"].augmentation == expected
    assert "augmentation" not in vars(made["eval_data"])


@pytest.mark.parametrize(
    "area, message",
    [
        ("'wide'", r"crop_area .*augment.gin:15.*must be tuple.*got 'wide'"),
        ("(0.5, 0.2)", "least, most"),
    ],
)
def test_a_crop_that_cannot_be_is_refused_before_any_work(area, message):
    behind = [CONFIGS / "runs/augment.gin"]
    with pytest.raises(UserError, match=message):
        read = read_recipe(RECIPE, f"CROP_AREA={area}", behind=behind)
        loading.arguments(read, train.fine_tune, [str(ROOT)])


def test_sampling_arrives():
    decode = model_behind("models/sample").decode_fn
    fed = jnp.zeros((2, 1, 60)).at[:, :, 7].set(5.0)

    def decoded(**options):
        return decode(
            lambda beams: (),
            lambda tokens, cache, index, ancestry: (fed, cache),
            batch_size=2,
            max_decode_length=3,
            eos_id=1,
            rng=jax.random.key(0),
            **options,
        )

    settings = ("temperature", 0.7), ("top_k", 50), ("top_p", 0.9)
    settings += (("keys", "of examples"),)
    assert decoded().settings == (("method", "sample"), *settings)


def test_the_length_of_texts_arrives():
    assert model_behind("models/decode_length").max_decode_length == 5


@pytest.mark.parametrize("name", ["scenes_caption_vqa", "scenes_paligemma", "vqav2"])
def test_regularization_arrives_in_every_text_model(name):
    recipe = CONFIGS / f"recipes/{name}.gin"
    model = model_behind("runs/regularization", recipe)
    assert model.module.text.dropout_rate == 0.1
    assert (model.label_smoothing, model.z_loss) == (0.1, 1e-4)


def rate_of(optimizer, step):
    return float(optimizer.learning_rate(jnp.int32(step)))


def test_optimizers_and_schedules_arrive_and_go_together():
    peak, warmup, total = 8e-4, 100, 750
    rates = {
        "runs/schedule_rsqrt": peak / (1 + 600 / 10_000) ** 0.5,
        "runs/schedule_constant": peak,
    }
    adamw = model_behind("runs/from_checkpoint").optimizer_def
    assert rate_of(adamw, 700) < 0.02 * peak  # the cosine's
    params = {"kernel": jnp.zeros((64, 64))}
    for name, expected in rates.items():
        for optimizer in (None, "runs/optimizer_sgd", "runs/optimizer_adafactor"):
            both = [f"{n}.gin" for n in (name, optimizer) if n]
            for paths in itertools.permutations([CONFIGS / path for path in both]):
                recipe = read_recipe(RECIPE, behind=paths)
                root = multimodal.ImageTextModel
                made = loading.install(recipe, root, [str(ROOT)])().optimizer_def
                assert rate_of(made, warmup / 2) == pytest.approx(peak / 2)
                assert rate_of(made, 700) == pytest.approx(expected)
                assert rate_of(made, 725) == pytest.approx(expected / 2, rel=2e-3)
                assert rate_of(made, total) == 0.0
                state = jax.eval_shape(made.init, params)
                size = sum(leaf.size for leaf in jax.tree.leaves(state))
                moments = {None: 2, "runs/optimizer_sgd": 1}.get(optimizer, 1.03)
                assert size / 64**2 == pytest.approx(moments, abs=0.02)


@pytest.mark.parametrize(
    "recipe, behind, words",
    [
        ("my_pairs", "beam_search", "decode_fn, but .* this run is ContrastiveModel"),
        ("lit", "lora", "lora, but .* this run is ContrastiveModel"),
        ("vqav2", "contrastive_softmax", "loss, but .* this run is ImageTextModel"),
    ],
)
def test_a_file_of_another_model_is_refused_behind_a_recipe(recipe, behind, words):
    path = CONFIGS / f"recipes/{recipe}.gin"
    read = read_recipe(path, behind=model_files(behind))
    with pytest.raises(UserError, match=words):
        loading.install(read, train.fine_tune, [str(ROOT)])


def test_what_changes_a_model_of_pairs_arrives():
    path = CONFIGS / "recipes/my_pairs.gin"
    for behind, expected in (
        ((), ("sigmoid", -10.0, ())),
        (("contrastive_softmax",), ("softmax", None, ())),
        (("frozen_tower",), ("sigmoid", -10.0, ("encoder/tower/.*",))),
    ):
        read = read_recipe(path, behind=model_files(*behind))
        model = loading.install(read, contrastive.ContrastiveModel, [str(ROOT)])()
        assert (model.loss, model.module.first_bias, model.frozen) == expected
    read = read_recipe(path, "T5='small'", behind=model_files("text_tower_t5"))
    model = loading.install(read, contrastive.ContrastiveModel, [str(ROOT)])()
    assert model.module.text.t5.width == 512
