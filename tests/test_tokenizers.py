"""Tokenizers: what each id means, what text can become, how they are told apart, kept and saved."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import tiktoken
from conftest import TEXT
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Inner
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from orchestrate.data.keeping import as_hugging_face, keep, kept_with_data, kept_with_run, save
from orchestrate.data.stream import Meta
from orchestrate.data.tokenizer import (
    PROBE,
    BpeTokenizer,
    CharTokenizer,
    HuggingFaceTokenizer,
    Pieces,
    RemappedTokenizer,
    tells_apart,
    tiktoken_tokenizer,
    tokenizer_of,
)

EOT = "<|endoftext|>"
# cl100k's pattern, whose possessive quantifiers another library reads otherwise.
PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"""
    r"""|\s*[\r\n]|\s+(?!\S)|\s"""
)


def byte_level(size: int = 400) -> Inner:
    """Byte pairs of the tests' text, over all 256 bytes, with one special token."""
    inner = Inner(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, special_tokens=[EOT], show_progress=False)
    inner.train_from_iterator([TEXT, "1234567 1234567"], trainer)
    return inner


def encoding(pattern: str = PATTERN, special: dict[str, int] | None = None) -> BpeTokenizer:
    """A tiktoken encoding with pairs for the tests' text; its special tokens leave holes, as cl100k's do."""
    ranks = {bytes([i]): i for i in range(256)}
    for pair in (b"to", b" b", b" be", b"12", b"123", b"no", b"not", b"es", b"ti", b"on", b"\n\n", b"  ", b"00"):
        ranks[pair] = len(ranks)
    special = special or {EOT: 270, "<|fim|>": 275}
    return BpeTokenizer(tiktoken.Encoding("pairs", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special))


def unigram() -> Inner:
    """A sentencepiece-like vocabulary that has its control tokens among its words, as T5's has."""
    pieces = [
        ("<unk>", 0.0),
        ("</s>", 0.0),
        ("▁", -3.0),
        ("▁to", -1.0),
        ("▁be", -1.0),
        *((c, -5.0) for c in "tobe</s>,.n"),
    ]
    pieces += [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    inner = Inner(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens([AddedToken("</s>", special=True), AddedToken("<unk>", special=True)])
    inner.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 1)])
    return inner


def saved(inner: Inner, folder, **config) -> HuggingFaceTokenizer:
    PreTrainedTokenizerFast(tokenizer_object=inner, **config).save_pretrained(folder)
    return HuggingFaceTokenizer(folder)


KINDS = {
    "char": lambda folder: CharTokenizer.of("".join(PROBE), several=True),
    "tiktoken": lambda folder: encoding(),
    "byte_level": lambda folder: saved(byte_level(), folder, eos_token=EOT),
    "unigram": lambda folder: saved(unigram(), folder, eos_token="</s>"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_text_comes_back_whole_and_in_pieces(kind, tmp_path):
    tokenizer = KINDS[kind](tmp_path / "hf")
    for text in (TEXT[:200], *PROBE):
        if kind == "unigram":  # these are its own names of a byte and of a space
            text = text.replace("<0x0A>", "").replace("▁", "")
        ids = tokenizer.encode_plain(text)
        assert tokenizer.decode(ids) == (text.removeprefix(" ") if kind == "unigram" else text)
        pieces = Pieces(tokenizer)
        shown = [pieces.push(i) for i in ids] + [pieces.end()]
        assert "".join(shown) == tokenizer.decode(ids)
        assert not any("\ufffd" in piece for piece in shown), "a character was torn"
        assert len(ids) < 3 or sum(map(bool, shown)) > len(text) / 12, "it is shown as it comes"
    assert min(ids) >= 0 and max(ids) < tokenizer.vocab_size


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_token_and_no_character_is_shown_as_such(kind, tmp_path):
    tokenizer = KINDS[kind](tmp_path / "hf")
    be = tokenizer.encode_plain("be")
    for wrong in (10**6, tokenizer.vocab_size, -1):
        ids = [*be, wrong, *be, wrong]
        assert tokenizer.decode(ids).split("\ufffd") == ["be", tokenizer.decode(ids)[3:-1], ""]
        pieces = Pieces(tokenizer)
        assert "".join([*(pieces.push(i) for i in ids), pieces.end()]) == tokenizer.decode(ids)
    if kind != "char":
        torn = tokenizer.encode_plain("👋")[:-1]
        pieces = Pieces(tokenizer)
        assert "".join(pieces.push(i) for i in torn).strip() == "" and "\ufffd" in pieces.end()
        stuck = torn[-1:] * 20  # bytes that begin nothing, without end
        assert "\ufffd" in "".join(pieces.push(i) for i in stuck)


@pytest.mark.parametrize("kind", KINDS)
def test_text_never_becomes_a_control_token(kind, tmp_path):
    """Named in a document it is text; in a prompt it is what it says."""
    tokenizer = KINDS[kind](tmp_path / "hf")
    name = "</s>" if kind == "unigram" else EOT
    assert tokenizer.end_of_text is not None
    ids = tokenizer.encode_plain(f"to be{name}{name} not {name}")
    assert tokenizer.end_of_text not in ids and tokenizer.decode(ids) == f"to be{name}{name} not {name}"
    assert tokenizer.decode([tokenizer.end_of_text]) == name
    if kind != "char":
        assert tokenizer.encode(f"be{name}").count(tokenizer.end_of_text) == (2 if kind == "unigram" else 1)


def test_the_name_of_a_control_token_is_cut_as_any_text(tmp_path):
    """Into the very tokens of a vocabulary that has no control tokens."""
    inner = byte_level()
    plain = Inner(models.BPE())
    plain.pre_tokenizer = inner.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    plain.train_from_iterator([f"a{EOT}b {EOT}"] * 9, trainer)
    expected = plain.encode(f"be{EOT}be {EOT}").ids
    plain.decoder = inner.decoder
    plain.add_special_tokens([EOT])
    tokenizer = saved(plain, tmp_path, eos_token=EOT)
    assert tokenizer.encode_plain(f"be{EOT}be {EOT}") == expected and len(expected) < 15


def test_pieces_look_back_at_a_few_tokens_only(tmp_path):
    tokenizer = KINDS["unigram"](tmp_path / "hf")
    ids, longest = tokenizer.encode_plain("to be, " * 50), []
    decode = tokenizer.decode
    tokenizer.decode = lambda ids: longest.append(len(ids)) or decode(ids)
    pieces = Pieces(tokenizer)
    assert "".join(map(pieces.push, ids)) + pieces.end() == decode(ids) and max(longest) <= 16


def test_a_text_that_can_only_be_a_control_token_is_refused(tmp_path):
    inner = Inner(models.WordLevel({"a": 0, "#": 1}, unk_token="#"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens([AddedToken("#", special=True)])
    assert saved(inner, tmp_path / "unk").encode_plain("a zzz") == [0, 1], "an unknown word is no control token"
    ends = saved(inner, tmp_path / "eos", eos_token="#")
    with pytest.raises(ValueError, match="encodes the text '#' as a control token"):
        ends.encode_plain("a #")


def test_added_words_that_are_not_special_stay_words(tmp_path):
    inner = byte_level()
    inner.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    tokenizer = saved(inner, tmp_path, eos_token=EOT)
    assert tokenizer.encode_plain("<think>") == [tokenizer.vocab_size - 1]
    assert tokenizer.decode([tokenizer.vocab_size - 1]) == "<think>"
    inner.add_tokens([AddedToken("né", special=False, normalized=False)])  # é is also how this vocabulary writes a byte
    tokenizer = saved(inner, tmp_path, eos_token=EOT)
    assert tokenizer.decode(tokenizer.encode_plain("né<think>")) == "né<think>"


def test_a_limit_of_length_in_the_file_cuts_no_document(tmp_path):
    inner = byte_level()
    inner.enable_truncation(5)
    inner.enable_padding(length=50)
    tokenizer = saved(inner, tmp_path)
    assert tokenizer.decode(tokenizer.encode_plain(TEXT)) == TEXT == tokenizer.decode(tokenizer.encode(TEXT))


# ---------------------------------------------------------------------------------------------- fingerprints


def test_what_tokenizes_alike_has_one_fingerprint(tmp_path):
    one = saved(byte_level(), tmp_path / "one")
    values = json.loads((tmp_path / "one" / "tokenizer.json").read_text())
    values["model"]["merges"] = [" ".join(pair) for pair in values["model"]["merges"]]  # as older files have them
    values["model"]["vocab"] = dict(reversed(values["model"]["vocab"].items()))
    values["truncation"] = {"max_length": 9, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "tokenizer.json").write_text(json.dumps(values, indent=5))
    assert HuggingFaceTokenizer(tmp_path / "two").fingerprint == one.fingerprint
    assert len(one.fingerprint) == 64


@pytest.mark.parametrize("change", ["meaning", "merges", "cutting", "size"])
def test_what_tokenizes_otherwise_has_another(change, tmp_path):
    inner, other = byte_level(), byte_level()
    values = json.loads(other.to_str())
    if change == "meaning":  # two words change places, neither of which the fixed text need have
        vocab = values["model"]["vocab"]
        vocab["z"], vocab["Z"] = vocab["Z"], vocab["z"]
    elif change == "merges":
        values["model"]["merges"] = values["model"]["merges"][::-1]
    elif change == "cutting":
        values["normalizer"] = {"type": "Lowercase"}
    else:
        values["model"]["vocab"]["zzzz"] = len(values["model"]["vocab"])
    changed = Inner.from_str(json.dumps(values))
    assert saved(inner, tmp_path / "a").fingerprint != saved(changed, tmp_path / "b").fingerprint


def test_the_fingerprint_of_characters_is_pinned():
    """It stands in meta.json and in checkpoints: another version must not find another one."""
    found = CharTokenizer("ab").fingerprint
    assert found == "65bf89634ad9d7e4867f478de3fada7e48fa617390f24b87afaf50b552f464e8"
    assert found != CharTokenizer("ba").fingerprint


def test_data_without_fingerprints_is_known_by_its_kind():
    """Data sets and checkpoints of earlier versions; of characters the meta has all that is needed."""
    old, new = Meta(), Meta(fingerprint="a" * 64)
    assert not tells_apart(old, new) and not tells_apart(new, old) and not tells_apart(old, old)
    assert tells_apart(new, Meta(fingerprint="b" * 64))
    assert tells_apart(old, Meta(tokenizer="huggingface", fingerprint="a" * 64))
    char = Meta(2, tokenizer="char", itos=("a", "b"))
    assert not tells_apart(char, replace(char, fingerprint=CharTokenizer("ab").fingerprint))
    assert tells_apart(char, replace(char, itos=("b", "a"))) and tells_apart(char, old)


# ---------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_what_is_saved(kind, tmp_path):
    tokenizer = KINDS[kind](tmp_path / "hf")
    save(tokenizer, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tmp"))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in (TEXT[:99], *PROBE):
        text = text.replace(EOT, "").replace("</s>", "")  # they read it as a token
        ids = theirs.encode(text, add_special_tokens=False)
        assert ids == tokenizer.encode_plain(text), text
        assert theirs.decode(ids) == tokenizer.decode(ids)
    assert theirs.eos_token_id == tokenizer.end_of_text
    again = HuggingFaceTokenizer(tmp_path / "out")
    assert again.fingerprint == tokenizer.fingerprint and again.end_of_text == tokenizer.end_of_text


def test_an_encoding_without_an_exact_form_is_not_saved(tmp_path):
    odd = encoding(pattern=r"[\s\S]{1,3}")
    assert as_hugging_face(odd).fingerprint == odd.fingerprint
    # $ is the end of a line to one library, and of the text to the other.
    odd = encoding(pattern=r"[^\n]{2}$|[\s\S]")
    with pytest.raises(ValueError, match="tiktoken:pairs has no exact form"):
        save(odd, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="tiktoken:pairs: its pattern"):  # another dialect of regular expressions
        save(encoding(pattern=r"(?s:.{1,3})"), tmp_path / "out")
    with pytest.raises(ValueError, match="remapped"):
        save(RemappedTokenizer(CharTokenizer("ab"), np.array([0, 0])), tmp_path / "out")


def test_a_chat_template_comes_along_and_code_does_not(tmp_path):
    saved(
        byte_level(),
        tmp_path / "hf",
        eos_token=EOT,
        chat_template="{% for m in messages %}[{{ m.content }}]{% endfor %}",
    )
    path = tmp_path / "hf" / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {
        "auto_map": {"AutoTokenizer": ["evil.Evil", None]},
        "tokenizer_class": "Evil",
    }
    path.write_text(json.dumps(config))
    (tmp_path / "hf" / "evil.py").write_text("raise SystemExit('it was run')")
    save(HuggingFaceTokenizer(tmp_path / "hf"), tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "[hi]"
    assert not (tmp_path / "out" / "evil.py").exists()


def test_older_files_are_read_through_transformers(tmp_path):
    """vocab.json and merges.txt, as GPT-2 was published."""
    inner = byte_level()
    inner.model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    old = HuggingFaceTokenizer(tmp_path)
    assert old.encode_plain(TEXT) == saved(inner, tmp_path / "new").encode_plain(TEXT)
    assert old.end_of_text == 0
    save(old, tmp_path / "out")
    assert HuggingFaceTokenizer(tmp_path / "out").fingerprint == old.fingerprint


@pytest.mark.parametrize(
    "name, content",
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"\xff"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b'{"model": 3}'),
        ("tokenizer_config.json", b"[1]"),
        ("tokenizer_config.json", b"[" * 100_000),
        ("special_tokens_map.json", b"nothing"),
    ],
)
def test_a_broken_folder_is_one_message(name, content, tmp_path):
    saved(byte_level(), tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="no tokenizer can be read from it") as refused:
        HuggingFaceTokenizer(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_meta_finds_its_tokenizer_where_it_is_kept(tmp_path):
    made = saved(byte_level(), tmp_path / "hf", eos_token=EOT)
    meta = Meta(400, "uint16", "huggingface", fingerprint=made.fingerprint)
    with pytest.raises(ValueError, match=r"there is no tokenizer.json\)$"):
        tokenizer_of(meta, kept_with_data(tmp_path / "data"))
    save(made, kept_with_data(tmp_path / "data"))
    keep(meta, tmp_path / "data", tmp_path / "run")
    (tmp_path / "data").rename(tmp_path / "gone")
    kept = kept_with_run(tmp_path / "run", meta)
    assert kept.name == made.fingerprint[:16] and [path.name for path in kept.parent.iterdir()] == [kept.name]
    assert tokenizer_of(meta, kept).encode(TEXT) == made.encode(TEXT)
    save(saved(byte_level(300), tmp_path / "other"), kept)
    with pytest.raises(ValueError, match="not the tokenizer that the tokens were made with"):
        tokenizer_of(meta, kept)


def test_an_encoding_is_read_from_its_kept_files(tmp_path, monkeypatch):
    """Without tiktoken's cache: what is kept with the data is the same tokenizer."""
    pairs = encoding()
    save(pairs, tmp_path)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: pytest.fail("a download was tried"))
    meta = Meta(None, "uint16", pairs.kind, fingerprint=pairs.fingerprint)
    kept = tokenizer_of(meta, tmp_path)
    assert kept.encode_plain(TEXT) == pairs.encode_plain(TEXT) and kept.kind == "tiktoken:pairs"


def test_names_of_encodings(monkeypatch):
    with pytest.raises(ValueError, match="no encoding 'cl100k'; there are .*cl100k_base"):
        tiktoken_tokenizer("cl100k")

    def fails(name):
        raise OSError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", fails)
    with pytest.raises(ValueError, match="vocabulary of cl100k_base cannot be had.*TIKTOKEN_CACHE_DIR"):
        tokenizer_of(Meta(tokenizer="tiktoken:cl100k_base"))


def test_a_remapped_prompt_beyond_the_map_is_refused():
    shrunk = RemappedTokenizer(CharTokenizer("abc"), np.array([0, 1]))
    assert shrunk.encode("ab") == [0, 1] and shrunk.encode_plain("") == []
    with pytest.raises(ValueError, match="token 2 is beyond the 2 entries"):
        shrunk.encode("abc")
