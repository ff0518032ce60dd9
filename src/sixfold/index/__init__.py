"""Nearest neighbours among compressed vectors."""

from sixfold.index.index import Index, Neighbors

__all__ = ["Index", "Neighbors"]
