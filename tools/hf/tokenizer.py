"""Writes SentencePiece models as tokenizer.json of Hugging Face's tokenizers.

Both kinds of SentencePiece are handled: unigram (SigLIP) and BPE (SigLIP 2,
Gemma). The ids are equal, except for:

- a run of one repeated part ("-----") that can be cut into pieces in several
  ways of equal score: float32 and float64 may choose differently;
- rare sequences of combining marks, and letters whose lower case is newer than
  Python's Unicode or the tokenizers package's;
- "<0x41>" or "</s>" written out in a text, if the model is unigram with bytes
  for unknown characters and "<" is unknown.

check() compares all pieces of the vocabulary before anything is written.
"""

import base64
from collections.abc import Callable
import json
import math
import os
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from sigjax import errors
from sigjax.data.example import tokenizer as tokenizer_lib
from tools.hf import config

# SentencePieceProto.Type and TrainerSpec.ModelType.
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)
_UNIGRAM, _BPE = 1, 2

Proto = Any  # a ModelProto; its class is made at run time
Path = str | os.PathLike[str]

SPACE = "▁"  # stands for a space in pieces
TEXTS = [
  "",
  " ",
  "A photo of a cat.",
  "  two  spaces ",
  "line\nbreak\ttab",
  "ΟΔΟΣ",
  "İstanbul",
  "Straße",
  "½ ﬁne ™",
  "e\u0301",
  "\u1100\u1161\u11a8",
  "ｶﾞ",
  "A～B",
  "猫の写真",
  "👩‍👩‍👧 🏳️‍🌈",
  "a\u200bb\u00a0c\u3000d",
  "x" * 300,
]


def convert(path: Path, lower: bool, rows: int) -> dict[str, Any]:
  """Returns the dict of tokenizer.json.

  Args:
    path: a SentencePiece model whose end token is 1.
    lower: whether texts are lower-cased first.
    rows: V, the rows of the embedding table. Symbols that ordinary texts do not
      contain may be beyond it, as in the vocabulary of the i18n models.

  Raises:
    UserError: the model does something that tokenizers cannot do.
  """
  proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore
  proto.ParseFromString(tokenizer_lib.Tokenizer(path).model)
  _refuse(proto, path, rows)
  spec = proto.normalizer_spec
  end = proto.pieces[tokenizer_lib.EOS].piece
  sequence = [
    {"Sequence": {"id": "A", "type_id": 0}},
    {"SpecialToken": {"id": end, "type_id": 0}},
  ]
  return dict(
    version="1.0",
    truncation=None,
    padding=None,
    added_tokens=[
      dict(
        id=i,
        content=p.piece,
        single_word=False,
        lstrip=False,
        rstrip=False,
        normalized=p.type == _USER,
        special=p.type != _USER,
      )
      for i, p in enumerate(proto.pieces)
      if p.type in (_UNKNOWN, _CONTROL)
      or (
        p.type == _USER
        and proto.trainer_spec.model_type == _BPE
        # A symbol with capitals is never found in a lower-case text, but
        # tokenizers would lower-case the symbol, too.
        and (p.piece == p.piece.lower() or not lower)
      )
    ],
    normalizer=dict(
      type="Sequence",
      normalizers=(_normalizers(spec, lower) + _disguises(proto)),
    ),
    pre_tokenizer=None,
    post_processor=dict(
      type="TemplateProcessing",
      single=sequence,
      pair=sequence
      + [
        {"Sequence": {"id": "B", "type_id": 0}},
        {"SpecialToken": {"id": end, "type_id": 0}},
      ],
      special_tokens={end: dict(id=end, ids=[tokenizer_lib.EOS], tokens=[end])},
    ),
    decoder=dict(
      type="Sequence",
      decoders=[
        dict(type="Replace", pattern=dict(String=SPACE), content=" "),
        dict(type="ByteFallback"),
        dict(type="Fuse"),
        *(
          [dict(type="Strip", content=" ", start=1, stop=0)]
          if spec.add_dummy_prefix
          else []
        ),
      ],
    ),
    model=_KINDS[proto.trainer_spec.model_type](proto),
  )


def _refuse(proto: Proto, path: Path, rows: int) -> None:
  """Raises UserError if the model does something tokenizers cannot do."""
  spec, trainer = proto.normalizer_spec, proto.trainer_spec
  is_bpe = trainer.model_type == _BPE
  user = [p.piece for p in proto.pieces if p.type == _USER]
  unused = any(p.type == _UNUSED for p in proto.pieces)
  needed = 1 + max(
    i for i, p in enumerate(proto.pieces) if p.type in (_NORMAL, _BYTE)
  )
  for what, is_so in [
    ("is neither unigram nor BPE", trainer.model_type not in _KINDS),
    ("puts spaces behind words", trainer.treat_whitespace_as_suffix),
    ("keeps spaces as they are", not spec.escape_whitespaces),
    ("has pieces that are not used", unused),
    (
      f"has symbols of its own ({', '.join(user[:3])}) and normalises texts",
      is_bpe
      and user
      and (
        spec.precompiled_charsmap
        or spec.add_dummy_prefix
        or spec.remove_extra_whitespaces
      ),
    ),
  ]:
    if is_so:
      raise errors.UserError(
        f"SentencePiece model {path} {what}, which tokenizer.json cannot "
        "express"
      )
  if needed > rows:
    raise errors.UserError(
      f"SentencePiece model {path} has {needed} pieces, but "
      f"model.text.vocab_size is {rows}"
    )


def _replace(content: str, **pattern: str) -> dict[str, Any]:
  """Returns a normalizer that replaces a pattern by `content`."""
  return dict(type="Replace", pattern=pattern, content=content)


def _normalizers(spec: Any, lower: bool) -> list[dict[str, Any]]:
  """Returns what SentencePiece does to a text before it looks for pieces."""
  steps: list[dict[str, Any]] = []
  if lower:
    # Python lower-cases a sigma at the end of a word to ς, tokenizers does not.
    steps += [
      _replace(
        "ς",
        Regex=r"(?<=\p{Cased}\p{Case_Ignorable}*)Σ"
        r"(?!\p{Case_Ignorable}*\p{Cased})",
      ),
      dict(type="Lowercase"),
    ]
  if spec.precompiled_charsmap:
    if "nfkc" in spec.name:
      # Precompiled does not compose sequences of more than five bytes, such as
      # Hangul letters, so NFKC goes first. Only "～" differs in SentencePiece's
      # NFKC. A private character takes its place meanwhile.
      steps += [
        _replace("\ue000", String="～"),
        dict(type="NFKC"),
        _replace("～", String="\ue000"),
      ]
    steps.append(
      dict(
        type="Precompiled",
        precompiled_charsmap=base64.b64encode(
          spec.precompiled_charsmap
        ).decode(),
      )
    )
  if spec.remove_extra_whitespaces:
    steps += [_replace("", Regex=r"\A +|[ ▁]+\z"), _replace(" ", Regex=" +")]
  if spec.add_dummy_prefix:
    # A Metaspace pre-tokenizer would add none before a "▁".
    steps.append(dict(type="Prepend", prepend=" "))
  return steps + [_replace(SPACE, String=" ")]


def _disguises(proto: Proto) -> list[dict[str, Any]]:
  """Returns normalizers for a "</s>" that is written out in a text.

  It must not become the end token. If all its characters are pieces, _unigram
  takes care of that. If not, the first unknown character is replaced by another
  unknown one: the text is no longer "</s>", but its ids are the same.
  """
  if proto.trainer_spec.model_type != _UNIGRAM or (
    proto.trainer_spec.byte_fallback
  ):
    return []
  pieces = {p.piece for p in proto.pieces}
  steps = []
  for p in proto.pieces:
    unknown = [c for c in p.piece if c not in pieces]
    if p.type in (_CONTROL, _UNKNOWN) and unknown:
      steps.append(
        _replace(p.piece.replace(unknown[0], "\ue001"), String=p.piece)
      )
  return steps


def _unigram(proto: Proto) -> dict[str, Any]:
  """Returns the model that cuts a text into its most probable pieces."""
  normal = {p.piece: p.score for p in proto.pieces if p.type == _NORMAL}
  lowest = min(normal.values())
  letters = {c for piece in normal for c in piece}
  if not letters <= set(normal):
    raise errors.UserError(
      "the SentencePiece model has pieces with characters that are no "
      f"pieces, such as {min(letters - set(normal))!r}: tokenizer.json "
      "cannot express its penalty for unknown characters"
    )
  # Here "</s>" is a piece like all others, with a score so low that its
  # characters are always better. Unknown characters get that score, too. No
  # piece contains one, so this changes nothing.
  never = 100 * (lowest - 10)

  def score(p: Any) -> float:
    if p.type == _USER:  # better than any pieces that it could be cut into
      return len(p.piece.encode()) * max(normal.values()) - 0.1
    return p.score if p.type == _NORMAL else never

  return dict(
    type="Unigram",
    byte_fallback=proto.trainer_spec.byte_fallback,
    unk_id=_unknown(proto),
    vocab=[[p.piece, score(p)] for p in proto.pieces],
  )


def _bpe(proto: Proto) -> dict[str, Any]:
  """Returns the model that merges the pair of the highest score, repeatedly."""
  normal = {p.piece: p.score for p in proto.pieces if p.type == _NORMAL}
  merges = []
  for piece, score in normal.items():
    pairs = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
    merges += [
      (-score, pair)
      for pair in pairs
      if pair[0] in normal and pair[1] in normal
    ]
  merges.sort(key=lambda merge: merge[0])
  return dict(
    type="BPE",
    dropout=None,
    continuing_subword_prefix=None,
    end_of_word_suffix=None,
    fuse_unk=True,
    ignore_merges=False,
    byte_fallback=proto.trainer_spec.byte_fallback,
    unk_token=proto.pieces[_unknown(proto)].piece,
    vocab={p.piece: i for i, p in enumerate(proto.pieces)},
    merges=[list(pair) for _, pair in merges],
  )


def _unknown(proto: Proto) -> int:
  """Returns the id of the unknown token."""
  return next(i for i, p in enumerate(proto.pieces) if p.type == _UNKNOWN)


_KINDS: dict[int, Callable[[Proto], dict[str, Any]]] = {
  _UNIGRAM: _unigram,
  _BPE: _bpe,
}


def files(
  path: Path, lower: bool, rows: int, length: int, pad: int
) -> dict[str, dict[str, Any]]:
  """Returns {file name: dict} of the files that AutoTokenizer reads.

  Args:
    path: a SentencePiece model whose end token is 1.
    lower: whether texts are lower-cased first.
    rows: V, the rows of the embedding table.
    length: L, the number of tokens.
    pad: the id that pads texts.

  Raises:
    UserError: the model cannot be converted, or the ids would not be those of
      our Tokenizer.
  """
  tokenizer = convert(path, lower, rows)
  check(tokenizer, path, lower)
  special = {
    token["id"]: token["content"]
    for token in tokenizer["added_tokens"]
    if token["special"]
  }
  if pad not in special:
    raise errors.UserError(
      f"pp_text pads with {pad}, which is a piece of text in {path}; "
      f"choose from: {', '.join(map(str, sorted(special)))}"
    )
  model = tokenizer["model"]
  names = dict(
    eos_token=special[tokenizer_lib.EOS],
    pad_token=special[pad],
    unk_token=(
      model["vocab"][model["unk_id"]][0]
      if "unk_id" in model
      else model["unk_token"]
    ),
  )
  return {
    "tokenizer.json": tokenizer,
    "tokenizer_config.json": dict(
      names,
      tokenizer_class="PreTrainedTokenizerFast",
      model_max_length=length,
      padding_side="right",
      truncation_side="right",
      clean_up_tokenization_spaces=False,
      # No attention_mask: the text tower also sees the padding.
      model_input_names=["input_ids"],
      # A "</s>" in a text is read as characters, as by SentencePiece.
      split_special_tokens=True,
    ),
    "special_tokens_map.json": names,
  }


def check(tokenizer: dict[str, Any], path: Path, lower: bool) -> None:
  """Compares a tokenizer.json with SentencePiece on TEXTS and all pieces.

  Args:
    tokenizer: the dict of tokenizer.json.
    path: the SentencePiece model.
    lower: whether texts are lower-cased first.

  Raises:
    UserError: a text has other ids. The message names the text.
  """
  fast = config.need("tokenizers").Tokenizer.from_str(json.dumps(tokenizer))
  fast.encode_special_tokens = True
  model = tokenizer_lib.Tokenizer(path).model
  slow = sentencepiece.SentencePieceProcessor(model_proto=model)
  pieces = [
    slow.id_to_piece(i).replace(SPACE, " ")
    for i in range(len(slow))
    if not (slow.is_control(i) or slow.is_unknown(i) or slow.is_byte(i))
  ]
  price = lambda ids: sum(map(slow.get_score, ids))
  texts = TEXTS + ["".join(pieces[i : i + 8]) for i in range(0, len(pieces), 8)]
  for text in texts:
    want = slow.encode(text.lower() if lower else text)
    got = fast.encode(text, add_special_tokens=False).ids
    tie = sorted(want) == sorted(got) or (
      tokenizer["model"]["type"] == "Unigram"
      and math.isclose(price(want), price(got), rel_tol=1e-5)
    )
    if not tie:
      raise errors.UserError(
        f"SentencePiece model {path} gives {want[:20]} for {text[:60]!r}, "
        f"but tokenizer.json would give {got[:20]}"
      )
