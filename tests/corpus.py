"""Texts for tokenizers of a few pieces."""

TEXTS = [
  f"a {color} {thing} in the {place}"
  for color in ("red", "green", "blue")
  for thing in ("apple", "house", "dog", "river")
  for place in ("morning", "forest", "rain")
]
