"""Whole SigLIP, SigLIP 2 and CLIP, imported: Hugging Face's logits, and bytes back.

Each case is a tiny model of the family's own class with random weights, saved in its
real format. Images are given to both as the same pixels, texts as the same tokens.
"""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import seqio
import tiny_models
from big_vision_peers import big_vision_blocks, flax_part, siglip_as_npz
from flax.traverse_util import unflatten_dict
from tiny_models import assert_within, images, jit
from torch_peers import drawn, import_peer, torch, without_gradients

from vit22b_transfer import UserError
from vit22b_transfer.models import contrastive
from vit22b_transfer.recipes import loading
from vit22b_transfer.weights import convert, export, sources
from vit22b_transfer.weights.families.table import FAMILIES
from vit22b_transfer.weights.files import tensor_files

transformers = import_peer("transformers")

VOCAB, LENGTH = 96, 7
SIZES = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
)
TEXT = SIZES | dict(
    vocab_size=VOCAB, max_position_embeddings=LENGTH, num_hidden_layers=1
)
VISION = SIZES | dict(patch_size=8, image_size=16)
LENGTHS = (2, 3, LENGTH)


def whole(name, text=(), vision=(), **fields):
    """A randomised model of that class, of both towers."""
    config = getattr(transformers, f"{name}Config")(
        text_config=TEXT | dict(text), vision_config=VISION | dict(vision), **fields
    )
    model = drawn(getattr(transformers, f"{name}Model")(config))
    with torch.no_grad():
        model.logit_scale.fill_(2.3)
    return model


def siglip(**text):
    return whole("Siglip", text=text)


CLIP_TEXT = dict(hidden_size=24, eos_token_id=VOCAB - 1, bos_token_id=VOCAB - 2)
CASES = {
    "SigLIP": ("hf-siglip-pairs", siglip),
    "SigLIP 2": ("hf-siglip2-naflex-pairs", lambda: _naflex()),
    "CLIP": ("hf-clip-pairs", lambda: whole("CLIP", CLIP_TEXT, projection_dim=16)),
    # As OpenAI's files are published: the end of texts is said to be token 2.
    "published CLIP": (
        "hf-clip-pairs",
        lambda: whole(
            "CLIP",
            CLIP_TEXT | dict(eos_token_id=2, bos_token_id=0, hidden_act="gelu"),
            projection_dim=16,
        ),
    ),
}


def _naflex():
    vision = {name: value for name, value in VISION.items() if name != "image_size"}
    config = transformers.Siglip2Config(
        text_config=TEXT | dict(pad_token_id=0),
        vision_config=vision | dict(num_patches=4),
    )
    model = drawn(transformers.Siglip2Model(config))
    with torch.no_grad():
        model.logit_scale.fill_(2.3)
    return model


def built(folder, out, family):
    """(module, parameters) of an import."""
    convert.import_weights([str(folder)], str(out), FAMILIES, family_names=[family])
    model = sources.open_source(str(folder), FAMILIES, family).model
    fields = {
        name.removeprefix("contrastive.ContrastiveModule."): value
        for name, value in model.bindings.items()
        if "ContrastiveModule" in name
    }
    module = contrastive.ContrastiveModule(model.tower, model.text, **fields)
    tensors = tensor_files.open_tensors(str(out / "checkpoint_0"))
    params = {
        tuple(name.removeprefix("target/").split("/")): jnp.asarray(tensor.read())
        for name, tensor in tensors.items()
        if name.startswith("target/")
    }
    return module, unflatten_dict(params)


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    family, make = CASES[request.param]
    model, folder = make(), tmp_path_factory.mktemp("source")
    model.save_pretrained(folder)
    out = tmp_path_factory.mktemp("imported")
    return request.param, family, model, folder, out, *built(folder, out, family)


def texts(text):
    """(tokens as tasks make them, as the tokenizer of the family does)."""
    rng, ours, theirs = np.random.default_rng(0), [], []
    start = [] if text.start_id is None else [text.start_id]
    for length in LENGTHS:
        length = min(length, LENGTH - len(start))
        tokens = [*rng.integers(2, VOCAB - 2, length - 1).tolist(), text.end_id]
        ours.append(tokens + [0] * (LENGTH - len(start) - length))
        padding = LENGTH - len(start) - length
        theirs.append(start + tokens + [text.pad_id] * padding)
    return np.array(ours, np.int32), torch.tensor(theirs)


def pixels_of(model, tower):
    """The arguments that show the reference the pixels that ours gets."""
    mean, deviation = np.float32(tower.pixel_mean), np.float32(tower.pixel_std)
    x = (images(2, 16, 16, 3) / np.float32(255) - mean) / deviation
    x = torch.tensor(x).permute(0, 3, 1, 2)
    if type(model).__name__ != "Siglip2Model":
        return dict(pixel_values=x)
    patches = x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1)
    return dict(
        pixel_values=patches.reshape(2, 4, -1),
        pixel_attention_mask=torch.ones(2, 4, dtype=torch.int64),
        spatial_shapes=torch.tensor([[2, 2]] * 2),
    )


@pytest.mark.slow
@without_gradients
def test_an_imported_model_gives_hugging_faces_logits_per_image(case):
    name, _, model, _, _, module, params = case
    ours, theirs = texts(module.text)
    expected = model(input_ids=theirs, **pixels_of(model, module.tower))
    found = jit(lambda p, x, t: module.apply({"params": p}, x, t))(
        params, images(2, 16, 16, 3), ours
    )
    image, text, scale, bias = map(np.asarray, found)
    assert_within(1e-5, image, expected.image_embeds, f"{name} images")
    assert_within(1e-5, text, expected.text_embeds, f"{name} texts")
    logits = image @ text.T * scale + bias
    assert np.ptp(logits) > 0.1
    assert_within(1e-4, logits, expected.logits_per_image, f"{name} logits")


@pytest.mark.slow
def test_a_whole_model_is_exported_to_the_same_bytes_and_loads(case, tmp_path):
    _, family, model, folder, out, *_ = case
    checkpoint, to = str(out / "checkpoint_0"), tmp_path / "out"
    export.export_weights(checkpoint, str(to), FAMILIES, family=family)
    before, after = (
        safetensors.numpy.load_file(x / "model.safetensors") for x in (folder, to)
    )
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.tobytes() == after[name].tobytes(), name
        assert value.shape == after[name].shape, name
    _, info = type(model).from_pretrained(to, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys"))


def test_the_gin_file_of_a_whole_model_builds_the_module_that_was_verified(
    case, tmp_path
):
    _, _, _, _, out, module, _ = case
    recipe = tmp_path / "recipe.gin"
    recipe.write_text(
        "from __gin__ import dynamic_registration\n"
        "from vit22b_transfer.models import contrastive\n"
        "contrastive.ContrastiveModule.tower = %TOWER\n"
        f"include '{out}/model.gin'\n"
    )
    read = loading.read([str(recipe)], [], [""])
    found = loading.install(read, contrastive.ContrastiveModule, [""])()
    assert (found.tower, found.text) == (module.tower, module.text)
    assert found.image_projection == module.image_projection
    assert found.first_bias == module.first_bias


def test_clips_tokens_are_refused_where_texts_are_read(case):
    name, _, _, _, _, module, _ = case
    if "CLIP" not in name:
        contrastive.ContrastiveModel(module, tiny_models.Vocabulary())
        return
    module = module.clone(text=dataclasses.replace(module.text, vocab_size=320))
    with pytest.raises(UserError, match=r"CLIP's tokens \(vocab.json, merges.txt\)"):
        contrastive.ContrastiveModel(module, seqio.ByteVocabulary(), loss="softmax")


def as_npz(model, *, bias=True):
    """A SigLIP as big_vision's npz of both towers."""
    text = model.text_model
    tensors = {f"img/{n}": x for n, x in siglip_as_npz(model.vision_model).items()}
    for name, value in (
        big_vision_blocks(text.encoder.layers)
        | flax_part("Transformer/encoder_norm", text.final_layer_norm)
    ).items():
        tensors[name.replace("Transformer", "txt/Encoder_0")] = value
    tables = text.embeddings
    tensors |= flax_part("txt/head", text.head)
    tensors |= {
        "txt/Embed_0/embedding": tables.token_embedding.weight.detach().numpy(),
        "txt/pos_embedding": tables.position_embedding.weight.detach().numpy()[None],
        "t": model.logit_scale.detach().numpy(),
    }
    tensors |= {"b": model.logit_bias.detach().numpy()} if bias else {}
    return {f"params/{name}": np.ascontiguousarray(x) for name, x in tensors.items()}


@pytest.mark.slow
@pytest.mark.parametrize("bias", [True, False], ids=["sigmoid", "softmax"])
@without_gradients
def test_big_visions_npz_gives_the_same_logits_and_bytes(tmp_path, bias):
    model = siglip()
    if not bias:
        model.logit_bias.fill_(0.0)
    tensors = as_npz(model, bias=bias)
    path, out = tmp_path / "both.npz", tmp_path / "imported"
    np.savez(path, **tensors)
    names = ["big_vision-pairs", "big_vision-pairs-softmax"]
    family, other = names if bias else names[::-1]
    with pytest.raises(UserError, match=f"--family {family}"):
        convert.import_weights([str(path)], str(out), FAMILIES, family_names=[other])
    module, params = built(path, out, family)
    ours, theirs = texts(module.text)
    expected = model(input_ids=theirs, **pixels_of(model, module.tower))
    image, text, scale, offset = jit(lambda p, x, t: module.apply({"params": p}, x, t))(
        params, images(2, 16, 16, 3), ours
    )
    found = np.asarray(image) @ np.asarray(text).T * float(scale) + float(offset)
    assert_within(1e-4, found, expected.logits_per_image, f"{family} logits")
    checkpoint, to = str(out / "checkpoint_0"), tmp_path / "out"
    export.export_weights(checkpoint, str(to), FAMILIES, family=family)
    with np.load(to / f"{family}.npz") as after:
        assert set(after.files) == set(tensors)
        for name, value in tensors.items():
            assert after[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.pop("text_config"), "lacks text_config"),
        (
            lambda c: c["vision_config"].update(vision_use_head=False),
            "vision_use_head = false",
        ),
        (
            lambda c: c["text_config"].update(use_causal_mask=True),
            "use_causal_mask = True, a field that is not known",
        ),
        (
            lambda c: c["text_config"].update(max_position_embeddings=9),
            r"shape \(7, 32\), expected \(9, 32\)",
        ),
    ],
)
def test_a_config_that_says_something_else_is_one_clear_error(
    change, message, tmp_path
):
    siglip().save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        convert.import_weights(
            [str(tmp_path / "source")],
            str(tmp_path / "out"),
            FAMILIES,
            family_names=["hf-siglip-pairs"],
        )
