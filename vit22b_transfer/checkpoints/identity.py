"""What a checkpoint was trained with: its vocabularies and its low-rank updates."""

import hashlib
import os
from typing import Any

import jax

from vit22b_transfer import UserError
from vit22b_transfer.checkpoints import reading
from vit22b_transfer.host import progress

# Of the file of a vocabulary, or `bytes`: see `data.vocabularies`.
VOCABULARY_VARIABLE = "VIT22B_VOCABULARY"
_BYTES = "ByteVocabulary"
# Rows of a table for each token of its vocabulary: ByT5 has 1.5, the recipes for drawn
# scenes have 1.7 if they are run on bytes.
_MOST_ROWS = 3


def vocabulary_record(model: Any) -> dict[str, Any]:
    """Class, size and content hash of both vocabularies, to compare at restore."""
    record = {}
    for name in ("input_vocabulary", "output_vocabulary"):
        vocabulary = getattr(model, name, None)
        if vocabulary is None:  # a model without texts
            continue
        kind, size = type(vocabulary).__name__, int(vocabulary.vocab_size)
        # A SentencePiece vocabulary has its whole model; others are what they are
        # called and how large they are.
        content = getattr(vocabulary, "sp_model", None) or f"{kind} {size}".encode()
        digest = hashlib.sha256(content).hexdigest()
        record[name] = {"class": kind, "size": size, "sha256": digest}
    return record


def vocabulary_in_use(model: Any) -> str:
    """A line on the vocabulary of a run, "" for a model without texts.

    Raises:
      UserError: for bytes that nobody asked for, where the token table was made for
        a far larger vocabulary.
    """
    vocabulary = getattr(model, "output_vocabulary", None)
    if vocabulary is None:
        return ""
    kind, size = type(vocabulary).__name__, int(vocabulary.vocab_size)
    text_model = getattr(getattr(model, "module", None), "text", None)
    rows = getattr(text_model, "vocab_size", size)
    unsaid = kind == _BYTES and not os.environ.get(VOCABULARY_VARIABLE)
    if unsaid and rows > _MOST_ROWS * size:
        raise UserError(
            f"${VOCABULARY_VARIABLE} is not set, so texts would be read as bytes "
            f"({size} tokens), but the text model's table has {rows} rows, for a "
            f"SentencePiece vocabulary. Set {VOCABULARY_VARIABLE} to its file "
            "(`vit22b vocab` makes one), or to bytes if you want bytes."
        )
    where = getattr(vocabulary, "sentencepiece_model_file", "")
    text = "bytes" if kind == _BYTES else f"{where or kind}"
    text = f"vocabulary: {text}, {size} tokens"
    if rows > size:
        text += f"; the table has {rows} rows, of which those beyond are never decoded"
    return text


def show_vocabulary(model: Any) -> None:
    """Prints `vocabulary_in_use`, at the start of a run; errors as of it."""
    if text := vocabulary_in_use(model):
        progress.console(quiet=jax.process_index() > 0).print(text, markup=False)


def check_vocabularies(path: str, model: Any) -> None:
    """Raises UserError unless the model's vocabularies are the checkpoint's.

    Checkpoints that other programs wrote record none; then there is nothing to compare.
    """
    path = reading.resolve(path)
    saved = reading.read_record(path).get("vocabularies", {})
    for name, ours in vocabulary_record(model).items():
        theirs = saved.get(name, ours)
        if theirs["sha256"] != ours["sha256"]:
            raise UserError(
                f"the model's {name} is not the one that {path} was trained with: "
                f"there {_describe(theirs)}, here {_describe(ours)}. Use the "
                "vocabulary of the run that wrote the checkpoint."
            )


def lora_record(model: Any) -> dict[str, float]:
    """What the arrays do not tell of a model's low-rank updates; empty without any."""
    lora = getattr(model, "lora", None)
    return {} if lora is None else {"alpha": lora.alpha}


def check_lora(path: str, model: Any) -> None:
    """Raises UserError if the model scales its updates otherwise than the checkpoint.

    Checkpoints that other programs wrote do not record it.
    """
    path, ours = reading.resolve(path), lora_record(model)
    theirs = reading.read_record(path).get("lora") or ours
    if ours and ours != theirs:
        raise UserError(
            f"the model's LoRA has alpha {ours['alpha']}, but {path} was trained with "
            f"{theirs['alpha']}: set LoraConfig.alpha = {theirs['alpha']}."
        )


def _describe(vocabulary):
    return (
        f"{vocabulary['class']} with {vocabulary['size']} tokens "
        f"(sha256 {vocabulary['sha256'][:12]})"
    )
