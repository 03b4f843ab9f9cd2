"""A restored image-text model that answers what it is asked, in few compiled shapes."""

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
from jaxtyping import Float32, Int32, UInt8

from vit22b_transfer import NotFiniteError, UserError
from vit22b_transfer.data import batches, image_lengths, images, placement
from vit22b_transfer.data.preprocessors import QUESTION_FIELD, check_prompt
from vit22b_transfer.data.records import half_character
from vit22b_transfer.host import progress
from vit22b_transfer.inference import prediction_lines, word_attention
from vit22b_transfer.inference.restored import RestoredModel, restore
from vit22b_transfer.models import multimodal, preparation
from vit22b_transfer.partitioning.rules import Partitioning

_IMAGES, _TOKENS = "encoder_input_images", "encoder_input_tokens"
# A batch size is this many times the one before it.
_STEP = 4
# Digits of a weight of a patch: a colour has 256 steps.
_DIGITS = 4
_MOST_BATCH = 4096


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """One image and prompt, as the model takes them.

    region: left, top, width and height, in [0, 1], of what it sees of the image.
    attention: whether the weights over the patches are wanted.
    """

    pixels: UInt8[np.ndarray, "height width 3"]
    tokens: Int32[np.ndarray, " length"]
    prompt: str
    region: tuple[float, float, float, float]
    attention: bool = False


Answer = dict[str, Any]


class Predictor:
    """Answers of a model; `prepare` may be called by any thread, the rest by one.

    restored: of an `ImageTextModel` that decodes.
    prompts: as of `data.given_images.task`: the first with "{question}" is of
      questions, the first without of captions.
    batch_size: the most that are computed at a time.

    Raises:
      UserError: if the model is of another kind, or there is no prompt.
    """

    def __init__(
        self,
        restored: RestoredModel,
        feature_lengths: Mapping[str, Any],
        prompts: Sequence[str],
        batch_size: int,
    ):
        model = restored.model
        if not isinstance(model, multimodal.ImageTextModel) or not model.decode_fn:
            raise UserError(
                f"a {type(model).__name__} is here without text to decode; only models "
                "that caption or answer are served."
            )
        if not prompts:
            raise UserError("there is no prompt; give --prompt 'caption en'.")
        for prompt in prompts:
            check_prompt(prompt)
        self.restored, self.model = restored, model
        asking = [prompt for prompt in prompts if QUESTION_FIELD in prompt]
        telling = [prompt for prompt in prompts if QUESTION_FIELD not in prompt]
        self.caption_prompt = telling[0] if telling else None
        self.answer_prompt = asking[0] if asking else None
        self.sizes = batch_sizes(batch_size, restored.partitioning.mesh.shape["data"])
        self._batches = {
            size: _zeros(model, feature_lengths, size) for size in self.sizes
        }
        smallest = self._batches[self.sizes[0]]
        if smallest[_IMAGES].ndim != 4:
            raise UserError(
                "the model takes several images at once; only models of one image are "
                "served. Use `vit22b infer`."
            )
        _, self._height, self._width, _ = smallest[_IMAGES].shape
        self._how = preparation.of_model(model) or images.USUAL
        self.grid = word_attention.grid_of(model, self._height, self._width)
        self._attention = word_attention.WordAttention(model)
        self._vocabulary = model.input_vocabulary
        # Read now: the file may be gone when the first request comes.
        self._vocabulary.encode("read")
        model.output_vocabulary.decode([multimodal.EOS_ID])

    def prompt_of(self, question: str | None) -> str:
        """The whole prompt of a question, or of a caption without one.

        Raises:
          UserError: if the model has no such prompt, or the question is no text.
        """
        if question is None:
            if self.caption_prompt is None:
                raise UserError("this model only answers questions: POST /v1/answer")
            return self.caption_prompt
        if self.answer_prompt is None:
            raise UserError("this model only captions: POST /v1/caption")
        if not question.strip():
            raise UserError("the question is blank")
        if problem := half_character(question):
            raise UserError(f"the question {problem}")
        before, _, after = self.answer_prompt.partition(QUESTION_FIELD)
        return f"{before}{question}{after}"

    def prepare(self, image: bytes, prompt: str, *, attention: bool = False) -> Asked:
        """An encoded image and a whole prompt, as `vit22b caption` makes them.

        Raises:
          UserError: if the image cannot be read, or the prompt is longer than the
            model's: nothing is cut.
        """
        limit = self._batches[self.sizes[0]][_TOKENS].shape[1]
        # A token is a character at least.
        if len(prompt) <= 16 * limit:
            ids = [*self._vocabulary.encode(prompt), self._vocabulary.eos_id]
            if len(ids) <= limit:
                tokens = np.zeros(limit, np.int32)
                tokens[: len(ids)] = ids
                return self._prepared(image, tokens, prompt, attention)
        raise UserError(
            f"the prompt has more than the {limit} tokens that the model takes; ask "
            "something shorter"
        )

    def _prepared(self, image, tokens, prompt, attention):
        size = self._height, self._width
        pixels, region = images.read_with_region(image, size, self._how)
        return Asked(pixels, tokens, prompt, region, attention)

    def compile(self, console: rich.console.Console) -> None:
        """Compiles all shapes, with a line of progress of each."""
        work: list[tuple[str, Any]] = [
            (f"batches of {size}", functools.partial(self._run, batch))
            for size, batch in self._batches.items()
        ]
        if self.grid is not None:
            smallest = self._batches[self.sizes[0]]
            tokens = np.zeros((self.sizes[0], self._time()), np.int32)
            work.append(
                ("attention", functools.partial(self._weights, smallest, tokens))
            )
        label = "compiling"
        with progress.Progress(
            console, label, total=len(work), unit="programs", lines=False
        ) as bar:
            for number, (name, call) in enumerate(work, start=1):
                start = time.monotonic()
                jax.block_until_ready(call())
                bar.show(number)
                if not bar.is_bar:
                    console.print(
                        f"{label} {number}/{len(work)}: {name}, "
                        f"{time.monotonic() - start:.1f} s",
                        markup=False,
                    )

    def predict(self, asked: Sequence[Asked]) -> list[Answer | NotFiniteError]:
        """prompt, prediction and score of each, in order, in one batch.

        One whose score is not finite is that error, whatever the others are. Where they
        are asked for, `attention` has the grid, the region of the image that it covers,
        and the weights of each word.
        """
        size = next(size for size in self.sizes if size >= len(asked))
        outputs = jax.device_get(self._run(self._filled(size, asked)))
        answers: list[Answer | NotFiniteError] = []
        for row, one in enumerate(asked):
            example = {"inputs_pretokenized": one.prompt}
            try:
                (line,) = prediction_lines.of_batch(
                    [example], 0, row, outputs, self.model
                )
            except NotFiniteError:
                answers.append(
                    NotFiniteError("the model's score of this is not finite")
                )
                continue
            del line["index"]
            answers.append(line)
        wanted = [row for row, one in enumerate(asked) if one.attention]
        wanted = [row for row in wanted if isinstance(answers[row], dict)]
        if self.grid is not None:
            for start in range(0, len(wanted), self.sizes[0]):
                rows = wanted[start : start + self.sizes[0]]
                told = self._attended([asked[row] for row in rows], outputs[0][rows])
                for row, one in zip(rows, told, strict=True):
                    answers[row] |= {"attention": one}  # pyright: ignore
        return answers

    def _filled(self, size: int, asked: Sequence[Asked]) -> dict[str, np.ndarray]:
        batch = dict(self._batches[size])
        for name, rows in (
            (_IMAGES, [one.pixels for one in asked]),
            (_TOKENS, [one.tokens for one in asked]),
        ):
            batch[name] = batch[name].copy()
            batch[name][: len(rows)] = rows
        return batch

    @functools.cached_property
    def _predict(self):
        """The jitted (params, batch) -> (tokens, aux).

        What is drawn of a request is what is drawn of the first example of a split
        (`predicting.example_keys` with seed 0), whatever row it has.
        """

        def predict(params, batch):
            zeros = jnp.zeros(batch[_TOKENS].shape[0], jnp.uint32)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), zeros)
            return self.model.predict_batch_with_aux(params, batch, rng=keys)

        replicated = self.restored.partitioning.replicated
        return jax.jit(predict, out_shardings=replicated)

    def _run(self, batch: dict[str, np.ndarray]):
        with self.restored.partitioning.activate():
            return self._predict(self.restored.params, self._placed(batch))

    def _placed(self, batch: dict[str, np.ndarray]):
        size = len(batch[_TOKENS])
        return placement.Placement.on(self.restored.partitioning, size)(batch)

    def _time(self) -> int:
        batch = self._batches[self.sizes[0]]
        return self.model.max_decode_length or batch["decoder_target_tokens"].shape[1]

    def _weights(self, batch: dict[str, np.ndarray], tokens: np.ndarray):
        placed = self._placed(
            {_IMAGES: batch[_IMAGES], _TOKENS: batch[_TOKENS], "tokens": tokens}
        )
        with self.restored.partitioning.activate():
            return self._attention(self.restored.params, *placed.values())

    def _attended(
        self, asked: Sequence[Asked], tokens: Int32[np.ndarray, "rows length"]
    ) -> list[dict[str, Any]]:
        size = self.sizes[0]
        padded = np.pad(tokens, ((0, size - len(tokens)), (0, 0)))
        weights = self._weights(self._filled(size, asked), padded)
        weights = np.asarray(jax.device_get(weights))
        return [self._told(*of) for of in zip(asked, tokens, weights, strict=False)]

    def _told(
        self,
        asked: Asked,
        tokens: Int32[np.ndarray, " length"],
        weights: Float32[np.ndarray, "length patches"],
    ) -> dict[str, Any]:
        assert self.grid is not None
        ended = np.flatnonzero(tokens == multimodal.EOS_ID)
        ids = tokens[: ended[0] if len(ended) else len(tokens)].tolist()
        words = word_attention.words_of(self.model.output_vocabulary, ids)
        rows, columns = self.grid
        return {
            "rows": rows,
            "columns": columns,
            "region": asked.region,
            "words": [
                {
                    "word": word,
                    "weights": [
                        float(f"{x:.{_DIGITS}g}") for x in weights[places].mean(axis=0)
                    ],
                }
                for word, places in words
                if places
            ],
        }


def load(
    model: Any,
    *,
    partitioning: Partitioning,
    checkpoint: str,
    feature_lengths: Mapping[str, Any],
    prompts: Sequence[str],
    batch_size: int,
) -> Predictor:
    """The model with a checkpoint's parameters, not compiled yet.

    checkpoint: one, or a directory of them, of which the latest is taken.
    """
    smallest = batch_sizes(batch_size, partitioning.mesh.shape["data"])[0]
    restored = restore(model, partitioning, checkpoint, feature_lengths, smallest)
    return Predictor(restored, feature_lengths, prompts, batch_size)


def batch_sizes(most: int, parts: int) -> tuple[int, ...]:
    """Those that are compiled, rising: few, and each a multiple of `parts`.

    Raises:
      UserError: for less than 1 or more than 4096.
    """
    if not 1 <= most <= _MOST_BATCH:
        raise UserError(f"batch_size is {most}; give one from 1 to {_MOST_BATCH}.")
    sizes, size = [most], 1
    while size < most:
        sizes.append(size)
        size *= _STEP
    return tuple(sorted({-(-size // parts) * parts for size in sizes}))


def _zeros(
    model: multimodal.ImageTextModel, feature_lengths: Mapping[str, Any], size: int
) -> dict[str, np.ndarray]:
    converter = image_lengths.converter_of(model)
    shapes, types = batches.batch_shapes(converter, feature_lengths, size)
    return {name: np.zeros(shape, types[name]) for name, shape in shapes.items()}
