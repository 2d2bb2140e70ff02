"""An example of a benchmark suite with two tasks, registered by `--plugin tests.toy_suite`."""

from vla.evaluation.suites import SUITES, Published, Suite

SUITE = Suite(
    name="toys",
    title="Toys",
    sets={
        "all": ("toy/Slide-v0", "toy/Glide-v0"),
        "all/easy": ("toy/Slide-v0",),
        "all/hard": ("toy/Glide-v0",),
        "dark/easy": ("toy/Dark-v0",),
        "dark/hard": ("toy/Darker-v0",),
    },
    whole="all",
    tiers=("all/easy", "all/hard"),
    variants={"dark": ("dark/easy", "dark/hard")},
    episodes=2,
    seed=500,
    max_steps={"all/hard": 10},
    published=(
        Published(policy="Snail", average=20.0, tiers=(30.0, 10.0), note="slow", source="arXiv:1234.56789"),
        Published(policy="Hare", average=60.0),
        Published(policy="Hare", average=45.5, tiers=(50.5, 40.5), variant="dark"),
    ),
)
SUITES.register("toys")(SUITE)
