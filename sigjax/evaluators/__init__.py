"""Evaluations by name. Each is given an `embed` function, never a model."""

from sigjax import errors
from sigjax.evaluators import picture, retrieval, zeroshot

EVALUATORS = dict(
  retrieval=retrieval.Retrieval,
  zeroshot=zeroshot.ZeroShot,
  picture=picture.Picture,
)


def make(what, path, tokenizer, *, type=None, **options):
  """Builds the evaluator of one section of config.evals.

  Args:
    what: the section's name in errors.
    path: where a picture goes.
    tokenizer: of the run.
    type: a name in EVALUATORS.
    **options: the evaluator's own arguments.

  Raises:
    UserError: an unknown type, or an argument that it does not take.
  """
  evaluator = errors.pick(EVALUATORS, type, f"{what}.type")
  extra = {"path": path} if evaluator is picture.Picture else {}
  return errors.call(evaluator, options, what, tokenizer, **extra)
