"""Carvana Image Masking Challenge: from the download to the score, in six notebooks and one thin package."""

__version__ = "0.2.0"

import os

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import would ask the network for a newer release
