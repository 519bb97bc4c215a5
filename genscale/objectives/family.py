"""What `model.family` selects: the settings of a family, and where the rest of it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from genscale.data.lanes import Data, Sample
    from genscale.objectives.base import Objective
    from genscale.settings.config import Config


@dataclass(frozen=True)
class NoSettings:
    """A family whose objective leaves nothing to choose."""


@dataclass(frozen=True)
class Family:
    """A registry entry: what `model.family` selects.

    Attributes:
        model_settings, data_settings, objective_settings: the dataclasses behind the `model`, `data` and `objective` sections.
        module: loads the one that has `build_data`, `validation`, `build` and `restore`. It is called when the first of them is
            needed, for torch takes a second to load, and nobody needs it to read a config or to show what can be set.
    """

    model_settings: type
    data_settings: type
    module: Callable[[], ModuleType]
    objective_settings: type = NoSettings

    def build_data(self, settings: Any, seed: int) -> Data:
        """What the `data` section asks for."""
        return self.module().build_data(settings, seed)

    def validation(self, settings: Any, seed: int) -> list[Sample]:
        """The validation samples; of what is trained on, no more is opened than they need."""
        return self.module().validation(settings, seed)

    def build_objective(self, config: Config, data: Any) -> Objective:
        """With its networks on the meta device or anywhere. Raises UserError."""
        return self.module().build(config, data)

    def restore(self, config: Config, folder: Path) -> Objective:
        """The objective of the trained run in a run folder, without its data."""
        return self.module().restore(config, folder)
