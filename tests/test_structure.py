"""What may import what, and what the docs/tree.md names."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted((ROOT / "sigjax").rglob("*.py"))

# Who may know whom within the package; errors may be known by all.
MAY_IMPORT = {
    "errors": set(), "trees": set(), "losses": {"ring"}, "ring": set(),
    "metrics": set(), "config": set(), "fetch": set(),
    "data.tokenizer": {"fetch"},
    "models": {"fetch", "models", "trees"},
    "data": {"data"},
    "optim": {"trees"}, "sharding": {"trees"},
    "hosts": {"sharding"}, "lock": {"hosts"}, "manifest": set(),
    "saving": {"hosts", "manifest"},
    "checkpoint": {"hosts", "manifest", "models", "saving", "trees"},
    "state": {"sharding", "trees"},
    "step": {"losses", "sharding", "state", "trees"},
    "build": {"models", "losses", "optim", "sharding", "state", "step"},
    "evaluators": {"evaluators", "data", "sharding"},
    "train": {"build", "checkpoint", "config", "data", "evaluators", "hosts",
              "lock", "metrics", "saving", "sharding", "state", "step"},
}


def imports(path):
  """Yields the sigjax modules that a file imports, as "data.sources"."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module and (
        node.module.split(".")[0] == "sigjax"):
      inner = node.module.split(".")[1:]
      for alias in node.names:
        yield ".".join([*inner, alias.name])
    elif isinstance(node, ast.Import):
      for alias in node.names:
        if alias.name.startswith("sigjax."):
          yield alias.name.removeprefix("sigjax.")


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_imports(path):
  name = ".".join(path.relative_to(ROOT / "sigjax").with_suffix("").parts)
  if name == "__init__":
    assert not list(imports(path))
    return
  allowed = MAY_IMPORT.get(name, MAY_IMPORT.get(name.split(".")[0]))
  assert allowed is not None, f"{name} has no row in MAY_IMPORT"
  for module in imports(path):
    if module != "errors":
      assert {module, module.split(".")[0]} & allowed, f"{name}: {module}"


@pytest.mark.parametrize("path", sorted(
    p for d in ("sigjax", "tools", "configs") for p in (ROOT / d).rglob("*.py")),
                         ids=lambda p: p.stem)
def test_size(path):
  """Short enough to be read."""
  text = path.read_text()
  assert text.count("\n") <= 320
  assert not [line for line in text.splitlines() if len(line) > 80
              and "://" not in line]
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.FunctionDef) and node.name != "main":
      assert node.end_lineno - node.lineno < 70, node.name


def test_the_tree_names_every_file():
  named = re.findall(r"^\s+(\w+\.py)\s", (ROOT / "docs/tree.md").read_text(), re.M)
  for folder in ("sigjax", "tools", "configs"):
    for path in (ROOT / folder).rglob("*.py"):
      if path.name != "__init__.py":
        assert path.name in named, f"docs/tree.md lacks {path.name}"
  for name in named:
    assert list(ROOT.rglob(name)), f"docs/tree.md names {name}"
