"""Token loss of a large vocabulary: in pieces against whole logits, memory and time.

Claim: temporaries beyond the gradient of the table do not grow with the vocabulary, for
a product more in four. Hidden states and table as T5-v1.1-base's decoder and Gemma 2B
have them; loss with a z-loss, and a plain gradient step of the table, which both forms
need the whole gradient for: the temporaries hold it.

    python benchmarks/vocabulary_pieces.py [--positions 512] [--rounds 5]
"""

import functools

import interleave
import jax
import jax.numpy as jnp
import numpy as np

from vit22b_transfer.models import losses, vocabulary_pieces

# Tokens, width, axis of the vocabulary.
HEADS = {
    "T5-v1.1-base": (32_128, 768, 1),
    "Gemma 2B": (257_152, 2048, 0),
}
FORMS = ("pieces", "whole")


def step_of(form, axis, states, table, targets):
    """(the mean loss, the gradient of the states, the table after a step)."""

    def loss(states, table):
        if form == "pieces":
            head = vocabulary_pieces.Head(table, axis)
            terms = vocabulary_pieces.token_terms(
                states, head, targets, piece=vocabulary_pieces.PIECE
            )
        else:
            cast = table.astype(states.dtype)
            equation = "bte,ev->btv" if axis else "bte,ve->btv"
            logits = jnp.einsum(
                equation, states, cast, preferred_element_type=jnp.float32
            )
            terms = losses.terms_of_logits(logits, targets)
        weights = jnp.ones(targets.shape, jnp.float32)
        total, _, weight = losses.token_cross_entropy(
            terms, weights, vocab_size=table.shape[axis], z_loss=1e-4
        )
        return total / weight

    value, (of_states, of_table) = jax.value_and_grad(loss, (0, 1))(states, table)
    # The norm of the gradient, as where it is clipped: all of it comes first.
    rate = 0.01 / jnp.sqrt(jnp.sum(jnp.square(of_table)))
    return value, of_states, table - rate * of_table


class Step:
    """A compiled step; every call advances the table that it keeps."""

    def __init__(self, form, axis, states, table, targets):
        self.arguments = states, targets
        self.table = jnp.array(table)
        step = jax.jit(functools.partial(step_of, form, axis), donate_argnums=1)
        self.compiled = step.lower(states, self.table, targets).compile()

    def __call__(self):
        states, targets = self.arguments
        value, of_states, self.table = self.compiled(states, self.table, targets)
        jax.block_until_ready(self.table)
        return value, of_states


def rows(options):
    """A row for each head and dtype."""
    for name, (tokens, width, axis) in HEADS.items():
        for dtype in (jnp.float32, jnp.bfloat16):
            random = np.random.default_rng(0)
            shape = (8, options.positions // 8)
            table_shape = (width, tokens) if axis else (tokens, width)
            arguments = (
                jnp.asarray(random.standard_normal((*shape, width), np.float32), dtype),
                jnp.asarray(0.02 * random.standard_normal(table_shape, np.float32)),
                jnp.asarray(random.integers(0, tokens, shape), jnp.int32),
            )
            steps = {form: Step(form, axis, *arguments) for form in FORMS}
            ours, theirs = (steps[form]() for form in FORMS)
            difference = max(
                float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))
                for a, b in zip(ours, theirs, strict=True)
            )
            samples = interleave.interleave(steps, options.rounds)
            memory = {
                form: steps[form].compiled.memory_analysis().temp_size_in_bytes / 2**20
                for form in FORMS
            }
            yield [
                f"{name}, {jnp.dtype(dtype).name}",
                *(f"{memory[form]:,.0f}" for form in FORMS),
                *(f"{interleave.median(samples[form], 'wall'):.2f}" for form in FORMS),
                f"{interleave.ratio(samples, 'pieces', 'whole', 'wall'):.2f}",
                f"{difference:.0e}",
            ]


def main():
    parser = interleave.arguments(__doc__, rounds=5)
    parser.add_argument("--positions", type=int, default=512)
    options = parser.parse_args()
    interleave.print_conditions(options.rounds)
    header = ["head", "pieces, MiB", "whole, MiB", "pieces, s", "whole, s", "ratio"]
    interleave.print_table([*header, "difference"], rows(options))


if __name__ == "__main__":
    main()
