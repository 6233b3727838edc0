"""Names and tables, on trees small enough to write the answer down."""

import numpy as np
import pytest

from sigjax import errors, trees

TREE = {
  "img": {"a": {"kernel": np.ones((2, 3)), "bias": np.ones(3)}},
  "t": np.ones(1),
}


def test_flatten_and_back():
  flat = trees.flatten(TREE)
  assert list(flat) == ["img/a/bias", "img/a/kernel", "t"]
  back = trees.unflatten(flat)
  assert back.keys() == TREE.keys()
  assert back["img"]["a"]["kernel"] is TREE["img"]["a"]["kernel"]


def test_first_match_takes_the_first_and_the_whole_name():
  table = (("img/.*", 1), (".*/kernel", 2), ("t", 3), (".*", 4))
  tree = {**TREE, "txt": {"kernel": np.ones(1), "t": np.ones(1)}}
  found = trees.flatten(trees.first_match(table, tree, "table"))
  assert found == {
    "img/a/bias": 1,
    "img/a/kernel": 1,
    "t": 3,
    "txt/kernel": 2,
    "txt/t": 4,
  }


def test_first_match_keeps_none_and_false():
  found = trees.first_match(((".*", False),), TREE, "table")
  assert found["t"] is False


def test_every_parameter_has_to_be_matched():
  with pytest.raises(errors.UserError, match="table has no row for 2 param"):
    trees.first_match((("t", 1),), TREE, "table")


def test_every_row_has_to_match_something():
  with pytest.raises(errors.UserError) as e:
    trees.first_match((("img/a/kernal", 1), (".*", 2)), TREE, "table")
  assert 'the row "img/a/kernal" matches no' in str(e.value)
  assert 'did you mean "img/a/kernel"' in str(e.value)


def test_difference():
  assert not trees.difference(TREE, TREE)
  got = {
    "img": {"a": {"kernels": np.ones((2, 3)), "bias": np.ones(4)}},
    "t": np.ones(1),
  }
  assert trees.difference(TREE, got) == [
    "shape of img/a/bias is (4,), not (3,)",
    'missing img/a/kernel (2, 3) (did you mean "img/a/kernels"?)',
    "left over img/a/kernels (2, 3)",
  ]
