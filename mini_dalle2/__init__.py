"""mini_dalle2: DALL·E 2 (unCLIP, arXiv 2204.06125), one plain file for each component of the paper. Start with pipeline.py."""

from .pipeline import DALLE2

__all__ = ["DALLE2"]
