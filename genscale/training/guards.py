"""What ends a run early: a loss that is no longer a number."""

from __future__ import annotations

from genscale.errors import UserError


class NonFiniteLoss(UserError):
    """The loss or the gradient became NaN or infinite: a matter of settings or data, so one line for the user."""
