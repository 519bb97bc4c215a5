"""Python runs this file at the start of every process that has this folder on its path: it then knows these families."""

from __future__ import annotations

from broken_families import FAMILIES

from genscale.families import BUILT_IN

BUILT_IN |= FAMILIES
