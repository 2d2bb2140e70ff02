"""What is odd about a dataset: findings that a person should look at before training.

Owns: the checks and their thresholds, on arrays and images alone. It does not know how findings are shown. A finding is
a suspicion, not a verdict; each says what was seen, and what it usually means.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from vla.data.reader import Demonstrations, Episode

STILL = 2e-3  # share of an entry's range below which it did not move
MANY_STILL = 0.25  # share of an episode's frames in which nothing moves
LONG_PAUSE = 8  # frames at the start or the end of an episode in which nothing moves
JUMP = 0.25  # share of an entry's range ...
JUMP_OVER_USUAL = 8.0  # ... and this many times what 99 % of the steps change
MANY_DUPLICATES = 0.2  # share of images that equal the one before although the robot moved
DARK, FLAT = 8.0, 3.0  # mean and standard deviation of an image (of 255) that shows nothing
SHORT, LONG = 0.3, 3.0  # times the median length


@dataclasses.dataclass(frozen=True)
class Finding:
    """One suspicion.

    Attributes:
        what: a short name, the same for all findings of a kind.
        detail: what was seen, and what it usually means.
        episodes: the episodes that it concerns; empty: the dataset.
    """

    what: str
    detail: str
    episodes: tuple[int, ...] = ()


def check(demos: Demonstrations) -> list[Finding]:
    """All findings that need no images, those that concern the whole dataset first."""
    findings = [*_description(demos), *_entries(demos), *_gripper(demos), *_lengths(demos.episodes), *_repeats(demos)]
    found: dict[str, list[tuple[int, str]]] = defaultdict(list)
    moving, usual = moves(demos), _usual_steps(demos)
    for episode in demos.episodes:
        for what, detail in _episode(demos, episode, moving[episode.rows], usual):
            found[what].append((episode.index, detail))
    for what, cases in found.items():
        findings.append(Finding(what, cases[0][1], tuple(index for index, _ in cases)))
    return sorted(findings, key=lambda finding: bool(finding.episodes))


def check_images(camera: str, episode: Episode, images: Sequence[np.ndarray], moved: np.ndarray) -> list[Finding]:
    """Findings about one camera in one episode.

    Args:
        images: some or all of its frames in order, uint8 [H, W, 3].
        moved: bool [len(images)]; whether the robot moved since the image before.
    """
    found = []
    dull = [image for image in images if image.mean() < DARK or image.std() < FLAT]
    if dull:
        share = len(dull) / len(images)
        detail = (
            f"camera {camera!r}: {share:.0%} of the images are black or of one colour: a cable, a cap, a dead camera."
        )
        found.append(Finding("empty images", detail, (episode.index,)))
    same = [moved[i] and np.array_equal(images[i], images[i - 1]) for i in range(1, len(images))]
    if same and np.mean(same) > MANY_DUPLICATES:
        detail = (
            f"camera {camera!r}: {np.mean(same):.0%} of the images repeat the one before although the robot moved: "
            "the camera is slower than the recording, or it hung."
        )
        found.append(Finding("repeated images", detail, (episode.index,)))
    return found


def moves(demos: Demonstrations) -> np.ndarray:
    """bool [N]: whether anything changed from this frame to the next (True at the last frame of an episode).

    With a state, the robot's entries tell; without one, an action that differs from the last and from zero.
    """
    moving = np.ones(demos.num_frames, bool)
    if demos.states is not None:
        scale = _range(demos.states)
        changed = (np.abs(np.diff(demos.states, axis=0)) > STILL * scale).any(1)
    else:
        scale = _range(demos.actions)
        changed = (np.abs(np.diff(demos.actions, axis=0)) > STILL * scale).any(1)
        changed |= (np.abs(demos.actions[:-1]) > STILL * scale).any(1) & demos.robot.action_space.relative
    moving[:-1] = changed
    moving[[episode.rows.stop - 1 for episode in demos.episodes]] = True
    return moving


def _description(demos: Demonstrations) -> Iterator[Finding]:
    """What the dataset has besides the frames and columns that are read, and where its parts disagree."""
    info = demos.info
    if info.depth:
        yield Finding("depth", f"{', '.join(info.depth)}: left out; a policy sees colours only.")
    if demos.states is None:
        similar = f" These columns are not read: {', '.join(info.unread)}." if info.unread else ""
        yield Finding("no state", f"there is no feature observation.state, so a policy sees images only.{similar}")
    if others := [name for name in info.splits or {} if name != "train"]:
        yield Finding("other splits", f"{', '.join(others)}: all episodes are read; training holds out its own.")
    if demos.unlisted:
        detail = f"{demos.unlisted} frames of the data files belong to episodes that meta/episodes does not list."
        yield Finding("unlisted episodes", detail + " They are not read.")
    total = demos.num_frames + demos.unlisted
    if info.total_frames not in (demos.num_frames, total):
        yield Finding("other count", f"meta/info.json counts {info.total_frames} frames; there are {demos.num_frames}.")
    gaps = tuple(
        episode.index for episode in demos.episodes if (demos.steps[episode.rows] != np.arange(episode.length)).any()
    )
    if gaps:
        yield Finding(
            "time gaps",
            "by their timestamps, frames are missing. Images are looked up by time, but actions follow each other as "
            "if nothing was missing.",
            gaps,
        )
    if demos.timing:
        yield Finding("odd timestamps", demos.timing)
    if demos.renamed:
        yield Finding(
            "other instructions",
            "meta/episodes has other instructions than meta/tasks.parquet. The latter are used.",
            demos.renamed,
        )


def _entries(demos: Demonstrations) -> Iterator[Finding]:
    names = np.array(demos.robot.action_names)
    spread = np.ptp(demos.actions, axis=0)
    constant = spread <= 1e-6 * np.maximum(1.0, np.abs(demos.actions).max(0))
    if constant.all():
        yield Finding(
            "constant actions", "no action entry ever changes: the wrong column was recorded, or nothing was."
        )
    elif constant.any():
        yield Finding("constant entries", f"{', '.join(names[constant])} never move: they carry nothing to learn.")
    q01, q99 = np.quantile(demos.actions, [0.01, 0.99], axis=0)
    narrow = ~constant & (q99 - q01 <= 1e-6 * spread)
    if narrow.any():
        detail = "moves in less than 2 % of the frames; its 1 % and 99 % quantiles say nothing about its range."
        yield Finding("rarely moving entries", f"{', '.join(names[narrow])} {detail}")
    far = ~constant & ~narrow & (spread > 5 * (q99 - q01))
    if far.any():
        worst = spread / np.maximum(q99 - q01, 1e-12)
        listed = ", ".join(f"{names[i]} ({worst[i]:.0f} times)" for i in np.flatnonzero(far))
        detail = "outliers, or a unit that changed. Normalisation clips them."
        yield Finding("far outliers", f"values far outside the 1 % to 99 % quantiles: {listed}: {detail}")


def _gripper(demos: Demonstrations) -> Iterator[Finding]:
    robot = demos.robot
    if robot.gripper_index is None:
        return
    name = robot.action_names[robot.gripper_index]
    values = demos.actions[:, robot.gripper_index]
    low, high = sorted((robot.gripper_open, robot.gripper_closed))
    margin = 0.1 * (high - low)
    if values.min() < low - margin or values.max() > high + margin:
        yield Finding(
            "gripper out of range",
            f"{name} goes from {values.min():.3g} to {values.max():.3g}, but open is {robot.gripper_open:g} and closed "
            f"is {robot.gripper_closed:g}. Correct the robot's description in meta/info.json.",
        )
    elif np.ptp(values) < 0.6 * (high - low) and np.ptp(values) > 0:
        yield Finding(
            "gripper range",
            f"{name} goes from {values.min():.3g} to {values.max():.3g}, but open is {robot.gripper_open:g} and closed "
            f"is {robot.gripper_closed:g}: another convention (0 to 1, or -1 to 1)?",
        )
    middle = (low + high) / 2
    opens = (values > middle) == (robot.gripper_open > middle)
    first = np.array([opens[episode.start] for episode in demos.episodes])
    if len(first) >= 5 and first.mean() < 0.2 and opens.any():
        yield Finding(
            "gripper polarity",
            f"{1 - first.mean():.0%} of the episodes begin with a closed gripper ({name}). If they do not, open and "
            f"closed are swapped: open is stated as {robot.gripper_open:g}.",
        )
    still = tuple(episode.index for episode in demos.episodes if np.ptp(values[episode.rows]) < 0.05 * (high - low))
    if still and len(still) < len(demos.episodes):
        yield Finding("gripper never moves", f"{name} does not change during the episode: was it recorded?", still)
    elif still:
        yield Finding(
            "gripper never moves", f"{name} does not change in any episode; right only where it is not needed."
        )


def _lengths(episodes: Sequence[Episode]) -> Iterator[Finding]:
    lengths = np.array([episode.length for episode in episodes])
    median = np.median(lengths)
    for what, odd, why in (
        ("short episodes", lengths < SHORT * median, "a recording that was stopped by mistake"),
        ("long episodes", lengths > LONG * median, "a pause, or a recording that was not stopped"),
    ):
        if odd.any():
            found = tuple(int(episodes[i].index) for i in np.flatnonzero(odd).tolist())
            span = " to ".join(map(str, sorted({int(lengths[odd].min()), int(lengths[odd].max())}))) + " frames"
            span += f", the median is {median:.0f}"
            yield Finding(what, f"{span}: {why}?", found)
    failed = tuple(episode.index for episode in episodes if episode.success is False)
    if failed:
        yield Finding(
            "failures", "recorded as failures. A policy imitates them, too: remove them before training.", failed
        )
    mute = tuple(episode.index for episode in episodes if not episode.instruction.strip())
    if mute:
        yield Finding("no instruction", "the instruction is empty: the policy cannot know what it is asked for.", mute)


def _repeats(demos: Demonstrations) -> Iterator[Finding]:
    seen: dict[bytes, int] = {}
    twice = []
    for episode in demos.episodes:
        key = demos.actions[episode.rows].tobytes()
        if key in seen and episode.length > 1:
            twice.append(episode.index)
        seen.setdefault(key, episode.index)
    if twice:
        yield Finding("repeated episodes", "the actions equal those of an earlier episode exactly.", tuple(twice))


def _episode(
    demos: Demonstrations, episode: Episode, moving: np.ndarray, usual: np.ndarray
) -> Iterator[tuple[str, str]]:
    still = 1 - moving.mean()
    if still > MANY_STILL and episode.length > 4:
        yield (
            "pauses",
            f"nothing moves in {still:.0%} of the frames. A policy learns to stand still from them; cut them out.",
        )
    else:
        lead, tail = _leading(~moving), _leading(~moving[-2::-1])
        if max(lead, tail) >= LONG_PAUSE:
            where = "start" if lead >= tail else "end"
            yield "pause at an end", f"nothing moves in {max(lead, tail)} frames at its {where}: trim them."
    if episode.length < 3:
        return
    names = demos.robot.action_names
    change = np.abs(np.diff(demos.actions[episode.rows], axis=0))
    spread = _range(demos.actions)
    jumps = (change > JUMP * spread) & (change > JUMP_OVER_USUAL * np.maximum(usual, 1e-9))
    if demos.robot.gripper_index is not None:
        jumps[:, demos.robot.gripper_index] = False  # opening and closing are jumps by nature
    if jumps.any():
        frame, entry = np.argwhere(jumps)[0]
        size = change[frame, entry] / spread[entry]
        yield (
            "jumps",
            f"{names[entry]} changes by {size:.0%} of its range at frame {frame + 1}: lost frames, or a wrapped angle.",
        )


def _usual_steps(demos: Demonstrations) -> np.ndarray:
    """[D]: how much an action entry changes from frame to frame, 99 % quantile over the dataset."""
    steps = [np.abs(np.diff(demos.actions[episode.rows], axis=0)) for episode in demos.episodes if episode.length > 1]
    return np.quantile(np.concatenate(steps), 0.99, axis=0) if steps else np.zeros(demos.robot.action_dim)


def _range(values: np.ndarray) -> np.ndarray:
    """Per entry, what counts as its full movement; 1e-9 for one that never moves."""
    return np.maximum(np.ptp(values, axis=0), 1e-9)


def _leading(flags: np.ndarray) -> int:
    """How many flags are set before the first that is not."""
    return int(np.argmin(flags)) if not flags.all() else len(flags)
