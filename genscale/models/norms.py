"""The normalisations that a network of images can be given, by name. Light: settings read it, and load no torch."""

from __future__ import annotations

from typing import Literal

Norm = Literal["batch", "group", "none"]
