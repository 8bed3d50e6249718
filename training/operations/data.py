"""Operations on what is read: the shares of the data sets, how far rare tokens are preferred, documents' borders."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field

from orchestrate.training.operations.base import Operation, operation
from orchestrate.training.settings.errors import ScheduleError
from orchestrate.training.settings.records import Settings
from orchestrate.training.settings.values import (
    MOST_SOURCES,
    NonNegativeFloat,
    SourceName,
    not_empty,
    shares_of,
    weighty,
)


def _mixed(settings: Settings, name: str, weights: dict[str, float]) -> Settings:
    mixture = {**dict.fromkeys(settings.mixture, 0.0), **shares_of(weights)}
    if len(mixture) > MOST_SOURCES:
        raise ScheduleError(f"{name}: a run reads at most {MOST_SOURCES} data sets, this would be {len(mixture)}")
    return replace(settings, mixture=mixture)


@operation("set_data_mixture")
class SetDataMixture(Operation):
    """Set how large a share of the samples each data set has, {NAME: WEIGHT, ...}; one that is not named has none.

    A name is what `dataset` takes: a folder under data/, or a path. Each data set goes on where it was; a new one
    begins. With `over` the shares move there gradually.
    """

    touches: ClassVar = ("mixture",)
    ramps: ClassVar = True
    source: ClassVar = "Tijdeman 1980 (The chairman assignment problem): whose turn it is"
    value: Annotated[
        dict[SourceName, NonNegativeFloat],
        Field(max_length=MOST_SOURCES),
        AfterValidator(not_empty),
        AfterValidator(weighty),
    ]

    def plan(self, settings: Settings) -> Settings:
        return _mixed(settings, self.name, self.value)


@operation("set_dataset")
class SetDataset(Operation):
    """Read this data set alone from here on; the others keep their places. With `over` it takes over gradually."""

    touches: ClassVar = ("mixture",)
    ramps: ClassVar = True
    value: SourceName

    def plan(self, settings: Settings) -> Settings:
        return _mixed(settings, self.name, {self.value: 1.0})


@operation("set_curriculum_alpha")
class SetCurriculumAlpha(Operation):
    """Prefer samples of rare tokens: 0 takes the data as it is, 1 aims at all its tokens alike."""

    touches: ClassVar = ("curriculum_alpha",)
    ramps: ClassVar = True
    source: ClassVar = "the orchestrator fork of nanoGPT (JinxCodesAI/nano_gpt)"
    value: Annotated[NonNegativeFloat, Field(le=1)]

    def plan(self, settings: Settings) -> Settings:
        return replace(settings, curriculum_alpha=self.value)


@operation("set_document_mask")
class SetDocumentMask(Operation):
    """Keep attention within a document where a row has several, in training and validation; or stop doing so.

    A document ends with its tokenizer's end-of-text; a data set whose tokenizer has none is refused. Positions stay
    those of the row.
    """

    touches: ClassVar = ("document_mask",)
    keeps: ClassVar = "every parameter and its moments; the function of a row that holds one document"
    source: ClassVar = "Grattafiori et al. 2024 (Llama 3, arXiv:2407.21783, section 3.2)"
    value: bool

    @property
    def keeps_function(self) -> bool:
        return False

    def plan(self, settings: Settings) -> Settings:
        return replace(settings, document_mask=self.value)
