"""Tokenizers from a file or the Hub, or trained on captions. Reading one runs no code."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer as Encoder
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

PAD_TOKENS = ("[PAD]", "<pad>")
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


class Tokenizer:
    """Captions to token ids of one fixed length. Picklable, so that data workers may hold it."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._pad_token, self.pad_id = _padding(encoder)
        self.vocab_size: int = encoder.get_vocab_size()
        encoder.no_padding()
        encoder.no_truncation()
        self._special = len(encoder.encode("").ids)
        if self._special == 0:
            raise ValueError(
                "the tokenizer adds no start token: its tokenizer.json needs a post-processor "
                "that adds one ([CLS] ... [SEP])"
            )

    def __call__(self, texts: Sequence[str], max_length: int) -> tuple[Tensor, Tensor]:
        """Encode B texts as ids int64 (B, max_length) and mask bool, True on real tokens.

        Longer texts are cut, keeping the special tokens.
        """
        if max_length < self._special:
            raise ValueError(
                f"max_length={max_length}: must be at least {self._special}, the special tokens"
            )
        encoder = self._encoder
        encoder.enable_truncation(max_length)
        encoder.enable_padding(pad_id=self.pad_id, pad_token=self._pad_token, length=max_length)
        rows = encoder.encode_batch(list(texts))
        ids = torch.tensor([row.ids for row in rows], dtype=torch.int64)
        mask = torch.tensor([row.attention_mask for row in rows], dtype=torch.bool)
        return ids.view(-1, max_length), mask.view(-1, max_length)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of one row of ids, without special tokens."""
        return self._encoder.decode(list(ids))


def _padding(encoder: Encoder) -> tuple[str, int]:
    for token in PAD_TOKENS:
        token_id = encoder.token_to_id(token)
        if token_id is not None:
            return token, token_id
    raise ValueError(f"the tokenizer has no padding token: it needs one of {PAD_TOKENS}")


def load_tokenizer(path_or_name: str | os.PathLike[str]) -> Tokenizer:
    """Load a `tokenizer.json`, a folder that holds one, or that of a model on the Hugging Face Hub.

    Only this one file is read, never code. Raises ValueError where there is none.
    """
    path = Path(path_or_name)
    if path.is_dir():
        path = path / "tokenizer.json"
    try:
        if path.is_file():
            encoder = Encoder.from_file(str(path))
        elif path.is_absolute() or path.suffix == ".json":
            raise FileNotFoundError("no such file")
        else:
            encoder = Encoder.from_pretrained(str(path_or_name))
    except Exception as error:  # the library raises bare Exception, for files and the Hub alike
        raise ValueError(
            f"no tokenizer at {str(path_or_name)!r} ({error}): give a tokenizer.json, a folder "
            "holding one, or the name of a model on the Hugging Face Hub; a run without text "
            "targets needs none (model.text: null)"
        ) from error
    return Tokenizer(encoder)


def train_wordpiece(
    captions: Iterable[str], vocab_size: int, path: str | os.PathLike[str]
) -> Tokenizer:
    """Train a lower-casing WordPiece vocabulary on `captions`, write it to `path`, return it.

    The result is a function of the captions alone (see `_train`). Raises ValueError where
    `vocab_size` does not even hold their characters.
    """
    encoder = _bert_encoder(models.WordPiece(_train(list(captions), vocab_size), unk_token="[UNK]"))
    encoder.add_special_tokens(list(SPECIAL_TOKENS))
    encoder.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(token, encoder.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    encoder.save(str(partial))
    partial.replace(path)
    return Tokenizer(encoder)


def _bert_encoder(model: models.Model) -> Encoder:
    encoder = Encoder(model)
    encoder.normalizer = normalizers.BertNormalizer(lowercase=True)
    encoder.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    encoder.decoder = decoders.WordPiece()
    return encoder


def _train(captions: Sequence[str], vocab_size: int) -> dict[str, int]:
    """Vocabulary of `captions`.

    The trainer numbers characters in the order of a hash table, which differs from run to run and
    decides ties between merges. Given as special tokens they keep the order that we sort them in.
    """
    encoder = _bert_encoder(models.WordPiece(unk_token="[UNK]"))
    characters = [*SPECIAL_TOKENS, *_characters(encoder, captions)]
    if vocab_size < len(characters):
        raise ValueError(
            f"vocab_size={vocab_size}: must be at least {len(characters)}, the special tokens and "
            "the characters of the captions"
        )
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=characters, show_progress=False
    )
    encoder.train_from_iterator(captions, trainer)
    return encoder.get_vocab()


def _characters(encoder: Encoder, captions: Sequence[str]) -> list[str]:
    """Characters that begin a word, and those that continue one (marked ##), each kind sorted."""
    first: set[str] = set()
    rest: set[str] = set()
    for caption in captions:
        normal = encoder.normalizer.normalize_str(caption)
        for word, _ in encoder.pre_tokenizer.pre_tokenize_str(normal):
            first.add(word[0])
            rest.update(f"##{character}" for character in word[1:])
    return sorted(first) + sorted(rest)
