"""Raw training samples: the observation at one frame and the action chunk that follows.

Owns: decoded and resized frames, from a cache or from the videos, the split into training and validation episodes, and
the sample of each draw. A sample depends only on the seed and the draw number, so a resumed run draws the same samples
as an uninterrupted one, for any number of workers and devices. It does not know tokens or tensors.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from filelock import FileLock

from vla.config import AugmentConfig
from vla.data.reader import Demonstrations
from vla.errors import ConfigError, DataError
from vla.support.progress import Progress
from vla.transforms.images import TRANSFORMS, augment


@dataclasses.dataclass(frozen=True)
class Sample:
    """One frame and the action chunk that follows it.

    Attributes:
        images: uint8 [C, S, S, 3], one image per camera.
        state: float32 [S'], in the robot's units; empty if the dataset has no state.
        chunk: float32 [H, D], in the robot's units; past the end of the episode, the last action is repeated.
        valid: bool [H], the actions to learn: False past the end of the episode and in the action prefix.
        instruction: the instruction of the demonstration.
        source: index of the dataset in the mixture.
        state_noise: float32 [S'], to be added to the normalised state.
        state_masked: whether to replace the normalised state by zeros.
    """

    images: np.ndarray
    state: np.ndarray
    chunk: np.ndarray
    valid: np.ndarray
    instruction: str
    source: int
    state_noise: np.ndarray | float = 0.0
    state_masked: bool = False


def cached_frames(demos: Demonstrations, cameras: Sequence[str], size: int, transform: str = "area") -> np.ndarray:
    """All frames of `cameras`, uint8 [N, C, size, size, 3], after the image transform `transform`. The first call
    decodes them to a cache file; other processes wait for it.

    The file is loaded into memory if the copies of all processes on this machine fit into half of the available memory.
    Otherwise it is memory-mapped, and random reads from a slow disk slow down training (docs/log.md).

    The file is in `<dataset>/.cache`, or in the system's temporary folder if the dataset is not writable. Its name
    contains the dataset's fingerprint, so that it is not used after the data change.
    """
    suffix = "" if transform == "area" else f"-{transform}"
    name = f"frames-{demos.fingerprint[:16]}-{'-'.join(cameras)}-{size}{suffix}.npy"
    folder = demos.root / ".cache"
    try:
        folder.mkdir(exist_ok=True)
        (folder / ".writable").touch()
    except OSError:
        folder = Path(tempfile.gettempdir()) / "vla-frames"
        folder.mkdir(exist_ok=True)
    path = folder / name
    with FileLock(folder / f".{name}.lock"):
        if not path.exists():
            _decode(demos, cameras, size, TRANSFORMS[transform], path)
    return np.load(path, mmap_mode=None if _fits(path.stat().st_size) else "r")


class VideoFrames:
    """The frames that `cached_frames` returns, decoded from the videos whenever they are read.

    Needs neither disk space nor memory, but decodes a few frames for each frame that is read: a key frame and those
    between. Processes that load data (`workers`) decode in parallel.
    """

    def __init__(self, demos: Demonstrations, cameras: Sequence[str], size: int, transform: str = "area") -> None:
        if stored := [camera for camera in cameras if demos.info.cameras[camera] not in demos.info.video_keys]:
            raise ConfigError(
                f"frames 'video' needs videos, but {demos.root} has the images of {', '.join(stored)} in its data "
                "files. Set frames to 'cache'."
            )
        self._demos, self._cameras, self._size, self._transform = demos, cameras, size, transform

    def __getitem__(self, frame: int) -> np.ndarray:
        transform = TRANSFORMS[self._transform]
        return np.stack([transform(self._demos.frame(frame, camera), self._size) for camera in self._cameras])


def open_frames(
    demos: Demonstrations, cameras: Sequence[str], size: int, transform: str = "area", source: str = "auto"
) -> np.ndarray | VideoFrames:
    """The frames of a dataset, indexed by row: uint8 [C, size, size, 3].

    Args:
        source: "cache": `cached_frames`. "video": `VideoFrames`. "auto": the cache if it fits into memory, or if images
            are not stored as videos; else the videos.
    """
    if source == "auto":
        videos = all(demos.info.cameras[camera] in demos.info.video_keys for camera in cameras)
        fits = _fits(demos.num_frames * len(cameras) * size * size * 3)
        source = "video" if videos and not fits else "cache"
    return (cached_frames if source == "cache" else VideoFrames)(demos, cameras, size, transform)


def _fits(size: int) -> bool:
    """Whether a copy of `size` bytes in each process on this machine fits into half of the available memory."""
    copies = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by `accelerate launch`
    return size * copies <= psutil.virtual_memory().available / 2


def _decode(
    demos: Demonstrations,
    cameras: Sequence[str],
    size: int,
    transform: Callable[[np.ndarray, int], np.ndarray],
    path: Path,
) -> None:
    """Write the cache file atomically."""
    shape = (demos.num_frames, len(cameras), size, size, 3)
    with tempfile.NamedTemporaryFile(prefix=".frames-", suffix=".npy", dir=path.parent, delete=False) as file:
        scratch = Path(file.name)
    try:
        frames = np.lib.format.open_memmap(scratch, "w+", np.uint8, shape)
        # Allocate the disk space first: if the disk were full during a write to the mapped file, the process would be
        # killed without a message.
        if hasattr(os, "posix_fallocate"):
            with scratch.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, scratch.stat().st_size)
        with Progress(len(demos.episodes), "episodes") as progress:
            for episode in demos.episodes:
                for index, camera in enumerate(cameras):
                    for offset, frame in enumerate(demos.frames(episode.index, camera)):
                        frames[episode.start + offset, index] = transform(frame, size)
                progress.advance(f"decoding {demos.root.name} once, to {path.parent.name}/{path.name}")
        frames.flush()
        del frames
        scratch.chmod(0o644)
        scratch.rename(path)
    except OSError as error:
        gib = np.prod(shape, dtype=np.int64) / 2**30
        raise DataError(
            f"cannot write the decoded frames of {demos.root} ({gib:.1f} GiB) to {path.parent}: {error}"
        ) from None
    finally:
        scratch.unlink(missing_ok=True)


def split_episodes(demos: Demonstrations, val_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split by episode into (training, validation) frame indices. With two or more episodes, each set has at least one
    episode, unless `val_fraction` is 0."""
    count = len(demos.episodes)
    n_val = 0 if count < 2 or val_fraction <= 0 else min(count - 1, max(1, round(val_fraction * count)))
    held_out = set(np.random.default_rng(seed).permutation(count)[:n_val].tolist())
    sides: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for position, episode in enumerate(demos.episodes):
        sides[position in held_out].append(np.arange(episode.start, episode.start + episode.length))
    train, val = (np.concatenate(side) if side else np.zeros(0, np.int64) for side in sides)
    return train, val


class ChunkSamples:
    """The samples of one dataset, indexed by frame."""

    def __init__(
        self,
        demos: Demonstrations,
        cameras: Sequence[str],
        size: int,
        horizon: int,
        source: int,
        transform: str = "area",
        frames: str = "auto",
    ) -> None:
        self.demos, self.horizon, self.source = demos, horizon, source
        self.frames = open_frames(demos, cameras, size, transform, frames)
        self._ends = np.zeros(demos.num_frames, np.int64)
        for episode in demos.episodes:
            self._ends[episode.start : episode.start + episode.length] = episode.start + episode.length
        self._states = demos.states if demos.states is not None else np.zeros((demos.num_frames, 0), np.float32)

    def __getitem__(self, frame: int) -> Sample:
        steps = frame + np.arange(self.horizon)
        valid = steps < self._ends[frame]
        return Sample(
            images=np.asarray(self.frames[frame]),
            state=self._states[frame],
            chunk=self.demos.actions[np.minimum(steps, self._ends[frame] - 1)],
            valid=valid,
            instruction=self.demos.tasks[self.demos.task_index[frame]],
            source=self.source,
        )

    def with_action_prefix(self, frame: int, rng: np.random.Generator) -> Sample:
        """A prefix-conditioned sample at `frame`, as when actions are executed while the next chunk is decoded.

        The first k actions, with k uniform in 1..max(1, H // 2), are the executed actions (with noise, if the
        demonstrator was noisy), and are masked out of the loss. Source: training-time action conditioning (Black et
        al., arXiv:2512.05964).
        """
        sample, end = self[frame], int(self._ends[frame])
        count = int(rng.integers(1, max(1, self.horizon // 2) + 1))
        executed = self.demos.actions if self.demos.executed_actions is None else self.demos.executed_actions
        chunk, valid = sample.chunk.copy(), sample.valid.copy()
        chunk[:count] = executed[np.minimum(frame + np.arange(count), end - 1)]
        valid[:count] = False
        return dataclasses.replace(sample, chunk=chunk, valid=valid)


class Mixture:
    """A weighted mixture of datasets, as a map-style dataset of `draws` samples, indexed by draw number.

    Args:
        sources: the datasets.
        frames: per dataset, the frame indices to draw from.
        weights: relative sampling weight of each dataset; None: its number of frames.
        seed: random seed of the draws.
        draws: number of samples.
        augmentation: augmentation of images and state, and prefix conditioning; None disables all of them.
        hard_frames: fraction of the samples drawn with probabilities in proportion to `errors`. The others are drawn
            uniformly.
        errors: per dataset, a non-negative number for each entry of `frames`.
    """

    def __init__(
        self,
        sources: Sequence[ChunkSamples],
        frames: Sequence[np.ndarray],
        weights: Sequence[float] | None,
        seed: int,
        draws: int,
        augmentation: AugmentConfig | None,
        hard_frames: float = 0.0,
        errors: Sequence[np.ndarray] = (),
    ) -> None:
        if any(not len(indices) for indices in frames):
            raise DataError("a dataset has no training frames after the validation split.")
        sizes = np.array([len(indices) for indices in frames], float)
        shares = sizes if not weights else np.asarray(weights, float)
        if len(shares) != len(sources) or (shares < 0).any() or not shares.sum() > 0:
            raise ConfigError(f"`weights` needs one non-negative number per dataset, got {list(shares)}.")
        self._edges = np.cumsum(shares / shares.sum())
        self._sources, self._frames, self._seed, self._draws = sources, frames, seed, draws
        self._augmentation, self._hard_frames = augmentation, hard_frames
        hardness = [each if each.any() else np.ones(len(each)) for each in errors]
        self._hardest = [np.cumsum(each) / each.sum() for each in hardness]

    def __len__(self) -> int:
        return self._draws

    def __getitem__(self, draw: int) -> Sample:
        rng = np.random.Generator(np.random.Philox(key=[self._seed, draw]))
        source = min(int(np.searchsorted(self._edges, rng.random(), side="right")), len(self._sources) - 1)
        indices = self._frames[source]
        if self._hard_frames and rng.random() < self._hard_frames:
            place = min(int(np.searchsorted(self._hardest[source], rng.random(), side="right")), len(indices) - 1)
        else:
            place = int(rng.integers(len(indices)))
        frame = int(indices[place])
        if self._augmentation is None:
            return self._sources[source][frame]
        samples, share = self._sources[source], self._augmentation.prefix
        sample = samples.with_action_prefix(frame, rng) if share and rng.random() < share else samples[frame]
        images = augment(sample.images, self._augmentation, rng)
        return dataclasses.replace(sample, images=images, **_augmented_state(self._augmentation, sample.state, rng))


def _augmented_state(config: AugmentConfig, state: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
    noise, mask = config.state_noise, config.state_mask
    return {
        "state_noise": (noise * rng.standard_normal(len(state))).astype(np.float32) if noise else 0.0,
        "state_masked": bool(mask and rng.random() < mask),
    }
