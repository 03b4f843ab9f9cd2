"""What a text may not be: too short, or repeating itself; of each decoding step.

The three are Hugging Face's of the same names. There they count a decoder-only model's
prompt as text that may not be repeated; here only what was generated counts, in both
families of text models.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32

from vit22b_transfer import UserError


@dataclasses.dataclass(frozen=True)
class Controls:
    """Rules that the next token's scores go through before one is chosen.

    min_new_tokens: a text has no end before as many tokens; 0: none.
    repetition_penalty: above zero; the score of a token that is in the text is divided
      by it if positive, else multiplied (Keskar et al. 2019, arXiv 1909.05858, sec.
      4.1). Above 1 repeats less; 1: none.
    no_repeat_ngram_size: no so many tokens in a row stand in a text twice (Paulus et
      al. 2017, arXiv 1705.04304, sec. 2.5); 0: they may.

    Raises:
      UserError: for a value out of range, or if none of them does anything.
    """

    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0

    def __post_init__(self):
        for name in ("min_new_tokens", "no_repeat_ngram_size"):
            if (value := getattr(self, name)) < 0:
                raise UserError(f"{name} is {value}; it must be 0 (off) or more.")
        if not self.repetition_penalty > 0.0:
            raise UserError(
                f"repetition_penalty is {self.repetition_penalty}; it must be above 0, "
                "1 being off."
            )
        off = {
            "min_new_tokens": 0,
            "repetition_penalty": 1.0,
            "no_repeat_ngram_size": 0,
        }
        if dict(self.settings) == off:
            raise UserError(
                "controls of decoding are all off; set min_new_tokens, "
                "repetition_penalty or no_repeat_ngram_size, or leave them out."
            )

    @property
    def settings(self) -> tuple[tuple[str, int | float], ...]:
        """Names and values, for records of how a file was made."""
        return tuple(dataclasses.asdict(self).items())

    def check(self, max_decode_length: int) -> None:
        """Raises a UserError if no text could end within so many tokens."""
        if self.min_new_tokens >= max_decode_length:
            raise UserError(
                f"min_new_tokens is {self.min_new_tokens}, but texts are decoded up to "
                f"{max_decode_length} tokens with their end; it must be less."
            )

    def applied(
        self,
        scores: Float32[Array, "rows vocab"],
        tokens: Int32[Array, "rows length"],
        index: Int32[Array, ""],
        eos_id: int,
    ) -> Float32[Array, "rows vocab"]:
        """The scores of the next tokens, -inf for those that may not come.

        scores: logits, or log-probabilities, which stay at most zero.
        tokens: of each row the text so far: the first `index` of them.
        """
        past = jnp.arange(tokens.shape[1]) < index
        if self.repetition_penalty != 1.0:
            said = _marked(scores, tokens, jnp.broadcast_to(past[None], tokens.shape))
            penalty = jnp.float32(self.repetition_penalty)
            changed = jnp.where(scores > 0, scores / penalty, scores * penalty)
            scores = jnp.where(said, changed, scores)
        if self.no_repeat_ngram_size:
            scores = self._without_repeats(scores, tokens, index)
        if self.min_new_tokens:
            is_eos = (jnp.arange(scores.shape[1]) == eos_id)[None]
            too_early = is_eos & (index < self.min_new_tokens)
            scores = jnp.where(too_early, -jnp.inf, scores)
        return scores

    def applied_to_beams(
        self,
        scores: Float32[Array, "batch beams vocab"],
        tokens: Int32[Array, "batch beams length"],
        index: Int32[Array, ""],
        eos_id: int,
    ) -> Float32[Array, "batch beams vocab"]:
        """As `applied`, of several beams for each row."""
        rows = scores.shape[0] * scores.shape[1]
        applied = self.applied(
            scores.reshape(rows, -1), tokens.reshape(rows, -1), index, eos_id
        )
        return applied.reshape(scores.shape)

    def _without_repeats(self, scores, tokens, index):
        """No token that would end an n-gram which is there already."""
        length, before = tokens.shape[1], self.no_repeat_ngram_size - 1
        if before >= length:
            return scores
        # The last n - 1 tokens against those before each place.
        last = lax.dynamic_slice_in_dim(
            tokens, jnp.maximum(index - before, 0), before, axis=1
        )
        same = jnp.ones((tokens.shape[0], length - before), bool)
        for offset in range(before):
            window = tokens[:, offset : offset + length - before]
            same &= window == last[:, offset : offset + 1]
        # The token behind a window must be one of the text.
        same &= (jnp.arange(before, length) < index)[None]
        return jnp.where(_marked(scores, tokens[:, before:], same), -jnp.inf, scores)


def _marked(scores, tokens, which):
    """Of each row, which tokens of the vocabulary are among those that are marked."""
    rows = jnp.arange(tokens.shape[0])[:, None]
    return jnp.zeros(scores.shape, bool).at[rows, tokens].max(which)
