"""T5 checkpoints of T5X, both formats: imported, compared with T5X's network."""

import jax
import jax.numpy as jnp
import legacy_files
import numpy as np
import pytest
from flax import traverse_util
from tiny_models import Vocabulary, assert_within, jit, model_params, text_config

from vit22b_transfer import cli
from vit22b_transfer.checkpoints import writing
from vit22b_transfer.models import encoder_decoder, multimodal
from vit22b_transfer.weights.families import t5x
from vit22b_transfer.weights.files import tensor_files

CONFIGS = {
    "t5x-t5": text_config(num_encoder_layers=2, num_decoder_layers=3),
    "t5x-ul2": text_config(num_encoder_layers=2, activation="silu"),
    "tied": text_config(activation="relu", gated_mlp=False, tied_logits=True),
}


def flat_target(config):
    """Drawn parameters by T5X's names, and ours."""
    module = encoder_decoder.ImageTextModule(None, config)
    params = model_params(multimodal_model(module))
    ours = traverse_util.flatten_dict(params, sep="/")
    theirs = {name.replace("encoder/text/", "encoder/"): x for name, x in ours.items()}
    return theirs, ours


def multimodal_model(module):
    return multimodal.ImageTextModel(module, Vocabulary(), Vocabulary())


def write_orbax(folder, theirs):
    tree = {"target": traverse_util.unflatten_dict(theirs, sep="/")}
    tree["state"] = {"step": jnp.int32(5)}
    writer = writing.CheckpointWriter(str(folder))
    writer.save(5, tree, {})
    writer.close()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, write",
    [
        ("t5x-t5", write_orbax),
        ("t5x-ul2", legacy_files.write),
        ("tied", write_orbax),
    ],
)
def test_both_formats_are_imported_with_all_bytes(name, write, tmp_path, capsys):
    theirs, ours = flat_target(CONFIGS[name])
    (tmp_path / "t5x").mkdir()
    source, out = str(write(tmp_path / "t5x", theirs)), str(tmp_path / "out")
    family = "t5x-t5" if name == "tied" else name
    assert cli.main(["import", source, "--out", out]) == 1
    assert "t5x-t5, t5x-ul2; say which with --family" in capsys.readouterr().err
    assert cli.main(["import", source, "--out", out, "--family", family]) == 0
    assert f"taken to be {CONFIGS[name].activation}" in capsys.readouterr().out
    found = tensor_files.open_tensors(out)
    assert found.keys() == {f"target/{name}" for name in ours} | {"state/step"}
    for key, value in ours.items():
        assert found[f"target/{key}"].read().tobytes() == np.asarray(value).tobytes()
    said = (tmp_path / "out" / "model.gin").read_text()
    config = CONFIGS[name]
    assert f"num_decoder_layers = {config.num_decoder_layers}\n" in said
    assert f"tied_logits = {config.tied_logits}\n" in said
    assert f"activation = {config.activation!r}\n" in said
    assert cli.main(["inspect", source, out]) == 0
    assert "equal: " in capsys.readouterr().out
    arguments = ["export", out, "--format", family, "--out", str(tmp_path / "no")]
    assert cli.main(arguments) == 1
    assert "T5X restores our checkpoints" in capsys.readouterr().err


@pytest.mark.parametrize("name", CONFIGS)
def test_t5xs_own_network_gives_the_same_logits(name):
    reason = "T5X is not importable: pip install --no-deps -r requirements-t5x.txt"
    network = pytest.importorskip("t5x.examples.t5.network", reason=reason)
    config = CONFIGS[name]
    theirs, ours = flat_target(config)
    activation = (config.activation,) + (("linear",) if config.gated_mlp else ())
    transformer = network.Transformer(
        network.T5Config(
            vocab_size=config.vocab_size,
            emb_dim=config.width,
            num_heads=config.num_heads,
            num_encoder_layers=config.num_encoder_layers,
            num_decoder_layers=config.num_decoder_layers,
            head_dim=config.head_dim,
            mlp_dim=config.mlp_dim,
            mlp_activations=activation,
            dropout_rate=0.0,
            logits_via_embedding=config.tied_logits,
        )
    )
    rng = np.random.default_rng(0)
    prompts = rng.integers(2, 64, (3, 20)) * (np.arange(20) < [[20], [7], [1]])
    prompts, shifted = jnp.asarray(prompts, jnp.int32), rng.integers(2, 64, (3, 9))
    shifted = jnp.asarray(shifted, jnp.int32)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        expected = transformer.apply(
            {"params": traverse_util.unflatten_dict(theirs, sep="/")},
            prompts,
            shifted,
            jnp.ones_like(shifted),
            enable_dropout=False,
        )
    module = encoder_decoder.ImageTextModule(None, config)
    params = traverse_util.unflatten_dict(ours, sep="/")
    logits = jit(module.apply)({"params": params}, None, prompts, shifted)
    assert_within(1e-4, logits, expected, f"{name} vs T5X's network")


def test_a_t5x_checkpoint_with_scanned_layers_is_of_no_family():
    shape = np.zeros((2, 4, 2), np.float32)
    names = ("target/encoder/encoder/attention/query/kernel", "target/x")
    tensors = dict.fromkeys(names, shape)
    assert not any(family.recognises({}, tensors) for family in t5x.FAMILIES)
