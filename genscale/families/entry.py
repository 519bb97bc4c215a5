"""What `model.family` selects: the entry of one family, which says where all of it is and what it can do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, get_type_hints

from genscale.errors import UserError
from genscale.evaluation.settings import PreviewSampling
from genscale.objectives.capabilities import missing_members

if TYPE_CHECKING:
    from genscale.data.lanes import Data, Sample
    from genscale.evaluation.trained_run import TrainedRun
    from genscale.objectives.base import Blueprint, Objective
    from genscale.settings.config import Config

READ_BY_LOADER = ("workers", "prefetch_steps")
"""Settings that every `data` section has."""


@dataclass(frozen=True)
class NoSettings:
    """A family whose objective leaves nothing to choose."""


class FamilyModule(Protocol):
    """The functions of a family's module."""

    def build_data(self, settings: Any, seed: int) -> Data:
        """What the `data` section asks for."""

    def validation(self, settings: Any, seed: int) -> list[Sample]:
        """The validation samples; of what is trained on, no more is opened than they need."""

    def build(self, config: Config, data: Any) -> Objective:
        """The objective of a run. Its networks may stand on the meta device. Raises UserError for impossible settings."""

    def restore(self, config: Config, folder: Path) -> Objective:
        """The objective of the trained run in a run folder, without its data."""


Sampler = Callable[["TrainedRun", Any], None]
"""Writes what it makes of a trained run, by the flags, and says where."""
Scorer = Callable[["TrainedRun", Any], dict[str, Any]]
"""Gives scores by name, which JSON can hold."""


@dataclass(frozen=True)
class Sampling:
    """`genscale sample` for a family.

    Attributes:
        settings: dataclass of the flags; where it has `live`, the weights as trained can be asked for, not their average.
        load: imports the sampler. It is called when one is needed, for torch takes a second to load.
        needs: what the sampler asks of the objective (`genscale.objectives.capabilities`, or protocols of the family's own).
        example: flags to show after a training, as a user would begin with.
    """

    settings: type
    load: Callable[[], Sampler]
    needs: tuple[type, ...] = ()
    example: str = ""


def _preview_sampler() -> Sampler:
    from genscale.evaluation.preview_sampling import sample_preview

    return sample_preview


PREVIEW_SAMPLING = Sampling(PreviewSampling, _preview_sampler)
"""Writes what `Objective.preview` makes."""


@dataclass(frozen=True)
class Scoring:
    """`genscale evaluate` beyond the validation metrics.

    Attributes:
        settings: dataclass of the flags; `live` as for `Sampling`.
        load: imports the scorer.
        needs: what the scorer asks of the objective.
        with_validation: the validation metrics stand beside the scores.
        tiny: flags that score a tiny run in seconds, for `genscale check-family`.
    """

    settings: type
    load: Callable[[], Scorer]
    needs: tuple[type, ...] = ()
    with_validation: bool = True
    tiny: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """The entry of one family. It is light: importing it loads no torch.

    A built-in family has its entry in `genscale/families/<name>/`, one of an installed package is found by its entry point.

    Attributes:
        model_settings, data_settings, objective_settings: the dataclasses behind the `model`, `data` and `objective` sections.
            `model_settings` has a first field `family: Literal["<name>"] = "<name>"`, which is the family's name;
            `data_settings` has `workers` and `prefetch_steps`, as the loader wants them.
        module: imports the module with the functions of `FamilyModule`. It is called when the first of them is needed.
        sampling: what `genscale sample` makes of a run (default: what `Objective.preview` makes of a seed); None where there is
            nothing to write.
        scoring: what `genscale evaluate` reports beyond the validation metrics.
        capabilities: what the objective can do besides what sampler and scorer need.
        tiny: settings by key of the smallest run that still is one, `{"model.width": 8}`, for `genscale check-family`, which
            else takes the defaults.
        tiny_from: the family whose tiny run is trained first, to stand in `model.from` of this one's.

    Raises:
        UserError: settings that are none.

    Example:
        >>> import sys
        >>> from dataclasses import dataclass
        >>> from typing import Literal
        >>> @dataclass
        ... class LineSettings:
        ...     family: Literal["line"] = "line"
        >>> @dataclass
        ... class LineData:
        ...     workers: int = 0
        ...     prefetch_steps: int = 2
        >>> line = Family(LineSettings, LineData, module=lambda: sys.modules[__name__])
        >>> line.name
        'line'
    """

    model_settings: type
    data_settings: type
    module: Callable[[], ModuleType | FamilyModule]
    objective_settings: type = NoSettings
    sampling: Sampling | None = PREVIEW_SAMPLING
    scoring: Scoring | None = None
    capabilities: tuple[type, ...] = ()
    tiny: Mapping[str, Any] = field(default_factory=dict)
    tiny_from: str | None = None

    def __post_init__(self) -> None:
        sections = {"model_settings": self.model_settings, "data_settings": self.data_settings,
                    "objective_settings": self.objective_settings}
        for part in ("sampling", "scoring"):
            if (entry := getattr(self, part)) is not None:
                sections[f"{part}.settings"] = entry.settings
        for where, section in sections.items():
            if not (isinstance(section, type) and dataclasses.is_dataclass(section)):
                raise UserError(f"{where} of a family: {section!r} is no dataclass; give one whose fields are the settings")
        fields = {entry.name: entry.default for entry in dataclasses.fields(self.model_settings)}
        if not isinstance(fields.get("family"), str):
            raise UserError(f"model_settings of a family: {self.model_settings.__name__} does not say its name; begin it with "
                            'a field `family: Literal["<name>"] = "<name>"`')
        for name in READ_BY_LOADER:
            if name not in get_type_hints(self.data_settings):
                raise UserError(f"family {self.name}: {self.data_settings.__name__} has no {name}, which the loader reads; "
                                "add it to the data section, as genscale's own families have it")

    @property
    def name(self) -> str:
        """What `model.family` calls it."""
        defaults: dict[str, Any] = {entry.name: entry.default for entry in dataclasses.fields(self.model_settings)}
        return defaults["family"]

    def can(self, capability: type) -> bool:
        """Whether its objective has a capability."""
        return capability in self._promised()

    def build_data(self, settings: Any, seed: int) -> Data:
        """What the `data` section asks for."""
        return self._functions().build_data(settings, seed)

    def validation(self, settings: Any, seed: int) -> list[Sample]:
        """The validation samples; of what is trained on, no more is opened than they need."""
        return self._functions().validation(settings, seed)

    def build_objective(self, config: Config, data: Any) -> Objective:
        """The objective of a run, its networks on the meta device or anywhere.

        Raises:
            UserError: impossible settings; or the family lacks what its entry says it has.
        """
        self.load()
        return self.checked(self._functions().build(config, data))

    def restore(self, config: Config, folder: Path) -> Objective:
        """The objective of the trained run in a run folder, without its data. Raises UserError as `build_objective` does."""
        return self.checked(self._functions().restore(config, folder))

    def blueprint(self, config: Config) -> Blueprint:
        """What a step of such a run can be planned of, without its data.

        Raises:
            UserError: the family's module does not say; or impossible settings.
        """
        module = self._functions()
        make = getattr(module, "blueprint", None)
        if make is None:
            raise UserError(f"model.family: {self.name} cannot be planned, for its module "
                            f"{getattr(module, '__name__', module)} does not say what a sample is; add a function "
                            "blueprint(config) that gives a genscale.objectives.base.Blueprint (of make_family: the argument "
                            "sample)")
        found: Blueprint = make(config)
        self.checked(found.objective)
        return found

    def load(self) -> None:
        """Import all of it: a sampler that is not there must not be found out after the training. Raises UserError."""
        self._functions()
        for part in ("sampling", "scoring"):
            entry = getattr(self, part)
            if entry is None:
                continue
            try:
                function = entry.load()
            except (ImportError, AttributeError) as error:
                raise UserError(f"family {self.name}: its {part} cannot be loaded ({error}); mend the import, or leave "
                                f"{part} out of its entry") from error
            if not callable(function):
                raise UserError(f"family {self.name}: its {part} loads {function!r}, which is no function of a trained run and "
                                "settings")

    def checked(self, objective: Objective) -> Objective:
        """The objective, which has all that the entry promises. Raises UserError naming what it has not."""
        kind = type(objective).__name__
        for capability in self._promised():
            if missing := missing_members(capability, objective):
                asked = [part for part in ("sampling", "scoring") if (entry := getattr(self, part)) is not None
                         and capability in entry.needs]
                whose = f"its {' and '.join(asked)}" if asked else "its entry"
                raise UserError(f"family {self.name}: {kind} has no {', '.join(missing)}, which {whose} promises "
                                f"({capability.__name__}); add it, or take {capability.__name__} out of the entry")
        for phase in objective.phases:
            if phase.network not in objective.networks:
                raise UserError(f"family {self.name}: phase {phase.name} of {kind} trains '{phase.network}', which is none of "
                                f"its networks, {', '.join(objective.networks)}")
        return objective

    def _promised(self) -> tuple[type, ...]:
        needed = [entry.needs for entry in (self.sampling, self.scoring) if entry is not None]
        return tuple(dict.fromkeys(sum(needed, start=()) + self.capabilities))

    def _functions(self) -> FamilyModule:
        module = self.module()
        if missing := missing_members(FamilyModule, module):
            raise UserError(f"family {self.name}: its module {getattr(module, '__name__', module)} has no "
                            f"{', '.join(missing)}; a family's module has build_data, validation, build and restore")
        return module
