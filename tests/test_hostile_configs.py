"""No text of a source, nor its name, becomes a statement of `model.gin`."""

import ast
import gc
import re

import gemma_peers
import pytest
from hostile_files import PROCESSOR, places, replaced
from tiny_models import tower_config
from torch_peers import import_peer

from vit22b_transfer import UserError
from vit22b_transfer.weights import gin_files, sources
from vit22b_transfer.weights.families.table import FAMILIES
from vit22b_transfer.weights.mapping import Model

transformers = import_peer("transformers")

HOSTILE = [
    "28\nINJECTED = 1\n#",
    "28\rINJECTED = 1",
    "x\u2028INJECTED = 1",
    "@os.system('touch INJECTED')",
    "%INJECTED",
    "1\x0cINJECTED = 1",
]
VISION = dict(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=16,
    patch_size=8,
)


@pytest.fixture(autouse=True)
def no_garbage_is_collected():
    """Python 3.11's `ast` counts its depth in one place for all of an interpreter: a
    finalizer that parses in the middle of another parse is a SystemError there."""
    gc.disable()
    yield
    gc.enable()


def siglip():
    config = transformers.SiglipVisionConfig(**VISION)
    return transformers.SiglipVisionModel(config)


def clip():
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION))


def dinov2():
    return transformers.Dinov2Model(transformers.Dinov2Config(**VISION))


def t5():
    config = transformers.T5Config(
        vocab_size=64,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return transformers.T5ForConditionalGeneration(config)


def paligemma():
    return gemma_peers.paligemma_model("Gemma2", vocab_size=320, num_hidden_layers=1)


def assert_only_literals(text):
    """Each line of a gin file of ours is a comment, an import, or binds a literal."""
    known = r"(TOWER|IMAGE_SIZE|VOCAB_SIZE|INITIAL_CHECKPOINT|[a-z_0-9]+(\.\w+)*)"
    for line in text.split("\n"):
        assert not set(line) & set("\r\f\v\x85\u2028\u2029\0")
        if not line or line.startswith(("#", "from vit22b_transfer.", "from __gin__")):
            continue
        if line == "include 'gin_configs/runs/from_checkpoint.gin'":
            continue
        if re.fullmatch(r"\w+\.\w+:", line):
            continue
        name, _, value = line.strip().partition(" = ")
        assert re.fullmatch(known, name), line
        if not re.fullmatch(r"@\w+\.\w+\(\)|%(IMAGE_SIZE|VOCAB_SIZE)", value):
            ast.literal_eval(value)


def written(family, model, origin="source"):
    return gin_files.gin_text([(family, model)], [origin], [], "/out/x", (), {})


@pytest.mark.slow
@pytest.mark.parametrize("make", [siglip, clip, dinov2, t5, paligemma])
def test_what_a_configuration_says_is_a_literal_or_refused(make, tmp_path):
    make().save_pretrained(tmp_path)
    source = sources.open_source(str(tmp_path), FAMILIES)
    config = {**source.config, "preprocessor": PROCESSOR}
    family, count, refused = source.family, 0, 0
    assert_only_literals(written(family, family.read(config, source.tensors)))
    for path in filter(None, places(config)):
        for text in HOSTILE:
            count += 1
            changed = replaced(config, path, text)
            try:
                model = family.read(changed, source.tensors)
            except UserError:
                refused += 1  # nothing is written
                continue
            try:
                assert_only_literals(written(family, model))
            except UserError:
                refused += 1
    assert count > 100 and 0 < refused <= count


@pytest.mark.parametrize("text", HOSTILE[:3])
def test_a_name_of_a_folder_stays_in_its_comment_or_is_refused(text):
    model = Model((), tower_config())
    with pytest.raises(UserError, match="control character"):
        written(FAMILIES[0], model, origin=text)
    assert_only_literals(written(FAMILIES[0], model, origin="a # b = 1"))


@pytest.mark.parametrize(
    "changes",
    [{"width": "32"}, {"depth": 2.0}, {"pixel_mean": "half"}, {"pooling": "@map"}],
)
def test_a_value_of_another_type_is_refused(changes):
    tower = tower_config()
    for name, value in changes.items():
        object.__setattr__(tower, name, value)
    with pytest.raises(UserError, match="the source says"):
        written(FAMILIES[0], Model((), tower))


def test_numbers_of_a_prompts_frame_are_numbers():
    model = Model(())
    bindings = {"prefix_lm.PrefixLMModule.bos_id": "@f()"}
    object.__setattr__(model, "bindings", bindings)
    with pytest.raises(UserError, match="bos_id"):
        written(FAMILIES[0], model)
