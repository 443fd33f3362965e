"""Which images and captions of the small world a run trains on."""

import re
from dataclasses import dataclass, field

from ..errors import TimError
from .scenes import RELATIONS, TRAINING_FORMS


def _check(ok: bool, key: str, value, use: str) -> None:
    if not ok:
        raise TimError(f"training config: {key} is {value!r}; use {use}")


@dataclass(frozen=True)
class SizesConfig:
    """What the small world draws: image sizes "WIDTHxHEIGHT" and caption forms with their weights, and relations."""

    sizes: dict[str, float] = field(default_factory=lambda: {"64x64": 1.0})
    forms: dict[str, float] = field(default_factory=lambda: dict(TRAINING_FORMS))
    relations: tuple[str, ...] = RELATIONS       # equally likely

    def __post_init__(self):
        _check(bool(self.sizes), "data.sizes", self.sizes, "at least one size, such as 64x64: 1")
        for size, weight in self.sizes.items():
            _check(re.fullmatch(r"[1-9][0-9]{0,4}x[1-9][0-9]{0,4}", size) is not None, "data.sizes", size, "sizes such as 64x64")
            _check(weight > 0, f"data.sizes.{size}", weight, "more than 0")
        _check(bool(self.forms), "data.forms", self.forms, f"some of {', '.join(TRAINING_FORMS)}")
        for form, weight in self.forms.items():
            _check(form in TRAINING_FORMS, "data.forms", form, f"some of {', '.join(TRAINING_FORMS)}")
            _check(weight > 0, f"data.forms.{form}", weight, "more than 0")
        _check(bool(self.relations) and set(self.relations) <= set(RELATIONS), "data.relations", list(self.relations),
               f"some of {', '.join(RELATIONS)}")

    def table(self) -> tuple[list[tuple[int, int]], list[float]]:
        """The (width, height) pairs and their probabilities."""
        total = sum(self.sizes.values())
        return [tuple(map(int, s.split("x"))) for s in self.sizes], [w / total for w in self.sizes.values()]

    def check_multiples(self, unit: int) -> None:
        """TimError for a size that is not a multiple of `unit` pixels, the size of a latent cell or of a patch."""
        for size, (width, height) in zip(self.sizes, self.table()[0]):
            _check(width % unit == 0 and height % unit == 0, "data.sizes", size, f"multiples of {unit} pixels")
