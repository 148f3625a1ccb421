"""Integrations: one module per trainer, whose functions replace the trainer's own and run fused.

With `strict=True`, the default, they reproduce the trainer's numbers to rounding, its defects included. With
`strict=False` they compute what the formulas say. The last table of docs/trainers.md has every difference.
"""

from __future__ import annotations

from ._patch import Incompatible

__all__ = ["Incompatible"]
