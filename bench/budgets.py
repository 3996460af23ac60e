"""Find the parameter at which each fusion method has a wanted charged budget.

The charged budget is measured, by answers to the first prompts of a data set. For all methods but
Cache-Craft and ``fused`` it depends only on the number of layers, and on the tokens of chunks and
question: for these it is measured on a narrow model (:func:`narrow_model`) of as many layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import TypeAdapter
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

TARGETS = 0.05, 0.10, 0.15, 0.20
TOLERANCE = 0.005  # of a charged budget
ROUNDS = 4


@dataclass(frozen=True)
class Method:
    """A method with one parameter, between ``low`` and ``high``, that its charged budget grows
    with."""

    mode: str  # with {} in place of the parameter
    low: float
    high: float
    whole: bool = False  # the parameter is an integer
    by_content: bool = False  # the charged budget depends on what the model computes

    def at(self, value: float) -> str:
        return self.mode.format(f"{value:.4g}")

    def rounded(self, value: float) -> float:
        """The value as :meth:`at` writes it."""
        return round(value) if self.whole else float(f"{value:.4g}")


def _ratio(method: str, added: str = "") -> Method:
    return Method(f"{method}recompute_ratio={{}}{added}", 0.005, 0.3)


#: By the name in tables. ``ape``, ``reuse`` and ``prefix`` have no parameter that sets a budget.
METHODS: Mapping[str, Method] = {
    "fused": Method("fused:recompute_ratio={}", 0.005, 0.3, by_content=True),
    "fused, attention=0": _ratio("fused:", ",attention=0"),
    "cacheblend": _ratio("cacheblend:"),
    "cacheblend, check_layer=2": _ratio("cacheblend:check_layer=2,"),
    "kvshare": _ratio("kvshare:"),
    "prophet": _ratio("prophet:"),
    "infoflow": _ratio("infoflow:"),
    "qcfuse": _ratio("qcfuse:"),
    "epic": Method("epic:first_tokens={}", 1, 64, whole=True),
    "cachecraft": Method("cachecraft:alpha={}", 0.01, 4, by_content=True),
    "random": _ratio("random:"),
    "random+full_layers=2": _ratio("random:", "+full_layers=2"),
}

#: Measures the charged budgets of modes, in their order.
Measure = Callable[[Sequence[str]], Sequence[float]]


@dataclass(frozen=True)
class Setting:
    """A mode whose charged budget was measured."""

    mode: str
    charged: float


@dataclass(frozen=True)
class Budgets:
    """What was found for the methods, by name, on a model and a data set."""

    prompts: int  # on which budgets were measured
    found: dict[str, dict[str, Setting]]  # method -> target as in "10%" -> the closest setting
    least: dict[str, float]  # method -> the lowest charged budget
    refused: dict[str, str] = field(default_factory=dict)  # method -> why this model cannot use it

    @property
    def modes(self) -> dict[str, str]:
        """Modes by label, such as ``fused@10%``."""
        return {
            f"{method}@{target}": setting.mode
            for method, settings in self.found.items()
            for target, setting in settings.items()
        }

    def __or__(self, other: Budgets) -> Budgets:
        return Budgets(
            self.prompts,
            self.found | other.found,
            self.least | other.least,
            self.refused | other.refused,
        )

    def save(self, path: Path) -> None:
        path.write_bytes(TypeAdapter(Budgets).dump_json(self, indent=1) + b"\n")

    @classmethod
    def load(cls, path: Path) -> Budgets:
        return TypeAdapter(cls).validate_json(path.read_bytes())


def find_budgets(
    methods: Iterable[str], targets: Sequence[float], measure: Measure, prompts: int
) -> Budgets:
    """The settings closest to the ``targets``.

    All that is to be measured next is measured together, since ``measure`` stores the chunks first.
    A method has no setting for a target that is below its lowest budget or above its highest one.
    """
    known: dict[str, dict[float, float]] = {name: {} for name in methods}  # parameter -> charged
    wanted = [(name, end) for name in known for end in (METHODS[name].low, METHODS[name].high)]
    for _ in range(ROUNDS):
        modes = [METHODS[name].at(value) for name, value in wanted]
        for (name, value), charged in zip(wanted, measure(modes) if modes else (), strict=True):
            known[name][value] = charged
        steps = [
            (name, step)
            for name, points in known.items()
            for target in targets
            if (step := _next(METHODS[name], points, target)) is not None
        ]
        wanted = list(dict.fromkeys(steps))
    found: dict[str, dict[str, Setting]] = {name: {} for name in known}
    for name, points in known.items():
        for target in targets:
            value, charged = min(points.items(), key=lambda point: abs(point[1] - target))
            if _within(points, target):
                found[name][f"{target:.0%}"] = Setting(METHODS[name].at(value), charged)
    return Budgets(prompts, found, {name: min(points.values()) for name, points in known.items()})


def narrow_model(model: Path, folder: Path) -> None:
    """Save into ``folder`` a model of random weights with the layers and the tokenizer of the model
    in the folder ``model``, but with hidden states of few dimensions."""
    config = AutoConfig.from_pretrained(model)
    config.update(
        {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
        }
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)


def _within(points: Mapping[float, float], target: float) -> bool:
    return min(points.values()) - TOLERANCE <= target <= max(points.values()) + TOLERANCE


def _next(method: Method, points: Mapping[float, float], target: float) -> float | None:
    """The parameter to measure next: by linear interpolation between the neighbours of ``target``.

    None if a measured one is close enough, or none can be between.
    """
    if not _within(points, target):
        return None
    if min(abs(charged - target) for charged in points.values()) <= TOLERANCE:
        return None
    below = max(v for v, charged in points.items() if charged < target)
    above = min(v for v, charged in points.items() if charged >= target and v > below)
    share = (target - points[below]) / (points[above] - points[below])
    value = method.rounded(below + min(0.9, max(0.1, share)) * (above - below))
    return value if below < value < above else None
