"""One line that names the thing and the remedy."""

import pytest

from sigjax import errors


def test_pick():
  assert errors.pick({"a": 1}, "a", "letter") == 1
  with pytest.raises(errors.UserError) as e:
    errors.pick({"cosine": 1, "linear": 2}, "cosin", "schedule")
  assert str(e.value) == (
    'schedule "cosin" is not known (did you mean '
    '"cosine"?); choose from: cosine, linear'
  )


def f(first, second, *, lr=1, wd):
  return first, second, lr, wd


def test_call_passes_everything():
  assert errors.call(f, {"wd": 3, "second": 2}, "section", 1) == (1, 2, 1, 3)
  assert errors.call(f, {"second": 2}, "s", 1, wd=4) == (1, 2, 1, 4)
  assert errors.call(lambda **kw: kw, {"x": 1}, "section") == {"x": 1}


@pytest.mark.parametrize(
  "section, message",
  [
    (
      {"lrr": 1},
      'section has no key "lrr" (did you mean "lr"?); it takes: second, lr, wd',
    ),
    ({"second": 2}, "section needs: wd"),
    ({"first": 1, "second": 2, "wd": 3}, 'section has no key "first"'),
  ],
)
def test_call_names_a_wrong_key(section, message):
  with pytest.raises(errors.UserError) as e:
    errors.call(f, section, "section", 1)
  assert message in str(e.value)


def test_a_type_error_inside_is_not_mistaken_for_a_wrong_key():
  def broken(x):
    return x + "a"

  with pytest.raises(TypeError):
    errors.call(broken, {"x": 1}, "section")
