"""Carvana Image Masking Challenge: from the download to the score, in six notebooks and one thin package."""

__version__ = "0.1.0"
