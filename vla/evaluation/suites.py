"""Benchmark suites.

Owns: the definition of a suite (tasks, task sets, tiers, protocol, published results), its validation, and the lookup
by name. The data of a suite is stored with its environments. It does not know particular suites.

To add a suite, define it as an attribute of a module, for `vla benchmark module:attribute`, or register it with
`SUITES.register("my-suite")(Suite(...))`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

from annotated_types import Ge, Le

from vla import config as configuration
from vla.config.files import Strict
from vla.config.limits import Count, Seed
from vla.errors import ConfigError, SimulatorError, unknown
from vla.support import plugins
from vla.support.registry import Registry

Percentage = Annotated[float, Ge(0), Le(100)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published(Strict):
    """A published result on a suite.

    Attributes:
        policy: name of the policy.
        average: mean success over the tiers, in percent.
        tiers: success per tier in percent, in the order of the suite's tiers; None: not published.
        note: differences to the suite's protocol.
        source: arXiv id ("arXiv:2506.01844") or URL of the publication.
        variant: the evaluated variant of the suite; empty: the tiers themselves.
    """

    policy: str
    average: Percentage
    tiers: tuple[Percentage, ...] | None = None
    note: str = ""
    source: str = ""
    variant: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite(Strict):
    """A benchmark suite: its tasks, the evaluation protocol, and published results.

    Attributes:
        name: short name, for files and folders.
        title: name in reports.
        sets: task set -> environment ids.
        whole: the set of the published averages, evaluated by default.
        tiers: sets that partition `whole`; the average is the unweighted mean of their success rates. Empty: `whole` is
            the only tier.
        variants: name -> one set per tier, with changed versions of the tier's tasks (another instruction, for
            example). Their results are reported beside those of the tiers.
        episodes: episodes per task.
        seed: first environment seed; episode i of every task uses seed + i.
        max_steps: task set -> maximum steps per episode; other tasks have their environment's limit.
        published: published results.
    """

    name: str
    title: str
    sets: dict[str, tuple[str, ...]]
    whole: str
    tiers: tuple[str, ...] = ()
    variants: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    episodes: Count = 10
    seed: Seed = 100_000
    max_steps: dict[str, Count] = dataclasses.field(default_factory=dict)
    published: tuple[Published, ...] = ()

    @property
    def tasks(self) -> tuple[str, ...]:
        """The environment ids of all sets, each once."""
        return tuple(dict.fromkeys(env_id for members in self.sets.values() for env_id in members))

    @property
    def tier_sets(self) -> dict[str, tuple[str, ...]]:
        """Tier -> environment ids. The name of a tier is the last part of its set's name: "easy" for "mt50/easy"."""
        return {name.rpartition("/")[2]: self.sets[name] for name in self.tiers or (self.whole,)}

    def tier_of(self, env_id: str) -> str | None:
        """The tier of a task; None if it is not in `whole`."""
        return next((name for name, members in self.tier_sets.items() if env_id in members), None)

    def max_steps_of(self, env_id: str) -> int | None:
        """The maximum steps per episode of a task; None: the environment's own limit."""
        return next((steps for name, steps in self.max_steps.items() if env_id in self.sets[name]), None)

    def choose(self, names: Sequence[str]) -> list[str]:
        """The environment ids, without duplicates, of task sets and ids. ConfigError if a name is unknown."""
        chosen: dict[str, None] = {}
        for name in names:
            if name in self.sets:
                chosen |= dict.fromkeys(self.sets[name])
            elif name in self.tasks:
                chosen[name] = None
            else:
                raise ConfigError(self._unknown(name))
        return list(chosen)

    def _unknown(self, name: str) -> str:
        namespace = name.rpartition("/")[0]
        siblings = [env_id for env_id in self.tasks if env_id.rpartition("/")[0] == namespace]
        if siblings:
            return unknown("task", name, siblings)
        return unknown("task set", name, self.sets, f"Task ids, such as {self.tasks[0]}, are also valid.")

    def contradiction(self) -> str | None:
        changed = [name for sets in self.variants.values() for name in sets]
        for name in (self.whole, *self.tiers, *self.max_steps, *changed):
            if name not in self.sets:
                return f"suite {self.name!r}: " + unknown("task set", name, self.sets)
        if empty := [name for name, members in self.sets.items() if not members]:
            return f"suite {self.name!r}: the task set {empty[0]!r} is empty."
        in_tiers = [env_id for members in self.tier_sets.values() for env_id in members]
        if sorted(in_tiers) != sorted(set(self.sets[self.whole])):
            return f"suite {self.name!r}: the tiers must contain each task of {self.whole!r} once, and no other task."
        if len({env_id.rpartition("/")[2] for env_id in self.tasks}) < len(self.tasks):
            return f"suite {self.name!r}: task ids must differ in their last part, the name of the task's folder."
        for variant, sets in self.variants.items():
            if len(sets) != len(self.tier_sets):
                return (
                    f"suite {self.name!r}: the variant {variant!r} has {len(sets)} sets; the suite has "
                    f"{len(self.tier_sets)} tiers."
                )
        for entry in self.published:
            if entry.variant and entry.variant not in self.variants:
                return f"suite {self.name!r}: " + unknown("variant", entry.variant, self.variants)
            if entry.tiers is not None and len(entry.tiers) != len(self.tier_sets):
                return (
                    f"suite {self.name!r}: the result of {entry.policy!r} has {len(entry.tiers)} tiers; the suite has "
                    f"{len(self.tier_sets)}."
                )
        return None


#: Suites, or "module:attribute" to import a suite from.
SUITES: Registry[Suite | str] = Registry("suite")
SUITES.register("metaworld")("envs.metaworld_sets:SUITE")
SUITES.register("libero")("envs.libero.suites:SUITE")


def find(name: str) -> Suite:
    """The registered suite `name`, or the suite at "module:attribute" (a `Suite` or a mapping with its fields).

    Raises:
        ConfigError: the suite is unknown or invalid.
        SimulatorError: its module cannot be imported.
    """
    found: Any = name if ":" in name else SUITES.get(name)
    if isinstance(found, str):
        try:
            found = plugins.load(found)
        except Exception as error:  # the import of an environment's libraries can raise any error
            raise SimulatorError(
                f"cannot import the suite {found!r} ({type(error).__name__}: {error}). Pass the name of a suite "
                f"({', '.join(SUITES)}) or module:attribute. `vla doctor` finds problems of the installation."
            ) from error
    suite = found if isinstance(found, Suite) else configuration.from_dict(Suite, found, f"suite {name!r}")
    configuration.check(suite)
    return suite
