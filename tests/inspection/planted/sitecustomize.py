"""Python runs this file at the start of every process that has this folder on its path: it then knows these families."""

from __future__ import annotations

import broken_families

from genscale.families import FAMILIES

FAMILIES.registered |= broken_families.FAMILIES
