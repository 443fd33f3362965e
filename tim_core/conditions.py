"""Prompts and negatives, and what the sampler passes to the network for them: classes, or features without padding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Union

import torch
from torch import Tensor

from .errors import TimError
from .imagenet import NULL_CLASS, class_number
from .models.text_encoder import Features
from .models.transformer import TransitionTransformer
from .sampler import Model

Prompt = Union[str, int]


@dataclass(frozen=True)
class Condition:
    """What the sampler passes to the network: model(x, t, r, y) -> F, and the y of prompts and of negatives; null None for no guidance."""

    model: Model
    prompts: Tensor
    null: Tensor | None


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt, or several, as a list. TimError for what is neither."""
    if not isinstance(prompts, (str, int)) and not isinstance(prompts, Iterable):
        raise TimError(f"prompt: {prompts!r} is not text; use an empty text for none")
    return [prompts] if isinstance(prompts, (str, int)) else list(prompts)


def match_negatives(prompts: list[Prompt], negatives: list[Prompt]) -> list[Prompt]:
    """One negative per prompt, from one for all or as many. TimError for another number, or no prompts."""
    if not prompts:
        raise TimError("prompts: none given; give at least one")
    negatives = negatives * len(prompts) if len(negatives) == 1 else negatives
    if len(negatives) != len(prompts):
        raise TimError(f"negative prompts: {len(negatives)} for {len(prompts)} prompts; give one, or one per prompt")
    return negatives


def check_texts(prompts: Iterable[Prompt]) -> list[str]:
    """Prompts as a list; TimError for one that is not text."""
    texts = []
    for text in prompts:
        if not isinstance(text, str):
            raise TimError(f"prompt: {text!r} is not text")
        texts.append(text)
    return texts


def class_condition(
    transformer: TransitionTransformer, classes: Sequence[Prompt], negatives: Sequence[Prompt], device: torch.device
) -> Condition:
    """From numbers or ImageNet names of classes, one negative per class, "" being the null class.

    TimError for what is no class of this model. Without a null class, and with it among the negatives, the condition has no null.
    """
    config = transformer.config
    dtype = next(transformer.parameters()).dtype
    labels = [class_number(one) if isinstance(one, str) else one for one in (*classes, *negatives)]
    for label in labels:
        if isinstance(label, bool) or not isinstance(label, Integral) or not NULL_CLASS <= label < config.num_classes:
            raise TimError(f"class: {label!r} is not a class of this model; use 0 to {config.num_classes - 1}")
    has_null = config.null_class or NULL_CLASS not in labels[len(classes) :]
    if not config.null_class and NULL_CLASS in labels[: len(classes)]:
        raise TimError("class: empty, but this model has no null class; give a class")
    numbers = torch.tensor(labels, device=device)
    numbers = torch.where(numbers == NULL_CLASS, config.num_classes, numbers)

    def model(x: Tensor, t: Tensor, r: Tensor, y: Tensor) -> Tensor:
        return transformer(x.to(dtype), t, r, y)

    return Condition(model, numbers[: len(classes)], numbers[len(classes) :] if has_null else None)


def text_condition(transformer: TransitionTransformer, features: Features, device: torch.device) -> Condition:
    """From the features of prompts, then of as many negatives; a y is the number of a row of `features`.

    Each prompt and its negative have the length of the longer of the two.
    """
    dtype = next(transformer.parameters()).dtype
    count = len(features.lengths) // 2
    lengths = [max(pair) for pair in zip(features.lengths[:count], features.lengths[count:])]
    rows_of = [rows[:length] for rows, length in zip(features.rows, lengths * 2)]
    batches: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}  # places and features of each group, made at a batch's first step

    def grouped(rows: list[int]) -> list[tuple[Tensor, Tensor]]:
        """Rows of equal length share a call, so that none is padded."""
        groups: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            groups.setdefault(len(rows_of[row]), []).append(place)
        return [
            (torch.tensor(places, device=device), torch.stack([rows_of[rows[place]] for place in places])) for places in groups.values()
        ]

    def model(x: Tensor, t: Tensor, r: Tensor, rows: Tensor) -> Tensor:
        key = tuple(rows.tolist())  # on the CPU
        groups = batches[key] = batches.get(key) or grouped(list(key))
        if len(groups) == 1:
            return transformer(x.to(dtype), t, r, groups[0][1]).to(x.dtype)
        out = torch.empty_like(x)
        for places, y in groups:
            out[places] = transformer(x[places].to(dtype), t[places], r[places], y).to(out.dtype)
        return out

    return Condition(model, *torch.arange(len(rows_of)).chunk(2))
