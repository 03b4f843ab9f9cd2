"""Vocabularies: bytes, a SentencePiece file, or one trained from the user's own texts.

Batches need two ids: 0 is padding and 1 ends a text. T5's and Gemma's files have them.

A text is a text: `</s>`, `<bos>`, `<pad>` or `<unk>` in a caption or question are read
letter by letter, and never become control tokens, so that no text of a data set ends or
begins another. (Hugging Face's tokenizers make control tokens of them.) T5's
`<extra_id_0>` and so on are single tokens where the vocabulary file has them as symbols
of the user's, or where they are asked for: `load(extra_ids=100)`, VIT22B_EXTRA_IDS=100.
"""

import hashlib
import io
import os
import re
from collections.abc import Sequence

import sentencepiece
import seqio
from seqio.vocabularies import Vocabulary

from vit22b_transfer import UserError
from vit22b_transfer.checkpoints import identity
from vit22b_transfer.data.annotations import read_texts
from vit22b_transfer.data.records import PathLike, resolve_path
from vit22b_transfer.host import whole_files

BYTES = "bytes"
ENVIRONMENT_VARIABLE = identity.VOCABULARY_VARIABLE
EXTRA_IDS_VARIABLE = "VIT22B_EXTRA_IDS"
_MOST_EXTRA_IDS = 10_000


class TooManyPieces(UserError):
    """More pieces than the texts support, which are `at_most`."""

    def __init__(self, asked: int, texts: int, at_most: int):
        super().__init__(
            f"vocab_size {asked} is too large for {texts} texts: they support at most "
            f"{at_most}. Give that or less, or more texts."
        )
        self.at_most = at_most


# They stand before every example, but in no annotation file.
_PROMPTS = ["caption en", "answer en"]
_PAD_ID, _EOS_ID, _UNK_ID = 0, 1, 2


def load(name: PathLike = BYTES, *, extra_ids: int = 0) -> Vocabulary:
    """The vocabulary called "bytes", or of a SentencePiece model file.

    Two vocabularies of one file are equal if their paths are, as SeqIO compares them;
    so paths are made absolute. `extra_ids` are added at the end (T5: 100): the last id
    is `<extra_id_0>`, the one before `<extra_id_1>`, each after a space or first in its
    text.
    """
    if name == BYTES:
        return seqio.ByteVocabulary(extra_ids=extra_ids)
    path = resolve_path(name)
    content = _read_file(path)
    _check_ids(content, path)
    vocabulary = seqio.SentencePieceVocabulary(str(path), extra_ids=extra_ids)
    # SeqIO keeps what it once read under a path for as long as the process lives.
    if not extra_ids and vocabulary.sp_model != content:
        raise UserError(
            f"vocabulary {path} has changed since this process first read it; give the "
            "new one another name, or start again."
        )
    return vocabulary


def from_environment() -> Vocabulary:
    """The vocabulary that $VIT22B_VOCABULARY names: a file or `bytes`.

    Bytes too if it is not set; a run of a model whose token table is far larger than
    that is then refused. $VIT22B_EXTRA_IDS is `extra_ids` of `load`, 0 by default.
    """
    said = os.environ.get(EXTRA_IDS_VARIABLE) or "0"
    if not said.isdecimal() or int(said) > _MOST_EXTRA_IDS:
        raise UserError(
            f"${EXTRA_IDS_VARIABLE} is {said!r}; it must be a whole number from 0 to "
            f"{_MOST_EXTRA_IDS}, such as T5's 100."
        )
    return load(os.environ.get(ENVIRONMENT_VARIABLE) or BYTES, extra_ids=int(said))


def fingerprint(vocabulary: Vocabulary) -> str:
    """A text that is equal for vocabularies with the same ids, wherever they lie.

    To be stored beside a checkpoint and compared when it is restored.
    """
    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
        digest = hashlib.sha256(vocabulary.sp_model or b"").hexdigest()[:16]
        return f"sentencepiece:{digest}:{vocabulary.vocab_size}"
    return f"{type(vocabulary).__name__}:{vocabulary.vocab_size}"


def _read_file(path):
    if not path.is_file() or not path.stat().st_size:
        state = "is empty" if path.is_file() else "is not a file"
        raise UserError(
            f"vocabulary {path} {state}; give a SentencePiece model file or {BYTES!r}."
        )
    return path.read_bytes()


def _check_ids(content, path):
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(content)
    except (RuntimeError, UnicodeDecodeError) as e:  # its messages hold pieces
        raise UserError(f"vocabulary {path} is not a SentencePiece model file.") from e
    if model.pad_id() != _PAD_ID or model.eos_id() != _EOS_ID:
        raise UserError(
            f"vocabulary {path} has pad id {model.pad_id()} and end-of-text id "
            f"{model.eos_id()} (-1: none), but batches need padding at 0 and the end "
            "at 1, as in the files of T5 and Gemma; train one with `vit22b vocab`."
        )


def train(
    files: Sequence[PathLike],
    path: PathLike,
    *,
    vocab_size: int,
    on_bad_record: str = "error",
) -> Vocabulary:
    """A SentencePiece vocabulary of the texts in the files, written to `path`.

    `files`: COCO captions or VQAv2 `.json`, or `.jsonl`, `.csv`, `.txt`. The words of
    the default prompts are added. Ids as T5's: 0 padding, 1 end, 2 unknown. All
    characters of the texts are covered and any other falls back to bytes, so no text
    becomes unknown. The same files in the same order give the same vocabulary. A bad
    entry is an error, or with `on_bad_record='skip'` is left out and counted.

    Raises:
      UserError: there is no text, or `vocab_size` is more than the texts support.
    """
    target = resolve_path(path)
    texts = [" ".join(text.split()) for text in read_texts(files, on_bad_record)]
    texts = [text for text in texts if text]
    if not texts:
        raise UserError(f"no text to train a vocabulary from in {list(files)}.")
    prompts = _PROMPTS * (1 + len(texts) // 10)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(texts + prompts),
            model_writer=model,
            vocab_size=vocab_size,
            # Unlike a unigram model, merges keep frequent words of a small set whole.
            model_type="bpe",
            character_coverage=1.0,
            byte_fallback=True,
            pad_id=_PAD_ID,
            eos_id=_EOS_ID,
            unk_id=_UNK_ID,
            bos_id=-1,
            max_sentence_length=1 << 20,  # bytes; longer texts would be dropped
            num_threads=1,  # more would make the sums of the EM steps vary
            minloglevel=2,
        )
    except RuntimeError as e:
        raise _size_error(vocab_size, len(texts), str(e)) from e
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_files.replacing(str(target), "wb") as file:
        file.write(model.getvalue())
    return load(target)


def _size_error(vocab_size, num_texts, message):
    """SentencePiece's own errors about the size, with the bound it found."""
    at_most = re.search(r"value <= (\d+)", message)
    if at_most:
        return TooManyPieces(vocab_size, num_texts, int(at_most[1]))
    at_least = re.search(r"smaller than required_chars. \d+ vs (\d+)", message)
    if at_least:
        return UserError(
            f"vocab_size {vocab_size} is too small: the characters of the texts and "
            f"the 256 bytes need at least {at_least[1]}."
        )
    return UserError(f"cannot train a vocabulary of {vocab_size} pieces: {message}")
