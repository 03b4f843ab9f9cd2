"""Attention pooling of frozen tokens and a linear layer: the attentive probe's head."""

from flax import linen as nn
from jaxtyping import Array, Float

from vit22b_transfer.models import layers, vit_blocks, vit_pooling

# Width of the MLP, times that of the tokens; and of one attention head.
_MLP, _HEAD_DIM = 4, 64


class AttentiveHead(nn.Module):
    """The MAP head of the ViT family (Zhai et al. 2022), and logits of classes.

    In float32. Attention heads are 64 wide; there is one where that does not divide the
    width.
    """

    width: int
    num_classes: int

    def setup(self):
        width = self.width
        config = vit_blocks.BlockConfig(
            width=width,
            depth=1,
            mlp_dim=_MLP * width,
            num_heads=1 if width % _HEAD_DIM else width // _HEAD_DIM,
            parallel=False,
            qkv_bias=True,
            norm_centering=True,
            norm_bias=True,
            attention_form="einsum",
        )
        self.pooling = vit_pooling.MapPooling(config)
        self.head = layers.Dense(width, self.num_classes, ("embed", "classes"))

    def __call__(
        self, tokens: Float[Array, "batch length embed"]
    ) -> Float[Array, "batch classes"]:
        """Logits of the images that the tokens are of."""
        return self.head(self.pooling(tokens))
