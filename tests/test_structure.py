"""What may import what, and the files that docs/tree.md names."""

import ast
from collections.abc import Iterator
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted((ROOT / "sigjax").rglob("*.py"))

# What each module, or each package, may import of ours beside `errors`. A
# package stands for all that is in it.
MAY_IMPORT = {
  "__init__": {"losses"},
  "errors": set(),
  "trees": set(),
  "ring": set(),
  "losses": {"negatives", "ring", "softmax"},
  "negatives": {"losses", "ring"},
  "softmax": {"losses", "ring"},
  "config": {"runtime.files"},
  "optim": {"trees"},
  "sharding": {"trees"},
  "models": {"models", "sharding", "trees"},
  "lora": {"trees"},
  "crossentropy": {"losses", "sharding"},
  "prototypes": {"losses", "sharding"},
  "terms": {"crossentropy", "models", "prototypes", "sharding", "terms"},
  "state": {"lora", "models", "sharding", "terms", "trees"},
  "step": {
    "host_feed",
    "losses",
    "models",
    "sharding",
    "state",
    "terms",
    "trees",
  },
  "decode": {"losses", "models", "trees"},
  "host_feed": {"sharding", "state", "step"},
  "init": {"lora", "models", "state", "terms", "trees"},
  "embed": {"models", "sharding", "terms"},
  "curate": {"losses", "models", "sharding", "state", "step"},
  "stage": {
    "build",
    "config",
    "curate",
    "data",
    "models",
    "sharding",
    "step",
  },
  "remat": {"build", "runtime.files"},
  "build": {
    "lora",
    "losses",
    "models",
    "optim",
    "remat",
    "sharding",
    "state",
    "step",
    "terms",
  },
  "runtime.files": {"runtime.bucket"},
  "runtime.bucket": set(),
  "runtime.program": {"runtime.hosts", "runtime.start"},
  "runtime.hosts": {"sharding"},
  "runtime": {"runtime"},
  "weights": {
    "weights",
    "trees",
    "runtime",
    "data.example.tokenizer",
    "models.vit",
  },
  "checkpoints": {"checkpoints", "lora", "runtime", "trees", "weights"},
  "data.faults": set(),
  "data.example.tokenizer": {"runtime.files"},
  "data.example.captions": {"data.faults"},
  "data.example": {"data.example", "data.faults"},
  "data.source": {"data.faults", "data.example"},
  "data.filter": {
    "data.source",
    "data.faults",
    "data.example",
    "data.shards",
  },
  "data.memory": {"data.source", "data.example.images"},
  "data.kinds": {"data"},
  "data.batches": {"data.batches", "data.source", "data.faults"},
  "data.formats": {
    "data.formats",
    "data.source",
    "data.faults",
    "data.shards",
    "data.example.captions",
    "runtime.files",
  },
  "data.shards": {"data.shards", "data.faults", "runtime.files"},
  "data.emoji": {
    "data.emoji",
    "data.source",
    "data.faults",
    "runtime.files",
  },
  "evaluators": {"evaluators", "data", "sharding"},
  "defaults": {
    "checkpoints",
    "curate",
    "data",
    "evaluators",
    "losses",
    "models",
    "optim",
    "sharding",
    "terms",
    "weights",
  },
  "train": {
    "checkpoints",
    "config",
    "curate",
    "data",
    "defaults",
    "embed",
    "evaluators",
    "init",
    "runtime",
    "sharding",
    "stage",
    "trees",
    "weights",
  },
}


def imports(path: pathlib.Path) -> Iterator[str]:
  """Yields the sigjax modules that a file imports, as "data.source"."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module:
      package, *inner = node.module.split(".")
      if package == "sigjax":
        for alias in node.names:
          name = ".".join([*inner, alias.name])
          place = ROOT / "sigjax" / name.replace(".", "/")
          is_module = place.is_dir() or place.with_suffix(".py").exists()
          yield name if is_module else ".".join(inner)
    elif isinstance(node, ast.Import):
      for alias in node.names:
        if alias.name.startswith("sigjax."):
          yield alias.name.removeprefix("sigjax.")


def prefixes(name: str) -> list[str]:
  """Returns "a.b.c", "a.b", "a"."""
  parts = name.split(".")
  return [".".join(parts[:i]) for i in range(len(parts), 0, -1)]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_layers(path):
  name = ".".join(path.relative_to(ROOT / "sigjax").with_suffix("").parts)
  name = name.removesuffix(".__init__")
  row = next((p for p in prefixes(name) if p in MAY_IMPORT), None)
  assert row or not list(imports(path)), f"{name} has no row in MAY_IMPORT"
  for module in imports(path):
    if row and module != "errors":
      assert set(prefixes(module)) & MAY_IMPORT[row], f"{name}: {module}"


def test_what_a_run_over_tfds_loads(shapes_dir):
  """At most 40 modules with code, and no other format than its own."""
  code = (
    "import sys; import sigjax.train; from sigjax.data import kinds\n"
    f"kinds.open_source('tfds', name='shapes', data_dir={str(shapes_dir)!r},"
    " split='train')\n"
    "print(*(m for m in sys.modules if m.startswith('sigjax')))"
  )
  found = subprocess.run(
    [sys.executable, "-c", code],
    cwd=ROOT,
    check=True,
    capture_output=True,
    text=True,
  ).stdout.split()
  names = [name.replace(".", "/") for name in found if name != "sigjax"]
  paths = [ROOT / f"{name}.py" for name in names]
  paths += [ROOT / name / "__init__.py" for name in ("sigjax", *names)]
  loaded = [p for p in paths if p.exists() and p.read_text().strip()]
  assert len(loaded) <= 40, sorted(found)
  formats = [name for name in found if "formats." in name]
  assert formats == ["sigjax.data.formats.tfds"]


def test_the_tree_names_every_file():
  tree = (ROOT / "docs/tree.md").read_text()
  named = re.findall(r"^\s+(\w+\.py)\s", tree, re.M)
  files = lambda *folders: {
    path.name for folder in folders for path in (ROOT / folder).rglob("*.py")
  }
  code = files("sigjax", "tools", "configs", "studies")
  lacking = code - {"__init__.py"} - set(named)
  assert not lacking, f"docs/tree.md lacks {lacking}"
  gone = set(named) - code - files("examples", "tests")
  assert not gone, f"docs/tree.md names {gone}"
