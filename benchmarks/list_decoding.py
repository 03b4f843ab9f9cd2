"""Answers from a list against free beam search of the same width and steps.

Claim: looking up the trie costs less than a tenth of free decoding.

A decoder of T5-v1.1-base's width, 3,129 drawn answers (as many as VQAv2's) of exactly
`--steps` tokens with their end; free beam search never ends before. Prints processor
time of both and the median ratio of rounds in which they run back to back.

    python benchmarks/list_decoding.py [--beams 8] [--layers 4] [--rounds 7]
"""

import argparse
import dataclasses
import types

import interleave
import jax
import jax.numpy as jnp
import numpy as np
import workload

from vit22b_transfer.inference import answer_lists, decoding
from vit22b_transfer.models import encoder_decoder, multimodal

ANSWERS, FIRST_TOKENS, ENCODED, NEVER = 3129, 2000, 64, -1


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--beams", type=int, default=8)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    draw = np.random.default_rng(0)
    answers = draw.integers(2, workload.VOCABULARY, (ANSWERS, args.steps - 1))
    answers[:, 0] = draw.integers(2, 2 + FIRST_TOKENS, ANSWERS)
    trie = answer_lists.trie(answers.tolist(), multimodal.EOS_ID)

    def free(init_cache, step_fn, *, eos_id, **options):
        del eos_id
        return decoding.beam_search(
            init_cache, step_fn, eos_id=NEVER, num_beams=args.beams, **options
        )

    def listed(init_cache, step_fn, *, rng, **options):
        del rng
        return answer_lists.from_trie(
            init_cache, step_fn, trie, num_beams=args.beams, **options
        )

    samples = interleave.interleave(
        {"free": _decoder(free, args), "from a list": _decoder(listed, args)},
        args.rounds,
    )
    for name in samples:
        print(f"{name}: {interleave.median(samples[name], 'cpu'):.2f} processor-s")
    cost = interleave.ratio(samples, "from a list", "free", "cpu")
    print(f"from a list / free: {cost:.3f}")


def _decoder(decode_fn, args):
    """A run of `args.steps` steps from encodings on."""
    text = workload.build_text(jnp.float32, args.layers)
    text = dataclasses.replace(text, param_dtype=jnp.float32)
    vocabulary = types.SimpleNamespace(vocab_size=text.vocab_size)
    model = multimodal.ImageTextModel(
        encoder_decoder.ImageTextModule(None, text),
        vocabulary,
        vocabulary,
        decode_fn=decode_fn,
        max_decode_length=args.steps,
    )
    batch = workload.build_batch(args.batch)
    batch["encoder_input_tokens"] = jnp.full((args.batch, ENCODED), 2, jnp.int32)
    params = workload.initial_params(model, batch)
    compiled = jax.jit(model.predict_batch).lower(params, batch)
    compiled = compiled.compile()

    def run():
        tokens = np.asarray(compiled(params, batch))
        assert (tokens[:, args.steps - 1] != 0).all(), "ended before"

    return run


if __name__ == "__main__":
    main()
