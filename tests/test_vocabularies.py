import io
import json

import pytest
import sentencepiece
import seqio
import tiny_models
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vit22b_transfer import UserError, cli
from vit22b_transfer.checkpoints import identity
from vit22b_transfer.data import vocabularies
from vit22b_transfer.demo import scenes
from vit22b_transfer.models import encoder_decoder, multimodal

CAPTIONS = [
    f"a {size} {color} {shape}, number {n}"
    for n, size in enumerate(("small", "large", "huge", "tiny"))
    for color in ("red", "green", "blue", "käsegelb")
    for shape in ("circle", "square", "cross")
]


@pytest.fixture(scope="module")
def caption_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("captions") / "captions.json"
    annotations = [
        {"id": n, "image_id": n, "caption": caption}
        for n, caption in enumerate(CAPTIONS)
    ]
    path.write_text(json.dumps({"images": [], "annotations": annotations}))
    return path


@pytest.fixture(scope="module")
def trained(caption_file, tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "new" / "captions.model"
    return vocabularies.train([caption_file], path, vocab_size=380)


def sentencepiece_model(**options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(CAPTIONS),
        model_writer=model,
        minloglevel=2,
        hard_vocab_limit=False,
        vocab_size=80,
        **options,
    )
    return model.getvalue()


def test_ids_are_those_of_t5(trained):
    model = trained.tokenizer
    assert (model.pad_id(), model.eos_id(), model.unk_id()) == (0, 1, 2)
    assert model.bos_id() == -1
    assert trained.vocab_size == model.GetPieceSize() == 380


def test_whole_words_become_pieces(trained):
    assert len(trained.encode("a large blue square")) == 4
    assert len(trained.encode("caption en")) == 2


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"])))
def test_no_text_is_unknown(trained, text):
    ids = trained.encode(text)
    assert trained.unk_id not in ids
    assert 0 not in ids and 1 not in ids


def test_texts_survive_encoding_and_decoding(trained):
    for text in [*CAPTIONS, "漢字 and 🦊"]:
        assert trained.decode(trained.encode(text)) == text
        assert trained.encode_tf(text).numpy().tolist() == trained.encode(text)


def test_training_is_deterministic(trained, caption_file, tmp_path):
    again = vocabularies.train([caption_file], tmp_path / "b.model", vocab_size=380)
    assert again.sp_model == trained.sp_model
    assert vocabularies.fingerprint(again) == vocabularies.fingerprint(trained)


def test_another_vocabulary_has_another_fingerprint(trained, caption_file, tmp_path):
    other = vocabularies.train([caption_file], tmp_path / "b.model", vocab_size=381)
    prints = {
        vocabularies.fingerprint(vocabulary)
        for vocabulary in (trained, other, vocabularies.load("bytes"))
    }
    assert len(prints) == 3


def test_a_loaded_vocabulary_equals_the_trained_one(trained, monkeypatch):
    path = trained.sentencepiece_model_file
    assert vocabularies.load(path) == trained
    monkeypatch.setenv("VIT22B_VOCABULARY", path)
    assert vocabularies.from_environment() == trained
    monkeypatch.setenv("VOCABULARY_FILE", path)
    assert vocabularies.load("$VOCABULARY_FILE") == trained
    monkeypatch.delenv("VIT22B_VOCABULARY")
    assert vocabularies.from_environment() == seqio.ByteVocabulary()


def test_a_vocabulary_that_changed_under_its_path_is_refused(caption_file, tmp_path):
    path = tmp_path / "same.model"
    vocabularies.train([caption_file], path, vocab_size=330)
    with pytest.raises(ValueError, match="has changed since"):
        vocabularies.train([caption_file], path, vocab_size=340)


def test_extra_ids_are_added_at_the_end(trained):
    more = vocabularies.load(trained.sentencepiece_model_file, extra_ids=100)
    assert more.vocab_size == 480
    assert vocabularies.load("bytes", extra_ids=5).vocab_size == 264


def test_a_vocabulary_with_gemmas_ids_is_accepted(tmp_path):
    path = tmp_path / "gemma_like.model"
    ids = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3}
    path.write_bytes(sentencepiece_model(**ids))
    vocabulary = vocabularies.load(path)
    assert vocabulary.eos_id == 1
    assert vocabulary.unk_id == 3


def test_a_vocabulary_with_other_ids_is_refused(tmp_path):
    path = tmp_path / "llama_like.model"
    path.write_bytes(sentencepiece_model(unk_id=0, bos_id=1, eos_id=2, pad_id=-1))
    with pytest.raises(ValueError, match="pad id -1 and end-of-text id 2"):
        vocabularies.load(path)


def test_files_that_are_no_vocabulary_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.model is not a file"):
        vocabularies.load(tmp_path / "absent.model")
    (tmp_path / "empty.model").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty\.model is empty"):
        vocabularies.load(tmp_path / "empty.model")
    (tmp_path / "text.model").write_text("hello, I am not a model")
    with pytest.raises(ValueError, match=r"text\.model is not a SentencePiece"):
        vocabularies.load(tmp_path / "text.model")


def test_a_size_beyond_the_texts_names_the_largest_possible(caption_file, tmp_path):
    path = tmp_path / "a.model"
    with pytest.raises(ValueError, match=r"texts: they support at most (\d+)") as e:
        vocabularies.train([caption_file], path, vocab_size=32_000)
    assert not path.exists()
    most = int(e.value.args[0].split("at most ")[1].split(".")[0])
    vocabulary = vocabularies.train([caption_file], path, vocab_size=most)
    assert vocabulary.vocab_size == most


def test_a_size_below_the_characters_names_the_smallest_possible(
    caption_file, tmp_path
):
    path = tmp_path / "a.model"
    with pytest.raises(ValueError, match=r"need at least (\d+)") as e:
        vocabularies.train([caption_file], path, vocab_size=100)
    least = int(e.value.args[0].split("at least ")[1].rstrip("."))
    assert (
        vocabularies.train([caption_file], path, vocab_size=least).vocab_size == least
    )


def test_texts_are_read_from_every_format(tmp_path):
    scenes.write_scenes(tmp_path / "s", sizes={"train": 30})
    paths = scenes.scene_paths(tmp_path / "s", "train")
    (tmp_path / "a.jsonl").write_text('{"file_name": "1.png", "captions": ["zebra"]}\n')
    (tmp_path / "a.csv").write_text("file_name,caption\n1.png,giraffe\n")
    (tmp_path / "a.txt").write_text("1.png\telephant\na line without a tab\n")
    files = [paths.captions, paths.questions, paths.answers]
    files += [tmp_path / f"a.{suffix}" for suffix in ("jsonl", "csv", "txt")]
    texts = list(vocabularies.read_texts(files))
    assert len(texts) == 30 * 5 + 30 * 3 * 2 + 4
    assert texts[-4:] == ["zebra", "giraffe", "elephant", "a line without a tab"]
    assert {"yes", "no", "2"} & set(texts)


def test_files_without_texts_are_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"annotations": [{"bbox": [1, 2, 3, 4]}]}))
    with pytest.raises(ValueError, match="neither of COCO captions nor of VQAv2.*bbox"):
        vocabularies.train([path], tmp_path / "a.model", vocab_size=300)
    path.write_text(json.dumps({"annotations": [{"caption": "  "}]}))
    with pytest.raises(ValueError, match="no text to train"):
        vocabularies.train([path], tmp_path / "a.model", vocab_size=300)


def test_captions_that_are_no_texts_are_left_out_where_that_is_asked_for(
    tmp_path, capsys, caplog
):
    captions = [{"caption": caption} for caption in ("a dog", 7, None, "a cat")]
    path, made = tmp_path / "a.json", tmp_path / "a.model"
    path.write_text(json.dumps({"annotations": captions}))
    command = ["vocab", "--out", str(made), "--vocab_size", "280", str(path)]
    assert cli.main([*command, "--on_bad_record=error"]) == 1
    shown = capsys.readouterr().err
    assert r"annotations[1]: field 'caption' has a wrong type (int) in" in shown
    assert "add --on_bad_record=skip" in shown and not made.exists()
    assert cli.main([*command, "--on_bad_record=skip"]) == 0
    assert made.exists()
    assert "skipped 2 x malformed entry (annotations[1]: " in caplog.text


# --- Control tokens and T5's extra ids ---


@pytest.mark.parametrize("text", ["</s>", "<bos> a", "<pad>", "<unk>", "<extra_id_0>"])
def test_what_looks_like_a_control_token_is_text(trained, text):
    ids = trained.encode(text)
    assert len(ids) > 2 and min(ids) > 2
    assert trained.decode(ids) == text


def test_extra_ids_are_single_tokens_where_they_are_asked_for(trained, monkeypatch):
    path = trained.sentencepiece_model_file
    monkeypatch.setenv("VIT22B_VOCABULARY", path)
    assert vocabularies.from_environment() == trained
    monkeypatch.setenv("VIT22B_EXTRA_IDS", "100")
    extended = vocabularies.from_environment()
    assert extended == vocabularies.load(path, extra_ids=100)
    assert extended.vocab_size == 480
    text = "a <extra_id_0> square <extra_id_99>"
    ids = extended.encode(text)
    assert [n for n in ids if n >= 380] == [479, 380] and len(ids) == 4
    assert extended.decode(ids) == text
    monkeypatch.setenv("VIT22B_EXTRA_IDS", "-1")
    with pytest.raises(UserError, match="VIT22B_EXTRA_IDS is '-1'; it must be a whole"):
        vocabularies.from_environment()


def test_extra_ids_in_the_vocabulary_file_are_used(tmp_path):
    special = dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    symbols = ["<extra_id_0>", "<extra_id_1>"]
    content = sentencepiece_model(**special, user_defined_symbols=symbols)
    (tmp_path / "own.model").write_bytes(content)
    vocabulary = vocabularies.load(tmp_path / "own.model")
    ids = vocabulary.encode("a <extra_id_1> b")
    assert vocabulary.tokenizer.piece_to_id("<extra_id_1>") in ids


# --- The vocabulary of a run ---


def model_with(vocabulary, rows):
    text = tiny_models.text_config(vocab_size=rows)
    module = encoder_decoder.ImageTextModule(None, text)
    return multimodal.ImageTextModel(module, vocabulary, vocabulary)


def test_a_run_says_which_vocabulary_it_has(trained, capsys, monkeypatch):
    monkeypatch.delenv("VIT22B_VOCABULARY", raising=False)
    identity.show_vocabulary(model_with(vocabularies.load(), 300))
    said = capsys.readouterr().out
    assert said.startswith("vocabulary: bytes, 259 tokens; the table has 300 rows")
    identity.show_vocabulary(model_with(trained, 380))
    assert f"vocabulary: {trained.sentencepiece_model_file}, 380 tokens\n" in (
        capsys.readouterr().out
    )
    identity.show_vocabulary(object())  # a model without texts
    assert not capsys.readouterr().out


def test_bytes_are_refused_for_a_table_of_pieces_unless_they_are_asked_for(
    monkeypatch, trained
):
    monkeypatch.delenv("VIT22B_VOCABULARY", raising=False)
    model = model_with(vocabularies.from_environment(), 8064)
    with pytest.raises(UserError, match="has 8064 rows, for a SentencePiece .*bytes"):
        identity.vocabulary_in_use(model)
    identity.vocabulary_in_use(model_with(trained, 8064))
    monkeypatch.setenv("VIT22B_VOCABULARY", "bytes")
    assert "bytes, 259" in identity.vocabulary_in_use(model)
