"""Return values of environments, by space, dtype and shape: read correctly or rejected with a reason."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from vla.config import AdapterConfig
from vla.errors import VLAError
from vla.simulation import adapter as simulator
from vla.simulation.experts import consult

RGB = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
GREY = RGB[..., 0]
UNIT = RGB.astype(np.float32) / 255
ALPHA = np.dstack([RGB, np.full((16, 24), 9, np.uint8)])


class World(gym.Env):
    """Returns its arguments. `image` may be a function of the step."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012  (Gymnasium's own convention)

    def __init__(self, image=RGB, space=None, state=(0.5, 1.0), actions=None, infos=None, render_mode=None, **returned):
        self.image, self.state, self.infos, self.render_mode = image, state, infos or {}, render_mode
        self.action_space = actions or spaces.Box(-1, 1, (2,))
        self.observation_space = spaces.Dict({"image": space or spaces.Box(0, 255, (16, 24, 3), np.uint8)})
        self.returned = {"reward": 0.0, "terminated": False, "truncated": False} | returned
        self.executed = None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        start = {"observation": self._see(), "info": self.infos.get(0, {"instruction": "go"})}
        return self.returned.get("reset", (start["observation"], start["info"]))

    def step(self, action):
        assert self.action_space.contains(action), (action, action.dtype)
        self.executed, self.steps = action, self.steps + 1
        info = self.infos.get(self.steps, {"is_success": True})
        return self._see(), *(self.returned[name] for name in ("reward", "terminated", "truncated")), info

    def render(self):
        return self.image

    def _see(self):
        now = [part(self.steps) if callable(part) else part for part in (self.image, self.state)]
        return {"image": now[0], "state": now[1]}


gym.register("spaces/World-v0", World)


def make(adapter=None, **kwargs):
    values = {"images": {"top": "image"}, "state": ("state",)} | (adapter or {})
    return simulator.make("spaces/World-v0", AdapterConfig(kwargs=kwargs, **values))


def refused(message: str):
    return pytest.raises(VLAError, match=message)


def check(act, expected):
    """Check that `act()` equals `expected`, or, if this is a string, raises an error that matches it."""
    if isinstance(expected, str):
        with refused(expected):
            act()
    else:
        np.testing.assert_array_equal(act(), expected)


def floats(low, high):
    return spaces.Box(low, high, (16, 24, 3), np.float32)


IMAGES = {
    "uint8": (RGB, None, RGB),
    "uint8, channels first": (RGB.transpose(2, 0, 1), None, RGB),
    "uint8, read-only": (np.broadcast_to(RGB, RGB.shape), None, RGB),
    "uint8, not contiguous": (np.repeat(RGB, 2, axis=1)[:, ::2], None, RGB),
    "uint8, mirrored view": (RGB[::-1], None, RGB[::-1]),
    "nested lists": (RGB.tolist(), None, RGB),
    "RGBA": (ALPHA, None, RGB),
    "RGBA, floats": (ALPHA.astype(np.float64) / 255, None, RGB),
    "grey": (GREY, None, np.dstack([GREY] * 3)),
    "grey, one channel": (GREY[..., None], None, np.dstack([GREY] * 3)),
    "grey, one channel first": (GREY[None], None, np.dstack([GREY] * 3)),
    "grey, floats": (UNIT[..., 0], None, np.dstack([GREY] * 3)),
    "bool": (GREY > 99, None, np.dstack([(GREY > 99) * np.uint8(255)] * 3)),
    "int64": (RGB.astype(np.int64), spaces.Box(0, 255, RGB.shape, np.int64), RGB),
    "int32": (RGB.astype(np.int32), None, RGB),
    "uint32": (RGB.astype(np.uint32), None, RGB),
    "float16 in 0..1": (UNIT.astype(np.float16), floats(0, 1), RGB),
    "float32 in 0..1": (UNIT, floats(0, 1), RGB),
    "float64 in 0..1": (UNIT.astype(np.float64), floats(0, 1), RGB),
    "floats in 0..1, channels first": (UNIT.transpose(2, 0, 1), spaces.Box(0, 1, (3, 16, 24)), RGB),
    "floats in 0..1, space of bytes": (UNIT, None, RGB),
    "floats in 0..1, unbounded space": (UNIT, floats(-np.inf, np.inf), RGB),
    "floats in 0..255 by their space": (RGB.astype(np.float32), floats(0, 255), RGB),
    "dark floats in 0..255 by their space": (RGB.astype(np.float32) / 255, floats(0, 255), (RGB > 127).astype(int)),
    "floats beyond 1": (RGB.astype(np.float32), None, r"must be in 0\.\.1, got 0 to 255.*Box\(0, 255\)"),
    "floats in -1..1": (2 * UNIT - 1, floats(-1, 1), r"in -1\.\.1.*ambiguous"),
    "floats below 0": (2 * UNIT - 1, None, r"must be in 0\.\.1, got -1"),
    "floats with NaN": (np.full_like(UNIT, np.nan), None, r"must be in 0\.\.1"),
    "int64 beyond 255": (RGB.astype(np.int64) + 1, None, r"must be in 0\.\.255, got 1 to 256"),
    "int64 below 0": (RGB.astype(np.int64) - 1, None, r"must be in 0\.\.255, got -1"),
    "int8": (RGB.astype(np.int8), None, "expected uint8.*got int8"),
    "int16": (RGB.astype(np.int16), None, "expected uint8.*got int16"),
    "uint16": (RGB.astype(np.uint16), None, r"got uint16 \(a depth image\?\)"),
    "complex": (UNIT.astype(complex), None, "expected uint8.*got complex128"),
    "text": ("an image", None, r"expected an image \[height, width, 3\], got shape \[\]"),
    "a vector": (RGB.ravel(), None, r"an image.*got shape \[1152\]\. The observation contains: 'image' \[1152\]"),
    "a batch of one": (RGB[None], None, r"got shape \[1, 16, 24, 3\]\. Pass a single frame"),
    "stacked RGB": (np.stack([RGB] * 4), None, r"got shape \[4, 16, 24, 3\]\. Pass a single frame"),
    "stacked in channels": (np.dstack([RGB] * 2), None, r"expected 3 colour channels.*\[16, 24, 6\]"),
    "stacked grey, or RGBA, first": (np.stack([GREY] * 4), None, r"\[4, 16, 24\]\. If these are stacked frames"),
    "two channels": (RGB[..., :2], None, r"expected 3 colour channels.*\[16, 24, 2\]"),
    "tiny": (RGB[:4, :4], None, "4 x 4 is too small"),
    "3 x 24 x 3": (RGB[:3], None, "3 x 24 is too small"),
    "empty": (RGB[:0], None, "0 x 24 is too small"),
    "ragged": ([[1, 2], [3]], None, "'image' is not an array"),
    "a tuple of frames": ((RGB, RGB), None, "Valid: 'image.0', 'image.1', 'state'"),
    "a mapping": ({"rgb": RGB, "depth": GREY}, None, "Valid: 'image.rgb', 'image.depth'"),
    "None": (None, None, r"expected an image.*got shape \[\]"),
}


@pytest.mark.parametrize(("image", "space", "expected"), IMAGES.values(), ids=IMAGES)
def test_images(image, space, expected):
    check(lambda: make(image=image, space=space).reset()[0]["pixels"]["top"], expected)


def test_images_are_flipped_after_conversion():
    env = make({"flip": ("top",)}, image=RGB.transpose(2, 0, 1))
    np.testing.assert_array_equal(env.reset()[0]["pixels"]["top"], RGB[::-1, ::-1])


CHANGES = {
    "size": (RGB[:8], r"expected uint8 \[16, 24, 3\] as in its first image, got uint8 \[8, 24, 3\]"),
    "type": (UNIT, r"expected uint8 .* got float32"),
    "layout": (RGB.transpose(2, 0, 1), r"expected .* got uint8 \[3, 16, 24\]"),
}


@pytest.mark.parametrize(("later", "message"), CHANGES.values(), ids=CHANGES)
def test_a_camera_keeps_its_format(later, message):
    env = make(image=lambda step: RGB if step < 2 else later)
    env.reset()
    env.step(np.zeros(2))
    with refused(message):
        env.step(np.zeros(2))


def test_the_range_of_floats_is_not_inferred_from_each_frame():
    env = make(image=lambda step: RGB.astype(np.float32) * (step > 0))  # the first image is black
    env.reset()
    with refused(r"must be in 0\.\.1, got 0 to 255"):
        env.step(np.zeros(2))


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (RGB, RGB),
        (RGB.transpose(2, 0, 1), RGB),
        (UNIT, RGB),
        ([RGB], r"render\(\) returned a list of images.*rgb_array"),
        ("+--+", r"render\(\) returned text.*rgb_array"),
        (None, r"render\(\) returned nothing.*rgb_array"),
        ({"top": RGB}, r"expected an image"),
    ],
    ids=["HWC", "CHW", "float", "list", "ansi", "None", "dict"],
)
def test_rendered_images(image, expected):
    check(lambda: make({"images": {"top": "render()"}}, image=image).reset()[0]["pixels"]["top"], expected)


STATES = {
    "float64": (np.array([0.1, 2.0]), ("state",), np.float32([0.1, 2.0])),
    "float16": (np.float16([0.5, 2.0]), ("state",), [0.5, 2]),
    "int64": (np.array([3, 4]), ("state",), [3, 4]),
    "uint8": (np.uint8([3, 255]), ("state",), [3, 255]),
    "bool": (np.array([True, False]), ("state",), [1, 0]),
    "0-d": (np.array(0.5), ("state",), [0.5]),
    "a number (Discrete)": (7, ("state",), [7]),
    "2-D": (np.arange(6.0).reshape(2, 3), ("state",), range(6)),
    "MultiBinary": (np.int8([0, 1, 1]), ("state",), [0, 1, 1]),
    "tuple of numbers": ((0.5, 1), ("state",), [0.5, 1]),
    "list of numbers": ([0.5, 1], ("state",), [0.5, 1]),
    "tuple of arrays": ((np.zeros(2), np.ones(1)), ("state.1", "state.0"), [1, 0, 0]),
    "Dict in a Tuple": (({"arm": np.ones(2)}, 4), ("state.0.arm", "state.1"), [1, 1, 4]),
    "keys with dots": ({"arm.left": {"pos": 1.0}}, ("state.arm.left.pos",), [1]),
    "Graph": (spaces.GraphInstance(np.ones((1, 2)), np.zeros((1, 1)), np.zeros((1, 2))), ("state.nodes",), [1, 1]),
    "OneOf": ((np.int64(1), np.ones(2)), ("state.1",), [1, 1]),
    "Sequence": ((np.ones(1), np.zeros(1)), ("state",), r"Valid: 'image', 'state.0', 'state.1'"),
    "Dict": ({"arm": np.ones(2)}, ("state",), "Valid: 'image', 'state.arm'"),
    "Text": ("up", ("state",), "'state' must be numeric, got dtype <U2"),
    "complex": (np.ones(2) * 1j, ("state",), "must be numeric, got dtype complex128"),
    "None": (None, ("state",), "must be numeric, got dtype object"),
    "ragged": ([[1.0], [2.0, 3.0]], ("state",), "'state' is not an array"),
    "missing": (None, ("agent_pos",), r"adapter.state: unknown path.*'agent_pos'.*`state: \[\]`"),
    "index out of range": (
        (np.zeros(2), np.ones(1)),
        ("state.2",),
        r"unknown path.*'state.2'.*Valid: 'image', 'state.0', 'state.1'",
    ),
    "NaN": (np.array([np.nan, 1]), ("state",), "state: not finite: state_0=nan"),
    "beyond float32": (np.array([1e300, 1]), ("state",), "state: not finite: state_0=inf"),
}


@pytest.mark.parametrize(("state", "paths", "expected"), STATES.values(), ids=STATES)
def test_states(state, paths, expected):
    def read():
        found = make({"state": paths}, state=state).reset()[0]["agent_pos"]
        assert found.dtype == np.float32 and found.ndim == 1
        return found

    check(read, np.asarray(expected) if not isinstance(expected, str) else expected)


def test_a_state_keeps_its_size():
    env = make(state=lambda step: np.zeros(2 + step))
    env.reset()
    with refused("the size of the state state has changed from 2 to 3"):
        env.step(np.zeros(2))


def test_an_observation_of_a_tuple_is_read_by_index(monkeypatch):
    monkeypatch.setattr(World, "_see", lambda self: (UNIT, np.ones(2)))
    env = make({"images": {"top": "0"}, "state": ("1",)})
    np.testing.assert_array_equal(env.reset()[0]["pixels"]["top"], RGB)
    with refused(r"adapter.images, '1'.*got shape \[2\]\. The observation contains: '0' \[16, 24, 3\], '1' \[2\]"):
        make({"images": {"top": "1"}, "state": ("1",)})


ACTIONS = {
    "float32": (spaces.Box(-1, 1, (2,)), [0.25, -9], [0.25, -1]),
    "float64": (spaces.Box(-1, 1, (2,), np.float64), [0.1, -9], np.array([0.1, -1])),
    "float16": (spaces.Box(-1, 1, (2,), np.float16), [0.25, -9], [0.25, -1]),
    "bounds of each": (spaces.Box(np.float32([-1, 0]), np.float32([2, 5])), [9, -9], [2, 0]),
    "unbounded": (spaces.Box(-np.inf, np.inf, (2,)), [900, -9], [900, -9]),
    "bounded below": (spaces.Box(0, np.inf, (2,)), [900, -9], [900, 0]),
    "int8": (spaces.Box(-3, 3, (2,), np.int8), [0.6, -1.9], [1, -2]),
    "int64": (spaces.Box(0, 1, (2,), np.int64), [0.9, 0.2], [1, 0]),
    "uint8": (spaces.Box(0, 255, (2,), np.uint8), [254.7, -3], [255, 0]),
    "int32, unbounded": (spaces.Box(-np.inf, np.inf, (2,), np.int32), [700.6, -7], [701, -7]),
    "bool": (spaces.Box(0, 1, (2,), np.bool_), [0.9, 0.2], [True, False]),
    "0-d": (spaces.Box(-1, 1, ()), [0.5], "must be a one-dimensional Box, got Box.*Wrap the environment"),
    "2-D": (spaces.Box(-1, 1, (2, 3)), [0.5], "got Box.*Use a single environment, not a vector one"),
    "Discrete": (spaces.Discrete(4), [1], r"got Discrete\(4\)\. Discrete actions are not supported"),
    "MultiDiscrete": (spaces.MultiDiscrete([3, 4]), [1, 2], "got MultiDiscrete.*wrap the environment"),
    "MultiBinary": (spaces.MultiBinary(3), [1, 0, 1], "got MultiBinary.*wrap the environment"),
    "Dict": (spaces.Dict(arm=spaces.Box(-1, 1, (6,)), grip=spaces.Box(-1, 1, (1,))), [0], "Dict.*flatten_space"),
    "Tuple": (spaces.Tuple([spaces.Box(-1, 1, (2,)), spaces.Discrete(2)]), [0], "Tuple.*flatten_space"),
    "Sequence": (spaces.Sequence(spaces.Box(-1, 1, (2,))), [0], "Sequence.*one-dimensional Box"),
    "Text": (spaces.Text(9), [0], "Text.*one-dimensional Box"),
    "Graph": (spaces.Graph(spaces.Box(-1, 1, (2,)), None), [0], "Graph.*one-dimensional Box"),
    "OneOf": (spaces.OneOf([spaces.Box(-1, 1, (2,))]), [0], "OneOf.*one-dimensional Box"),
}


@pytest.mark.parametrize(("space", "action", "expected"), ACTIONS.values(), ids=ACTIONS)
def test_actions(space, action, expected):
    def execute():
        env = make({"expert": "random"}, actions=space)
        env.reset()
        env.step(np.float64(action))
        recorded = consult(Says(action), env.action_space)[0]
        np.testing.assert_array_equal(recorded, env.unwrapped.executed.astype(np.float32))
        drawn = np.array([consult(env.make_expert(seed=seed), env.action_space)[0] for seed in range(20)])
        assert drawn.std() > 0 and all(env.action_space.contains(row.astype(space.dtype)) for row in drawn)
        return env.unwrapped.executed

    if not isinstance(expected, str):
        expected = np.asarray(expected, space.dtype)
    check(execute, expected)


class Says:
    def __init__(self, action):
        self.action = action

    def act(self):
        return self.action


def test_a_vector_environment_is_rejected():
    gym.register("spaces/Batch-v0", lambda **_: gym.vector.SyncVectorEnv([World, World]))
    with refused("must inherit from the gymnasium.Env class.*SyncVectorEnv"):
        simulator.make("spaces/Batch-v0")


@pytest.mark.parametrize("action", [0.5, [0.5], [[0.5, 0.5]], [0.5] * 3], ids=str)
def test_actions_are_not_broadcast(action):
    env = make()
    env.reset()
    with refused("shape"):
        consult(Says(action), env.action_space)
    with refused("action: expected 2 entries"):
        env.step(np.float64(action))


def test_actions_with_nan_are_rejected():
    env = make(actions=spaces.Box(-1, 1, (2,), np.int8))
    env.reset()
    with refused("action: not finite: action_1=nan"):
        env.step(np.array([0, np.nan]))
    assert env.unwrapped.executed is None


SUCCESS = {  # values of info["is_success"] at steps 0, 1, ...; `...`: no such entry; the last value is at the end
    "bool": ([False, False, True], [False, False, True]),
    "numpy bool": ([np.False_, np.True_], [False, True]),
    "0-d array": ([np.array(False), np.array(True)], [False, True]),
    "array of one": ([np.array([0]), np.array([1])], [False, True]),
    "array of several": ([np.array([1, 0]), np.array([1, 1])], [False, True]),
    "numbers": ([0.4, 0.6, 0.5], [False, True, True]),
    "list of numbers": ([[0, 1], [1, 1]], [False, True]),
    "at the end only": ([..., ..., True], [False, False, True]),
    "at the end only, a failure": ([..., ..., False], [False, False, False]),
    "not at reset": ([..., False, True], [False, False, True]),
    "None until the end": ([None, None, True], [False, False, True]),
    "once, when it happens": ([..., True, ...], [False, True, True]),
    "taken back": ([False, True, False], [False, True, False]),
    "never": ([..., ..., ...], "This entry was missing in all steps"),
    "at reset only": ([False, ...], "This entry was missing in all steps"),
    "None at the end": ([False, None], "This entry was missing in all steps"),
    "text": ([..., "success"], "'is_success' must be a boolean or a number .*, got 'success'"),
    "bytes": ([..., b"yes"], "must be a boolean or a number"),
    "NaN": ([..., np.nan], "must be a boolean or a number"),
    "empty": ([..., np.zeros(0)], "must be a boolean or a number"),
    "nested": ([..., {"all": True}], "Valid: 'is_success.all'"),
}


@pytest.mark.parametrize(("values", "expected"), SUCCESS.values(), ids=SUCCESS)
def test_success(values, expected):
    def flags():
        infos = {step: {} if value is ... else {"is_success": value} for step, value in enumerate(values)}
        env = make({"instruction": "go", "max_steps": len(values) - 1}, infos=infos)
        env.reset()  # an earlier episode has no effect
        env.step(np.zeros(2)) if len(values) > 2 else None
        seen = [env.reset()[1]["is_success"]]
        return seen + [env.step(np.zeros(2))[4]["is_success"] for _ in values[1:]]

    check(flags, expected)


def test_success_may_be_nested():
    env = make({"success": "episode.0.ok", "max_steps": 1}, infos={1: {"episode": ({"ok": np.True_},)}})
    env.reset()
    assert env.step(np.zeros(2))[4]["is_success"] is True


INSTRUCTIONS = {
    "str": ("push", "push"),
    "numpy str": (np.str_("push"), "push"),
    "bytes": (b"push", "push"),
    "UTF-8": ("schön".encode(), "schön"),
    "numpy bytes": (np.bytes_(b"push"), "push"),
    "0-d array": (np.array("push"), "push"),
    "array of bytes": (np.array([b"push"]), "push"),
    "object array": (np.array([b"push"], object), "push"),
    "a number": (3, "!its instruction must be a string, got 3"),
    "two": (np.array(["push", "pull"]), "!its instruction must be a string"),
    "a list": (["push"], "!its instruction must be a string"),
    "not UTF-8": (b"\xff\xfe", "!its instruction must be a string"),
    "a mapping": ({"text": "push"}, "!its instruction must be a string"),
    "None": (None, "!has no instruction"),
    "blank": (" ", "!has no instruction"),
}


@pytest.mark.parametrize(("value", "expected"), INSTRUCTIONS.values(), ids=INSTRUCTIONS)
def test_instructions(value, expected):
    if expected.startswith("!"):
        with refused(expected[1:]):
            make(infos={0: {"instruction": value}})
        return
    env = make(infos={0: {"instruction": "wait"}, 1: {"instruction": value, "is_success": False}})
    assert env.reset()[1]["instruction"] == "wait"
    assert env.step(np.zeros(2))[4]["instruction"] == expected


RETURNED = {
    "numpy": ({"reward": np.float32(0.5), "terminated": np.True_, "truncated": np.False_}, (0.5, True, False)),
    "arrays of one": ({"reward": np.array([0.5]), "terminated": np.array([True])}, (0.5, True, False)),
    "integers": ({"reward": 1, "terminated": 0, "truncated": 1}, (1.0, False, True)),
    "no reward": ({"reward": None}, "the reward must be one number or boolean, got None"),
    "rewards": ({"reward": np.zeros(3)}, "the reward must be one number.*Vector environments"),
    "ends": ({"terminated": np.array([True, False])}, "terminated must be one number or boolean.*Vector environments"),
    "no end": ({"truncated": None}, "truncated must be one number or boolean, got None"),
    "text": ({"reward": "much"}, "the reward must be one number"),
}


@pytest.mark.parametrize(("returned", "expected"), RETURNED.values(), ids=RETURNED)
def test_rewards_and_ends(returned, expected):
    env = make(**returned)
    env.reset()
    check(lambda: env.step(np.zeros(2))[1:4], expected)


@pytest.mark.parametrize(
    ("reset", "message"),
    [
        ({"image": RGB, "state": np.zeros(2)}, r"reset\(\) must return \(observation, info\), got dict"),
        (({"image": RGB}, None), r"must return \(observation, info\)"),
    ],
    ids=["old Gym", "no info"],
)
def test_reset_of_other_apis(reset, message):
    with refused(message):
        make(reset=reset)


def test_a_step_without_info():
    env = make(infos={1: None})
    env.reset()
    with refused("info must be a dict, got NoneType"):
        env.step(np.zeros(2))


def test_an_endless_episode_of_an_environment_without_a_limit_is_an_error(monkeypatch):
    from vla.simulation.pool import EnvServer

    monkeypatch.setattr(simulator, "LONGEST", 5)
    values = {"images": {"top": "image"}, "state": ("state",)}
    endless, limited = EnvServer(AdapterConfig(**values)), EnvServer(AdapterConfig(**values, max_steps=9))
    for host in (endless, limited):
        host.reset("spaces/World-v0", 0, record=False)
    with refused(r"has not ended after 5 steps\. Set adapter.max_steps"):
        endless.run(np.zeros((9, 2)))
    assert limited.run(np.zeros((20, 2))).truncated


@pytest.mark.parametrize("value", [np.array([1.0, 2.0]), {"a": 1}, True, None, 0.5], ids=str)
def test_entries_of_info_with_other_meanings_are_ignored(value):
    """`reached` and `target` of this package are names or indices; another package's "target" may be a position."""
    from vla.simulation.pool import EnvServer

    infos = {1: {"is_success": False, "reached": value, "target": value}}
    host = EnvServer(AdapterConfig(kwargs={"infos": infos}, images={"top": "image"}, state=("state",)))
    host.reset("spaces/World-v0", 0, record=False)
    stretch = host.run(np.zeros((1, 2)))
    assert stretch.reached is None and stretch.target is None
