"""Dataset checks: possible problems to review before training.

Owns: the checks and their thresholds. A finding states the measurement and its usual cause. It does not know how
findings are displayed.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from vla.data import state_only
from vla.data.reader import Demonstrations, Episode

# Thresholds.
STILL = 2e-3  # smaller changes, as a fraction of a dimension's range, count as no motion
MANY_STILL = 0.25  # fraction of an episode's frames without motion
LONG_PAUSE = 8  # frames without motion at the start or the end of an episode
JUMP = 0.25  # a jump exceeds this fraction of a dimension's range
JUMP_OVER_USUAL = 8.0  # a jump also exceeds this multiple of the 99 % quantile of frame-to-frame changes
MANY_DUPLICATES = 0.2  # fraction of images that repeat the previous one although the robot moved
DARK, FLAT = 8.0, 3.0  # maximum mean of a black image, and standard deviation of a uniform one (of 0..255)
EXPLAINED = 0.4  # maximum of `StateOnly.explained`
SEVERAL = 20  # minimum number of episodes to measure `StateOnly.explained`
SHORT, LONG = 0.3, 3.0  # multiples of the median episode length


@dataclasses.dataclass(frozen=True)
class Finding:
    """One suspected problem.

    Attributes:
        what: short name of the kind of finding.
        detail: the measurement and its usual cause.
        episodes: indices of the affected episodes; empty if the finding concerns the whole dataset.
    """

    what: str
    detail: str
    episodes: tuple[int, ...] = ()


def check(demos: Demonstrations) -> list[Finding]:
    """All findings that need no images. Findings about the whole dataset come first."""
    findings = [
        *_description(demos),
        *_action_ranges(demos),
        *_gripper(demos),
        *_state_alone(demos),
        *_lengths(demos.episodes),
        *_repeats(demos),
    ]
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
        images: some or all frames of the episode in order, uint8 [H, W, 3].
        moved: bool [len(images)]; whether the robot moved since the previous image.
    """
    found = []
    dull = [image for image in images if image.mean() < DARK or image.std() < FLAT]
    if dull:
        share = len(dull) / len(images)
        detail = f"camera {camera!r}: {share:.0%} of the images are black or uniform. Check cable, lens cap and camera."
        found.append(Finding("empty images", detail, (episode.index,)))
    same = [moved[i] and np.array_equal(images[i], images[i - 1]) for i in range(1, len(images))]
    if same and np.mean(same) > MANY_DUPLICATES:
        detail = (
            f"camera {camera!r}: {np.mean(same):.0%} of the images repeat the previous one although the robot moved. "
            "The camera is slower than the recording, or it froze."
        )
        found.append(Finding("repeated images", detail, (episode.index,)))
    return found


def moves(demos: Demonstrations) -> np.ndarray:
    """bool [N]: whether the robot moves between this frame and the next (True at the last frame of an episode).

    Motion is a change of the state. In a dataset without a state, it is a change of the action or, in a relative action
    space, a nonzero action.
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
    """Contents that are not read, and contradictions between files."""
    info = demos.info
    if info.depth:
        yield Finding("depth", f"{', '.join(info.depth)}: not used, because a policy receives RGB images only.")
    if demos.states is None:
        similar = f" These columns are not read: {', '.join(info.unread)}." if info.unread else ""
        yield Finding("no state", f"there is no feature observation.state, so a policy receives images only.{similar}")
    if others := [name for name in info.splits or {} if name != "train"]:
        yield Finding(
            "other splits", f"{', '.join(others)}: all episodes are used; training creates its own validation split."
        )
    if demos.unlisted:
        detail = f"{demos.unlisted} frames in the data files belong to episodes that meta/episodes does not list."
        yield Finding("unlisted episodes", detail + " They are ignored.")
    total = demos.num_frames + demos.unlisted
    if info.total_frames not in (demos.num_frames, total):
        yield Finding("other count", f"meta/info.json counts {info.total_frames} frames; there are {demos.num_frames}.")
    gaps = tuple(
        episode.index for episode in demos.episodes if (demos.steps[episode.rows] != np.arange(episode.length)).any()
    )
    if gaps:
        yield Finding(
            "time gaps",
            "the timestamps show that frames are missing. Images are looked up by time, but consecutive actions are "
            "treated as if no frame were missing.",
            gaps,
        )
    if demos.timing:
        yield Finding("odd timestamps", demos.timing)
    if demos.renamed:
        yield Finding(
            "other instructions",
            "meta/episodes and meta/tasks.parquet give different instructions. Those of meta/tasks.parquet are used.",
            demos.renamed,
        )


def _action_ranges(demos: Demonstrations) -> Iterator[Finding]:
    names = np.array(demos.robot.action_names)
    spread = np.ptp(demos.actions, axis=0)
    constant = spread <= 1e-6 * np.maximum(1.0, np.abs(demos.actions).max(0))
    if constant.all():
        yield Finding("constant actions", "no action dimension changes. Check that the right column was recorded.")
    elif constant.any():
        yield Finding(
            "constant entries", f"{', '.join(names[constant])} never change; a policy learns nothing from them."
        )
    q01, q99 = np.quantile(demos.actions, [0.01, 0.99], axis=0)
    narrow = ~constant & (q99 - q01 <= 1e-6 * spread)
    if narrow.any():
        detail = "moves in less than 2 % of the frames; its 1 % and 99 % quantiles do not describe its range."
        yield Finding("rarely moving entries", f"{', '.join(names[narrow])} {detail}")
    far = ~constant & ~narrow & (spread > 5 * (q99 - q01))
    if far.any():
        worst = spread / np.maximum(q99 - q01, 1e-12)
        listed = ", ".join(f"{names[i]} ({worst[i]:.0f} times)" for i in np.flatnonzero(far))
        detail = "These are outliers, or a unit changed. Normalisation clips them."
        yield Finding("far outliers", f"values far outside the 1 % to 99 % quantiles: {listed}. {detail}")


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
            f"{name} ranges from {values.min():.3g} to {values.max():.3g}, but open is {robot.gripper_open:g} and "
            f"closed is {robot.gripper_closed:g}. Correct these values in meta/info.json (`robot`).",
        )
    elif np.ptp(values) < 0.6 * (high - low) and np.ptp(values) > 0:
        yield Finding(
            "gripper range",
            f"{name} ranges from {values.min():.3g} to {values.max():.3g}, but open is {robot.gripper_open:g} and "
            f"closed is {robot.gripper_closed:g}. The data may use another convention (0 to 1, or -1 to 1).",
        )
    middle = (low + high) / 2
    opens = (values > middle) == (robot.gripper_open > middle)
    first = np.array([opens[episode.start] for episode in demos.episodes])
    if len(first) >= 5 and first.mean() < 0.2 and opens.any():
        yield Finding(
            "gripper polarity",
            f"{1 - first.mean():.0%} of the episodes begin with a closed gripper ({name}), if open is "
            f"{robot.gripper_open:g}. If it was open, swap open and closed in meta/info.json.",
        )
    still = tuple(episode.index for episode in demos.episodes if np.ptp(values[episode.rows]) < 0.05 * (high - low))
    if still and len(still) < len(demos.episodes):
        yield Finding(
            "gripper never moves", f"{name} does not change during the episode. Check that it was recorded.", still
        )
    elif still:
        yield Finding(
            "gripper never moves",
            f"{name} does not change in any episode. This is correct only if no task needs the gripper.",
        )


def _state_alone(demos: Demonstrations) -> Iterator[Finding]:
    """Actions that can be predicted without the images."""
    if demos.states is None or len(demos.episodes) < SEVERAL:
        return
    explained = state_only.of(demos).explained
    if explained > EXPLAINED:
        yield Finding(
            "state gives the answer away",
            f"on held-out episodes, the state explains {100 * explained:.0f} % of the actions' variance that remains "
            "given the instruction. A policy may continue a motion and ignore the images. Compare with a policy "
            "without state (--no-use-state), or record demonstrations from other states (--noise, random starts).",
        )


def _lengths(episodes: Sequence[Episode]) -> Iterator[Finding]:
    lengths = np.array([episode.length for episode in episodes])
    median = np.median(lengths)
    for what, odd, why in (
        ("short episodes", lengths < SHORT * median, "a recording that was stopped by mistake"),
        ("long episodes", lengths > LONG * median, "a pause, or a recording that was stopped too late"),
    ):
        if odd.any():
            found = tuple(int(episodes[i].index) for i in np.flatnonzero(odd).tolist())
            span = " to ".join(map(str, sorted({int(lengths[odd].min()), int(lengths[odd].max())}))) + " frames"
            span += f", the median is {median:.0f}"
            yield Finding(what, f"{span}. The cause may be {why}.", found)
    failed = tuple(episode.index for episode in episodes if episode.success is False)
    if failed:
        yield Finding(
            "failures", "recorded as failures. A policy would imitate them; remove them before training.", failed
        )
    mute = tuple(episode.index for episode in episodes if not episode.instruction.strip())
    if mute:
        yield Finding("no instruction", "the instruction is empty, so the policy cannot know the task.", mute)


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
            f"the robot does not move in {still:.0%} of the frames. Remove these frames, or a policy learns to stop.",
        )
    else:
        lead, tail = _leading(~moving), _leading(~moving[-2::-1])
        if max(lead, tail) >= LONG_PAUSE:
            where = "start" if lead >= tail else "end"
            yield "pause at an end", f"the robot does not move in {max(lead, tail)} frames at the {where}. Remove them."
    if episode.length < 3:
        return
    names = demos.robot.action_names
    change = np.abs(np.diff(demos.actions[episode.rows], axis=0))
    spread = _range(demos.actions)
    jumps = (change > JUMP * spread) & (change > JUMP_OVER_USUAL * np.maximum(usual, 1e-9))
    if demos.robot.gripper_index is not None:
        jumps[:, demos.robot.gripper_index] = False  # a gripper may jump
    if jumps.any():
        frame, entry = np.argwhere(jumps)[0]
        size = change[frame, entry] / spread[entry]
        yield (
            "jumps",
            f"{names[entry]} changes by {size:.0%} of its range at frame {frame + 1}. "
            "Frames may be missing, or an angle may wrap around.",
        )


def _usual_steps(demos: Demonstrations) -> np.ndarray:
    """[D]: 99 % quantile of the absolute frame-to-frame change of each action dimension, over the dataset."""
    steps = [np.abs(np.diff(demos.actions[episode.rows], axis=0)) for episode in demos.episodes if episode.length > 1]
    return np.quantile(np.concatenate(steps), 0.99, axis=0) if steps else np.zeros(demos.robot.action_dim)


def _range(values: np.ndarray) -> np.ndarray:
    """Range of each dimension (max - min), at least 1e-9."""
    return np.maximum(np.ptp(values, axis=0), 1e-9)


def _leading(flags: np.ndarray) -> int:
    """Number of leading True values."""
    return int(np.argmin(flags)) if not flags.all() else len(flags)
