"""The interventions that are compared, each at its strengths, as the concepts of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.case_studies.probes import probe
from benchmarks.case_studies.worlds import GATE, PLANTED, World, direction, steering_vector
from shapedpo.lab.lessons import ALIASES


Fields = dict[str, Any]

STEER = 8.0
"""How far `residual` steers its reference; the hidden states there have a norm of about 45."""
LAYERS = [0, 1, 2, 3]
"""Of the lab's model."""
INSTRUCTIONS = {
    "goblin": "Mention a goblin.",
    "cheerfulness": "Be very cheerful.",
    "formality": "Be very formal.",
    "overconfidence": "Sound absolutely certain.",
    "hedging": "Sound unsure.",
    "link": "Give a link.",
    "praise": "Praise me.",
    "table": "Use a table.",
    "bold": "Use bold.",
    "em_dash": "Use dashes.",
    "emoji": "Use an emoji.",
    "horizontal_rule": "Use a rule.",
}


@dataclass(frozen=True)
class Method:
    """An intervention.

    Args:
        fields: What it gives the concept, by its strength, the share of the (gated) pairs that teach the target, and the target.
        strengths: Weakest first; the middle one is what methods are compared at.
        meaning: What the strength is; empty where there is nothing to set.
        gated: Whether it takes a gate.
        suppresses: Whether it can only suppress.
        restores: Whether it is for what is to be brought back.
        means: Whether it reads, and steers along, the difference of means in place of the SAE's features.
        learned: Whether it steers by a vector that was learned by what it brings about.
        rollouts: Whether probe rollouts of held-out prompts correct it during the run.
    """

    fields: Callable[[float, float, str], Fields]
    strengths: tuple[float, ...] = (1.0,)
    meaning: str = ""
    gated: bool = True
    suppresses: bool = False
    restores: bool = False
    means: bool = False
    learned: bool = False
    rollouts: bool = False

    @property
    def middle(self) -> float:
        return self.strengths[len(self.strengths) // 2]


def _leave_out(name: str) -> Callable[[float, float, str], Fields]:
    return lambda strength, share, target: {"method": {"name": name, "fraction": min(0.95, strength * share)}}


def _project(space: str) -> Callable[[float, float, str], Fields]:
    return lambda strength, share, target: {"method": {"name": "project", "space": space}, "action": "suppress"}


def taught_by(trait: str) -> str:
    """The lesson that moves a trait in the cases' data."""
    return next((name for name, (moved, _) in ALIASES.items() if moved == trait), trait)


METHODS = {
    "hold": Method(lambda strength, share, target: {"action": "hold"}),
    "hold, rollouts": Method(lambda strength, share, target: {"action": "hold"}, rollouts=True),
    "hold above": Method(
        lambda strength, share, target: {"action": "hold", "target": strength},
        (0.25, 0.5, 1.0),
        "sd above before",
        restores=True,
    ),
    "reward": Method(lambda strength, share, target: {"strength": strength}, (0.25, 1.0, 4.0), "nats per sd"),
    "reweight": Method(
        lambda strength, share, target: {"method": "reweight", "strength": strength}, (0.25, 1.0, 4.0), "per sd"
    ),
    "mask": Method(_leave_out("mask"), (0.5, 1.0, 1.5), "x the planted pairs"),
    "filter": Method(_leave_out("filter"), (0.5, 1.0, 1.5), "x the planted pairs"),
    "its rows out": Method(
        lambda strength, share, target: {
            "method": {"name": "filter", "expression": f"{PLANTED}.str.contains('{taught_by(target)}')"}
        }
    ),
    "tokens": Method(
        lambda strength, share, target: {"method": {"name": "tokens", "quantile": 1 - strength}},
        (0.005, 0.02, 0.05),
        "of the tokens",
    ),
    "steer": Method(
        lambda strength, share, target: {"method": "steer", "strength": strength}, (4.0, 8.0, 16.0), "hidden units"
    ),
    "steer: means": Method(
        lambda strength, share, target: {"method": {"name": "steer", "fraction": share}, "strength": strength},
        (4.0, 8.0, 16.0),
        "hidden units",
        means=True,
    ),
    "steer: learned": Method(
        lambda strength, share, target: {"method": "steer", "strength": strength},
        (8.0, 16.0, 32.0),
        "hidden units",
        learned=True,
    ),
    "ablate": Method(
        lambda strength, share, target: {"method": {"name": "ablate", "layers": LAYERS} if strength > 1 else "ablate"},
        (1.0, 4.0),
        "layers",
        suppresses=True,
    ),
    "inoculate": Method(
        lambda strength, share, target: {
            "method": {"name": "inoculate", "instruction": INSTRUCTIONS[target], "probability": strength}
        },
        (0.5, 1.0),
        "of the rows",
        suppresses=True,
    ),
    "residual": Method(
        lambda strength, share, target: {"method": {"name": "residual", "steer": STEER}, "strength": strength},
        (0.03, 0.1, 0.3),
        "per nat",
    ),
    "residual: learned": Method(
        lambda strength, share, target: {"method": {"name": "residual", "steer": 2 * STEER}, "strength": strength},
        (0.3, 1.0, 3.0),
        "per nat",
        learned=True,
    ),
    "project: pair": Method(_project("pair")),  # its sign does not matter
    "project: residual": Method(_project("residual"), gated=False, suppresses=True),
    "project: parameters": Method(_project("parameters"), suppresses=True),
}
NO_GATE = ", no gate"
"""Ends the name of a method that is tried without the conditional case's gate too."""
ROLLOUTS = {"probe_steps": 5, "probe_prompts": 100, "probe_max_new_tokens": 80}
"""Of a run with probe rollouts: ten probes in 50 steps, two rollouts of each prompt. Many small ones tell sooner what few large ones would."""
GIVEN = ", given the rest"
"""Ends the name of one that reads the target without what it shares with the other taught traits (`Concept.given`)."""
SPARING = ", sparing"
"""Ends the name of one that leaves to the other taught traits what the pairs teach of them (`Concept.spare`)."""
PROBE = ", probe"
"""Ends the name of one that reads the target with a fitted probe in place of the SAE's features."""
PROBED = ("hold", "filter", "project: pair")
"""Methods that are tried with the probe too, where the data teach the target everywhere."""
FIRST = (
    "hold",
    "its rows out",
    "reward",
    "tokens",
    "mask",
    f"reward{NO_GATE}",
    f"hold{SPARING}",
    f"reward{GIVEN}",
    "project: pair",
)
"""What is run first."""
AMPLIFY = {"reward": (0.1, 0.3, 1.0, 3.0)}
"""Methods and strengths where the target is wanted."""


def methods(world: World) -> dict[str, tuple[float, ...]]:
    """The methods that a case can use, by name, with their strengths."""
    if world.amplify:
        return AMPLIFY
    restored = any(map(world.restores, world.targets))
    fitting = {
        name: one.strengths
        for name, one in METHODS.items()
        if not (one.suppresses and restored) and (restored or not one.restores) and (one.gated or not world.topics)
    }
    if world.topics:
        fitting[f"reward{NO_GATE}"] = (middle("reward"),)
    if world.together < 1:
        fitting[f"reward{GIVEN}"] = METHODS["reward"].strengths
    fitting[f"hold{SPARING}"] = METHODS["hold"].strengths
    if not world.topics:
        fitting |= {f"{name}{PROBE}": (middle(name),) for name in PROBED}
    return fitting


def method(name: str) -> Method:
    """A method by its name, whatever that ends in."""
    for end in (NO_GATE, GIVEN, SPARING, PROBE):
        name = name.removesuffix(end)
    return METHODS[name]


def middle(name: str) -> float:
    """The strength that a method is compared with others at."""
    return method(name).middle


def fields(world: World, target: str, name: str, strength: float) -> Fields:
    """What a run gives its concept, beside name and readout.

    Args:
        target: The trait that is shaped.
        name: Of a method, as [`methods`] has it.
    """
    action = "amplify" if world.amplify or world.restores(target) else "suppress"
    gate = {"gate": {"column": GATE}} if world.topics and not name.endswith(NO_GATE) else {}
    rest = [trait for trait in world.taught if trait != target]
    others = {"given": rest} if name.endswith(GIVEN) else {"spare": rest} if name.endswith(SPARING) else {}
    return {"action": action, **method(name).fields(strength, world.planted(target), target), **gate, **others}


def shaping(world: World, target: str, name: str, strength: float) -> list[Any]:
    """The concepts of a run."""
    from shapedpo import Concept, lab

    how = fields(world, target, name, strength)
    if method(name).learned:
        chosen = how["method"] if isinstance(how["method"], dict) else {"name": how["method"]}
        how["method"] = {**chosen, "direction": steering_vector(target)}
    watched = [lab.concept(trait) for trait in how.get("given", how.get("spare", ()))]
    if method(name).means:
        return [Concept(target, direction(target), **how), *watched]
    if name.endswith(PROBE):
        return [Concept(target, probe(target), **how), *watched]
    return [lab.concept(target, **how), *watched]
