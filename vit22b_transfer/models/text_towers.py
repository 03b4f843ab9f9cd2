"""Text towers: token ids to one embedding for each text, for image-text pairs.

A tower gives a vector, of which a linear layer makes an embedding as wide as those of
images. `TextTower` is the transformer of SigLIP (every position sees every other, also
padding; the vector is that of the last position) and of CLIP (a position sees those
before it; the vector is that of the first end-of-text token), with blocks as image
towers have them. `PooledT5Config` is the encoder of a T5 and the mean of its encodings.

A text comes as batches hold it: its tokens, 1 at its end, 0 behind it.
"""

import dataclasses
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vit22b_transfer import UserError
from vit22b_transfer.models import layers, stacking, t5, vit_blocks

Pooling = Literal["last", "end", "mean"]
Remat = Literal["none", "dots", "block"]

# What ends a text in batches, and what stands behind it.
_END_ID, _PAD_ID = 1, 0


@runtime_checkable
class TextTowerConfig(Protocol):
    """The configuration of one text tower: a frozen dataclass.

    It has `width` (of the vector), `embed_dim` (of the embedding), `projection_bias`
    (whether the layer between the two has one), `vocab_size` (rows of the token table),
    `end_id` (of the token that ends a text), `dtype` and `param_dtype`.
    """

    def build(self) -> nn.Module:
        """The tower, without a name.

        A call takes int32 tokens [B, L] and `train`, whether to drop out, and returns
        the vectors [B, E].
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig(vit_blocks.BlockConfig):
    """One transformer over texts. The defaults are the ViT-22B form of its blocks.

    embed_dim: width of the embeddings.
    projection_bias: of the layer from the vector to them; CLIP has none.
    max_length: positions there are; texts may be shorter. With `pooling="last"` they
      are padded to it, as SigLIP was trained.
    causal: a position sees itself and those before it.
    pooling: the vector of the `last` position, of the first `end` token, or the `mean`
      of the positions of the text.
    start_id: of a token before every text; None: there is none.
    pad_id: of the token behind a text, from 0 (SigLIP has 1, SigLIP 2 has 0).
    end_id: of the token that ends a text. Vocabularies have 1.
    """

    vocab_size: int
    max_length: int
    embed_dim: int
    projection_bias: bool = True
    causal: bool = False
    pooling: Pooling = "last"
    start_id: int | None = None
    pad_id: int = _PAD_ID
    end_id: int = _END_ID
    scan_layers: bool = False
    remat: Remat = "none"

    def __post_init__(self):
        super().__post_init__()
        vit_blocks.check_choice("pooling", self.pooling, get_args(Pooling))
        vit_blocks.check_choice("remat", self.remat, get_args(Remat))
        for name in ("start_id", "pad_id", "end_id"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < self.vocab_size:
                raise UserError(
                    f"{name} is {value}, but the token table has {self.vocab_size} "
                    f"rows: it must be from 0 to {self.vocab_size - 1}."
                )

    def build(self) -> "TextTower":
        """The tower."""
        return TextTower(self)


class TextTower(nn.Module):
    """Tokens to vectors, by a transformer with learned positions."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "batch length"], *, train: bool = False
    ) -> Float[Array, "batch embed"]:
        del train  # nothing is dropped out
        cfg = self.config
        tokens, real = self._framed(tokens)
        length = tokens.shape[1]
        table = self._table("token_embedding", cfg.vocab_size, "vocab")
        positions = self._table("position_embedding", cfg.max_length, "abspos_buckets")
        x = jnp.take(table, tokens, axis=0).astype(cfg.dtype)
        x = x + positions[None, :length].astype(cfg.dtype)
        x = layers.with_sharding_constraint(x, ("batch", "length", "embed"))
        x = self._blocks(x, jnp.tril(jnp.ones((1, 1, length, length), bool)))
        x = vit_blocks.norm(cfg, name="encoder_norm")(x)
        if cfg.pooling == "last":
            return x[:, -1]
        if cfg.pooling == "mean":
            return _mean(x, real)
        end = jnp.argmax(tokens == cfg.end_id, axis=1)
        return jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]

    def _framed(self, tokens):
        """The tokens as the tower was trained on them, and which of them are real."""
        cfg = self.config
        real = tokens != _PAD_ID
        if cfg.end_id != _END_ID:  # then 0 may be a token: CLIP's is "!"
            ends = (tokens == cfg.end_id).astype(jnp.int32)
            real = jnp.cumsum(ends, axis=1) - ends == 0
        tokens = jnp.where(real, tokens, jnp.int32(cfg.pad_id))
        if cfg.start_id is not None:
            before = ((0, 0), (1, 0))
            tokens = jnp.pad(tokens, before, constant_values=cfg.start_id)
            real = jnp.pad(real, before, constant_values=True)
        length = tokens.shape[1]
        if length > cfg.max_length:
            start = " with the token before it" * (cfg.start_id is not None)
            raise UserError(
                f"texts of {length} tokens{start}, but the text tower has positions "
                f"for {cfg.max_length}. Lower the feature length of the texts."
            )
        if cfg.pooling == "last":
            behind = ((0, 0), (0, cfg.max_length - length))
            tokens = jnp.pad(tokens, behind, constant_values=cfg.pad_id)
        return tokens, real

    def _table(self, name, rows, axis):
        cfg = self.config
        return layers.LearnedTable(
            (rows, cfg.width),
            (axis, "embed"),
            nn.initializers.normal(cfg.width**-0.5),
            cfg.param_dtype,
            name=name,
        )()

    def _blocks(self, x, earlier):
        cfg = self.config
        mask = earlier if cfg.causal else None
        block = stacking.remat_block(
            vit_blocks.Block, cfg.remat, scanned=cfg.scan_layers
        )
        if cfg.scan_layers:
            stack = stacking.scan_blocks(block, cfg.depth, num_broadcast=2)
            return stack(cfg, name="layers")(x, None, mask)[0]
        for i in range(cfg.depth):
            x, _ = block(cfg, name=f"layers_{i}")(x, None, mask)
        return x


@dataclasses.dataclass(frozen=True, kw_only=True)
class PooledT5Config:
    """The encoder of a T5 and the mean of its encodings, as Sentence-T5 has it.

    embed_dim, projection_bias: as of `TransformerConfig`.
    """

    t5: t5.T5Config
    embed_dim: int
    projection_bias: bool = True

    def __post_init__(self):
        if not self.t5.num_encoder_layers:
            raise UserError(
                "a T5 without encoder layers cannot encode texts alone; set "
                "num_encoder_layers, or take text_towers.TransformerConfig."
            )

    @property
    def width(self) -> int:
        """Of the vector."""
        return self.t5.width

    @property
    def vocab_size(self) -> int:
        """Rows of the token table."""
        return self.t5.vocab_size

    @property
    def end_id(self) -> int:
        """Of the token that ends a text."""
        return _END_ID

    @property
    def dtype(self) -> Any:
        """Of what is computed."""
        return self.t5.dtype

    @property
    def param_dtype(self) -> Any:
        """Of the parameters."""
        return self.t5.param_dtype

    def build(self) -> "PooledT5":
        """The tower."""
        return PooledT5(self)


class PooledT5(nn.Module):
    """Tokens to vectors, by the encoder of a T5."""

    config: PooledT5Config

    def setup(self):
        cfg = self.config.t5
        self.token_embedder = layers.Embedding(
            cfg.vocab_size, cfg.width, cfg.dtype, cfg.param_dtype
        )
        self.encoder = t5.TextEncoder(cfg)

    def __call__(
        self, tokens: Int[Array, "batch length"], *, train: bool = False
    ) -> Float[Array, "batch embed"]:
        real = tokens != _PAD_ID
        x = self.token_embedder(tokens)
        return _mean(self.encoder(x, real[:, None, None], train=train), real)


def _mean(x, real):
    """The mean over the real positions in float32; of a text without any, zero."""
    weights = real.astype(jnp.float32)[..., None]
    total = jnp.sum(x.astype(jnp.float32) * weights, axis=1)
    count = jnp.maximum(jnp.sum(weights, axis=1), 1.0)
    return (total / count).astype(x.dtype)
