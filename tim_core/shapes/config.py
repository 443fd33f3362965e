"""Which images and captions of coloured shapes a run trains on."""

import re
from typing import Annotated

from pydantic import Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

from ..errors import TimError
from ..limits import MAX_SIDE
from ..settings import CONFIG, Positive, Text, require, shown
from .scenes import RELATIONS, TRAINING_FORMS


@dataclass(config=CONFIG, frozen=True)
class SizesConfig:
    """Coloured shapes to draw: image sizes "WIDTHxHEIGHT" and caption forms with their weights, and relations."""

    sizes: Annotated[dict[str, Positive], Field(min_length=1)] = Field(default_factory=lambda: {"64x64": 1.0})
    forms: Annotated[dict[str, Positive], Field(min_length=1)] = Field(default_factory=lambda: dict(TRAINING_FORMS))
    relations: Annotated[tuple[str, ...], Field(min_length=1)] = RELATIONS   # equally likely
    native: Text | None = None   # native size, one of sizes; null: the most frequent one

    @field_validator("sizes")
    @classmethod
    def _check_sizes(cls, sizes: dict[str, float]) -> dict[str, float]:
        for size in sizes:
            fits = re.fullmatch(r"[1-9][0-9]{0,4}x[1-9][0-9]{0,4}", size) and max(map(int, size.split("x"))) <= MAX_SIDE
            require(fits, "", size, f"sizes such as 64x64, up to {MAX_SIDE} pixels a side")
        return sizes

    @field_validator("forms")
    @classmethod
    def _check_forms(cls, forms: dict[str, float]) -> dict[str, float]:
        for form in forms:
            require(form in TRAINING_FORMS, "", form, f"some of {', '.join(TRAINING_FORMS)}")
        return forms

    @field_validator("relations")
    @classmethod
    def _check_relations(cls, relations: tuple[str, ...]) -> tuple[str, ...]:
        for relation in relations:
            require(relation in RELATIONS, "", relation, f"some of {', '.join(RELATIONS)}")
        return relations

    @model_validator(mode="after")
    def _check_native(self) -> "SizesConfig":
        require(self.native is None or self.native in self.sizes, "native", self.native, "one of data.sizes")
        return self

    def table(self) -> tuple[list[tuple[int, int]], list[float]]:
        """The (width, height) pairs and their probabilities."""
        total = sum(self.sizes.values())
        sides = (size.split("x") for size in self.sizes)
        return [(int(width), int(height)) for width, height in sides], [weight / total for weight in self.sizes.values()]

    @property
    def native_size(self) -> tuple[int, int]:
        """The native (width, height). A batch of this size has loop.batch images."""
        width, height = (self.native or max(self.sizes, key=self.sizes.__getitem__)).split("x")
        return int(width), int(height)

    def misfit(self, pixels: int) -> str | None:
        """The first size whose sides are not multiples of `pixels`, the side of a latent cell or of a patch."""
        return next((size for size, sides in zip(self.sizes, self.table()[0]) if any(side % pixels for side in sides)), None)

    def check_multiples(self, pixels: int) -> None:
        """TimError for a size whose sides are not multiples of `pixels`."""
        if size := self.misfit(pixels):
            raise TimError(f"training config: data.sizes is {shown(size)}; use multiples of {pixels} pixels")
