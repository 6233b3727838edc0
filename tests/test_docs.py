"""The pages: links lead somewhere, and commands name files that exist."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")]


def anchors(page: pathlib.Path) -> set[str]:
  """Returns the anchors that GitHub makes of a page's headings."""
  headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
  return {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links(page):
  for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
    if target.startswith("http"):
      continue
    path, _, anchor = target.partition("#")
    to = (page.parent / path).resolve() if path else page
    assert to.exists(), target
    assert not anchor or anchor in anchors(to), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_commands(page):
  text = re.sub(r"\\\n\s*", "", page.read_text())
  for module in re.findall(r"python -m ((?:sigjax|tools)[\w.]+)", text):
    if "NAME" in module:
      continue
    path = ROOT / module.rstrip(".").replace(".", "/")
    assert path.with_suffix(".py").exists() or (path / "__main__.py").exists()
  for path in re.findall(
    r"\b((?:configs|examples|sigjax|tests|tools)/[\w/]+\.py)", text
  ):
    if "NAME" not in path:
      assert (ROOT / path).exists(), path


def test_the_readme_is_short_and_every_page_is_indexed():
  assert len((ROOT / "README.md").read_text().splitlines()) <= 130
  index = (ROOT / "docs/README.md").read_text()
  for page in ROOT.glob("docs/*.md"):
    assert f"]({page.name})" in index or page.name == "README.md", page
