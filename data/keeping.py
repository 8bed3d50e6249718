"""Tokenizers as files: saved as a folder that AutoTokenizer reads, and kept with a data set and with a run.

    DATA_SET/tokenizer/             beside train.bin and meta.json
    RUN/tokenizer/FINGERPRINT/      the first 16 digits of it: a run that changed its tokenizer has both

`save` writes the same files for every kind; `tokenizer_of(meta, folder)` in tokenizer.py reads them. A folder is whole
or absent. Characters need no files: they are in the meta. An encoding whose form as tokenizer.json would not be
exact is not kept; then its name alone says what it is.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from orchestrate.data import conversations
from orchestrate.data.stream import GPT2_TOKENS, DataSet, Meta, find_folder, read_meta
from orchestrate.data.tokenizer import (
    END_OF_TEXT,
    BpeTokenizer,
    CharTokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
    fingerprint_of,
    has_tokenizer,
    in_rust,
    is_gpt2,
    remapped,
    tokenizer_kind,
    tokenizer_of,
)

FOLDER = "tokenizer"
_TEMPLATE = "chat_template.jinja"


def save(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write what `AutoTokenizer.from_pretrained(folder)` reads, with the chat template where there is one.

    The files are tokenizer.json, tokenizer_config.json and what else the tokenizer came with. Other files in the folder
    stay. Raises ValueError for a tokenizer that has no exact form as tokenizer.json, OSError where it cannot write.
    """
    files = as_hugging_face(tokenizer).files
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in sorted(
        files.items(), key=lambda file: file[0] == "tokenizer.json"
    ):  # without it there is none
        temporary = folder / f"{name}.tmp"
        temporary.write_bytes(content)
        os.replace(temporary, folder / name)


def as_hugging_face(tokenizer: Tokenizer) -> HuggingFaceTokenizer:
    """The same tokenizer as a tokenizer.json, known to be exact by its fingerprint. Raises ValueError."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return HuggingFaceTokenizer.of({**tokenizer.files, "tokenizer_config.json": _plain_config(tokenizer.files)})
    if isinstance(tokenizer, CharTokenizer):
        described = _characters(tokenizer)
    elif isinstance(tokenizer, BpeTokenizer):
        described = _byte_pairs(tokenizer)
    else:
        raise ValueError("a vocabulary that was remapped has no form as a tokenizer.json")
    end = None if tokenizer.end_of_text is None else END_OF_TEXT
    config = {**_CONFIG, "bos_token": end, "eos_token": end}
    files = {
        "tokenizer.json": described.encode("utf-8"),
        "tokenizer_config.json": json.dumps(config, indent=1).encode(),
    }
    if tokenizer.control(conversations.START) is not None and tokenizer.control(conversations.END) is not None:
        files[_TEMPLATE] = conversations.TEMPLATE.encode("utf-8")
    made = HuggingFaceTokenizer.of(files)
    if made.fingerprint != tokenizer.fingerprint:
        raise ValueError(f"the encoding {tokenizer.kind} has no exact form as a tokenizer.json: some texts differ")
    return made


def for_conversations(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer with the control tokens and the template of conversations (conversations.py).

    Tokens that it lacks get the ids behind its last; all others stay. A chat template of its own is replaced, because
    the conversations are written by ours. Raises ValueError for a tokenizer that cannot be added to.
    """
    control = (conversations.START, conversations.END)
    missing = [name for name in control if tokenizer.control(name) is None]
    if isinstance(tokenizer, CharTokenizer):
        return CharTokenizer([*tokenizer.itos, *missing]) if missing else tokenizer
    files = dict(as_hugging_face(tokenizer).files)
    if missing:
        files["tokenizer.json"] = _with_control(files["tokenizer.json"], missing, tokenizer.vocab_size)
    template = conversations.TEMPLATE.encode("utf-8")
    if not missing and files.get(_TEMPLATE) == template:
        return tokenizer
    config = json.loads(files.get("tokenizer_config.json", b"{}"))
    if files.get(_TEMPLATE, template) != template or config.pop("chat_template", None) or "chat_template.json" in files:
        print("note: the tokenizer's own chat template is replaced by the one that the conversations are written in")
    files.pop("chat_template.json", None)
    files |= {_TEMPLATE: template, "tokenizer_config.json": json.dumps(config, indent=1).encode("utf-8")}
    made = HuggingFaceTokenizer.of(files)
    wanted = [tokenizer.vocab_size + i for i in range(len(missing))]
    if [made.control(name) for name in missing] != wanted or any(made.control(name) is None for name in control):
        raise ValueError(
            f"{' and '.join(missing)} cannot be added to the tokenizer: its ids leave no room behind the last"
        )
    return made


def _with_control(tokenizer_json: bytes, names: list[str], first: int) -> bytes:
    """A tokenizer.json with control tokens more, at ids from `first` on where its vocabulary names ids."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Inner

    described = json.loads(tokenizer_json)
    if isinstance(described["model"].get("vocab"), dict):  # there may be holes among its ids, which stay
        described["model"]["vocab"] |= {name: first + i for i, name in enumerate(names)}
    with in_rust("tokenizer.json"):
        inner = Inner.from_str(json.dumps(described))
        inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
        return inner.to_str().encode("utf-8")


# Text is never "cleaned up" after decoding: it is what was encoded.
_CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}


def _plain_config(files: dict[str, bytes]) -> bytes:
    """A tokenizer_config.json that names no code of the folder's own, which is not kept."""
    config = json.loads(files.get("tokenizer_config.json", b"{}"))
    if "auto_map" in config or "tokenizer_class" not in config:
        config = {name: value for name, value in config.items() if name != "auto_map"} | {
            "tokenizer_class": _CONFIG["tokenizer_class"]
        }
    elif "tokenizer_config.json" in files:
        return files["tokenizer_config.json"]
    return json.dumps(config, indent=1).encode("utf-8")


def _characters(tokenizer: CharTokenizer) -> str:
    """One token a character; another character is an error, as with us."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Inner

    inner = Inner(models.WordLevel(dict(tokenizer.stoi), unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    control = [text for text in tokenizer.itos if len(text) > 1]
    if control:
        inner.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in control])
    return inner.to_str()


def _byte_pairs(tokenizer: BpeTokenizer) -> str:
    """A tiktoken encoding by transformers' converter, its special tokens at their own ids."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Inner
    from transformers.convert_slow_tokenizer import TikTokenConverter

    encoding = tokenizer.encoding
    # A possessive `}+` means the same as `}` here, and to this library's regular expressions "repeated".
    converter: Any = TikTokenConverter(vocab_file="", pattern=encoding._pat_str.replace("}+", "}"))
    converter.load_tiktoken_bpe = lambda _: encoding._mergeable_ranks
    with in_rust(f"{tokenizer.kind}: its pattern"):
        described = json.loads(converter.converted().to_str())
    described["model"]["vocab"] |= encoding._special_tokens
    described["post_processor"] = None
    inner = Inner.from_str(json.dumps(described))
    inner.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in encoding._special_tokens])
    return inner.to_str()


# ---------------------------------------------------------------------------------------------- kept


def kept_with_data(folder: str | Path) -> Path:
    """Where a data set keeps the files of its tokenizer."""
    return Path(folder) / FOLDER


def kept_with_run(out_dir: str | Path, meta: Meta) -> Path:
    """Where a run keeps the files of the tokenizer that this meta names."""
    return Path(out_dir) / FOLDER / (meta.fingerprint[:16] or meta.tokenizer.replace(":", "_"))


def of_data(dataset: str) -> Tokenizer:
    """The tokenizer of a data set, by its name under data/ or its path. Raises ValueError."""
    folder = find_folder(dataset)
    return tokenizer_of(read_meta(folder), kept_with_data(folder))


def spoken(data: DataSet, vocabulary_map: Sequence[int]) -> Tokenizer:
    """The tokenizer of a data set's tokens, through the vocabulary map in force. Raises ValueError."""
    return remapped(_opened(data.meta, kept_with_data(data.folder)), vocabulary_map)


_opened = lru_cache(maxsize=1)(tokenizer_of)  # large vocabularies take seconds


def at_hand(data: DataSet) -> Tokenizer:
    """The tokenizer of a data set's files, from what lies beside them: nothing is downloaded. Raises ValueError."""
    kept = kept_with_data(data.folder)
    if (data.meta.tokenizer != "char" or not data.meta.itos) and not has_tokenizer(kept):
        raise ValueError(f"{kept}: no tokenizer is kept with the data set")
    return _opened(data.meta, kept)


def end_of_text_of(meta: Meta, folder: str | Path) -> int | None:
    """The id that ends a document, as the tokenizer that a meta names has it; None where the data cannot have it.

    GPT-2's is known without its vocabulary, which is not at hand everywhere. Raises ValueError as `tokenizer_of`.
    """
    plain = meta.tokenizer == "gpt2" and not has_tokenizer(folder)
    end = GPT2_TOKENS - 1 if plain else _opened(meta, folder).end_of_text
    return None if end is None or 0 < meta.tokens <= end else end


def check_kept(meta: Meta, folder: Path) -> None:
    """Raises ValueError where the files that are kept there are not those of the tokenizer that the meta names."""
    if meta.tokenizer == "char" or has_tokenizer(folder):
        tokenizer_of(meta, folder)


def named(meta: Meta) -> str:
    """The tokenizer that a meta names, for a person."""
    return f"{meta.tokenizer} (fingerprint {meta.fingerprint[:12]})" if meta.fingerprint else meta.tokenizer


def differs(meta: Meta, data_folder: Path, source: str, gpt2: bool) -> str:
    """How a model's tokenizer differs from that of a data set: what it is; nothing where it does not or is not known.

    Args:
        source: the model's folder, or the name of a release.
        gpt2: whether it is one of GPT-2's releases, whose tokenizer is known without files.
    """
    if gpt2 and has_tokenizer(kept := kept_with_data(data_folder)):
        return "" if is_gpt2(tokenizer_of(meta, kept)) else "gpt2"
    if gpt2 or not has_tokenizer(source):
        kind = "gpt2" if gpt2 else tokenizer_kind(source)
        return kind if kind and meta.tokenizer not in ("huggingface", kind) else ""
    try:
        theirs = HuggingFaceTokenizer(source)
    except ValueError as error:
        return f"one that cannot be read ({error})"
    ours = fingerprint_of(meta)
    same = ours == theirs.fingerprint if ours else is_gpt2(theirs)
    return "" if same else f"a tokenizer of {theirs.vocab_size} tokens (fingerprint {theirs.fingerprint[:12]})"


def keep(meta: Meta, data_folder: str | Path, out_dir: str | Path) -> None:
    """Copy a data set's tokenizer into a run folder, where the data set has its files. Raises OSError."""
    source, target = kept_with_data(data_folder), kept_with_run(out_dir, meta)
    if meta.tokenizer == "char" or target.exists() or not has_tokenizer(source):
        return
    temporary = target.with_name(f"{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    os.replace(temporary, target)
