"""The adapter: environments with any layout, described by configuration, and its error messages."""

import importlib.util
import re
import sys

import gymnasium as gym
import numpy as np
import pytest

from vla.config import AdapterConfig
from vla.errors import SimulatorError, SpecError
from vla.simulation import adapter as simulator

SIZE = 12


class Odd(gym.Env):
    """An environment of another package. `layout` selects its observations; its image is red at the top left corner."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 25}  # noqa: RUF012  (Gymnasium's own convention)

    def __init__(self, layout="nested", render_mode=None, info=True, fails="", **attributes):
        self.layout, self.render_mode, self.info, self.fails = layout, render_mode, info, fails
        self.action_space = gym.spaces.Box(-2.0, 2.0, (2,), np.float64)
        self.image = np.zeros((SIZE, SIZE, 3), np.uint8)
        self.image[0, 0, 0] = 255
        self.closed = False
        for name, value in attributes.items():
            setattr(self, name, value)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if self.fails == "reset":
            raise RuntimeError("no display")
        self.position = self.np_random.uniform(-1, 1, 2)
        return self._see(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.position = self.position + action
        done = bool(self.position[0] > 3)
        return (
            self._see(),
            np.float64(1.0),
            np.bool_(done),
            False,
            {"score": {"solved": float(done)}} if self.info else {},
        )

    def render(self):
        return None if self.render_mode is None else self.image

    def close(self):
        self.closed = True

    def _see(self):
        match self.layout:
            case "nested":
                sensors = {"cam": {"rgb": self.image}, "joints": self.position, "load": 0.5}
                return {"sensors": sensors, "observation.images.top": self.image}
            case "flat image":
                return self.image
            case "goal":  # gymnasium-robotics
                return {"observation": self.position, "achieved_goal": np.zeros(3), "desired_goal": np.ones(3)}
            case "own":  # gym-aloha, this package
                return {"pixels": {"top": self.image}, "agent_pos": self.position}
            case "one camera":  # gym-pusht
                return {"pixels": self.image, "agent_pos": self.position}
            case "float image":
                return {"pixels": {"top": self.image / 255}, "agent_pos": self.position}


class Steps(Odd):
    """The same with discrete actions."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.action_space = gym.spaces.Discrete(3)


for _id, _cls, _steps in (("odd/Odd-v0", Odd, 5), ("odd/Endless-v0", Odd, None), ("odd/Steps-v0", Steps, 5)):
    gym.register(_id, entry_point=_cls, max_episode_steps=_steps)


def make(layout="own", env_id="odd/Odd-v0", kwargs=None, **values):
    values = {"instruction": "go right", "success": "score.solved"} | values
    return simulator.make(env_id, AdapterConfig(kwargs={"layout": layout, **(kwargs or {})}, **values))


class Right:
    """An expert of another package; it is called with (env, seed)."""

    def __init__(self, env, seed):
        self.env, self.seed = env.unwrapped, seed

    def act(self):
        return np.array([9.0, 0.0])  # outside the limits


@pytest.mark.parametrize(
    ("layout", "images", "state", "expected"),
    [
        ("own", {}, ("agent_pos",), 2),
        ("one camera", {"top": "pixels"}, ("agent_pos",), 2),
        ("nested", {"top": "sensors.cam.rgb"}, ("sensors.joints", "sensors.load"), 3),
        ("nested", {"top": "observation.images.top"}, ("sensors.load",), 1),
        ("flat image", {"top": ""}, (), 0),
        ("goal", {"top": "render()"}, ("observation", "desired_goal"), 5),
    ],
)
def test_layouts(layout, images, state, expected):
    env = make(layout, images=images, state=state)
    observation, info = env.reset(seed=3)
    assert env.robot.cameras == ("top",) and env.robot.state_dim == expected and env.robot.control_hz == 25
    env.robot.check_observation(observation)
    assert env.observation_space.contains(observation)
    assert observation["pixels"]["top"][0, 0].tolist() == [255, 0, 0]
    if expected:
        assert observation["agent_pos"].dtype == np.float32 and observation["agent_pos"].shape == (expected,)
    else:
        assert "agent_pos" not in observation
    assert info["instruction"] == "go right" and info["is_success"] is False
    repeated, _ = env.reset(seed=3)
    assert np.array_equal(repeated.get("agent_pos", 0), observation.get("agent_pos", 0))


def test_a_flipped_image_is_rotated_by_180_degrees_and_copied():
    env = make("one camera", images={"top": "pixels", "same": "pixels"}, flip=("top",))
    image = env.reset(seed=0)[0]["pixels"]
    assert image["top"][-1, -1, 0] == 255 and image["top"][0, 0, 0] == 0 and image["same"][0, 0, 0] == 255
    env.unwrapped.image[:] = 7  # the environment reuses the memory of its image
    assert image["top"].max() == 255 and image["same"].max() == 255 and image["top"].flags["C_CONTIGUOUS"]


def test_actions_are_clipped_and_success_is_read():
    env = make()
    env.reset(seed=0)
    flags = []
    for _ in range(3):
        observation, reward, terminated, truncated, info = env.step(np.array([9, 0], np.float32))
        flags.append(info["is_success"])
        assert isinstance(reward, float) and isinstance(terminated, bool) and isinstance(truncated, bool)
        assert info["instruction"] == "go right" and info["score"]["solved"] in (0.0, 1.0)
        if terminated:
            break
    assert flags[-1] is True and flags[0] is False and observation["agent_pos"][0] > 3


@pytest.mark.parametrize("env_id", ["vla/Reach-v0", "vla-metaworld/reach-v3"])
def test_unused_images_are_not_rendered(env_id, monkeypatch):
    import envs.render

    if "metaworld" in env_id:
        pytest.importorskip("metaworld")
    rendered = []
    original = envs.render.Camera.__call__
    monkeypatch.setattr(envs.render.Camera, "__call__", lambda self, *a: rendered.append(1) or original(self, *a))
    env = simulator.make(env_id)
    cameras = len(env.robot.cameras)
    action = np.zeros(env.robot.action_dim, np.float32)
    env.reset(seed=0)
    rendered.clear()
    observation, *_ = env.step(action, images=False)
    assert not rendered and observation["pixels"] == {} and len(observation["agent_pos"]) == env.robot.state_dim
    observation, *_ = env.step(action)
    assert len(rendered) == cameras == len(observation["pixels"])
    env.step(action, images=False)
    assert len(env.reset(seed=0)[0]["pixels"]) == cameras
    env.close()


def test_time_limit_comes_from_the_registration_or_from_the_adapter():
    for adapter, expected in (({}, 5), ({"max_steps": 2}, 2)):
        env = make(**adapter)
        env.reset(seed=0)
        ends = [env.step(np.zeros(2))[3] for _ in range(expected)]
        assert ends == [False] * (expected - 1) + [True]


def test_instruction_from_the_adapter_the_info_or_the_environment():
    assert make(kwargs={"task_description": "theirs"}).reset()[1]["instruction"] == "go right"
    assert make(kwargs={"task_description": "theirs"}, instruction=None).reset()[1]["instruction"] == "theirs"
    with pytest.raises(SimulatorError, match=r"has no instruction.*`instruction: push the T`"):
        make(instruction=None)


def test_the_adapter_completes_the_robot():
    robot = {"action_names": ["x", "y"], "state_names": ["px", "py"], "control_hz": 5, "action_space": "ee_delta"}
    spec = make(robot=robot).robot
    assert spec.action_names == ("x", "y") and spec.state_names == ("px", "py") and spec.control_hz == 5
    stated = {"state_names": ["a", "b"], "action_names": ["c", "d"], "cameras": ["elsewhere"]}
    assert make(kwargs={"robot": stated}).robot.state_names == ("a", "b")
    # Other entries than the environment's, and an attribute `robot` with another meaning.
    nested = make("nested", images={"top": "sensors.cam.rgb"}, state=("sensors.load",), kwargs={"robot": stated})
    assert nested.robot.state_names == ("state_0",) and nested.robot.action_names == ("c", "d")
    assert make(kwargs={"robot": object()}).robot.action_names == ("action_0", "action_1")


def test_experts():
    env = make(expert="random")
    actions = np.array([env.make_expert(seed=1).act() for _ in range(2)])
    assert np.array_equal(actions[0], actions[1]) and env.action_space.contains(actions[0].astype(np.float64))
    assert not np.array_equal(actions[0], env.make_expert(seed=2).act())
    expert = make(expert=f"{__name__}:Right").make_expert(seed=7)
    assert isinstance(expert.env, Odd) and expert.seed == 7
    with pytest.raises(SimulatorError, match=r"has no expert.*module:callable.*random"):
        make().make_expert()
    for source in ("nowhere:expert", f"{__name__}:nobody", "nonsense"):
        with pytest.raises(SimulatorError, match="cannot load expert"):
            make(expert=source).make_expert()


def test_an_expert_in_the_working_directory_is_found(tmp_path, monkeypatch):
    (tmp_path / "my_own_expert.py").write_text("from tests.simulation.test_adapter import Right as expert\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path])
    monkeypatch.setattr("sys.meta_path", list(sys.meta_path))
    assert make(expert="my_own_expert:expert").make_expert(seed=5).seed == 5


def test_the_working_directory_never_shadows_installed_packages(tmp_path, monkeypatch):
    """A folder of recordings is not imported as a library of the same name either."""
    for name in ("colorsys.py", "my_world.py"):
        (tmp_path / name).write_text("raise ImportError('from the working directory')\n")
    (tmp_path / "datasets_of_mine").mkdir()
    (tmp_path / "my_namespace").mkdir()
    (tmp_path / "my_namespace" / "inner.py").write_text("from tests.simulation.test_adapter import Right as expert\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path])
    monkeypatch.setattr("sys.meta_path", list(sys.meta_path))
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with pytest.raises(SimulatorError, match="from the working directory"):
        make(module="my_world")
    assert "tmp" not in str(importlib.import_module("colorsys").__file__)
    assert importlib.util.find_spec("datasets_of_mine") is None
    assert make(expert="my_namespace.inner:expert").make_expert(seed=5).seed == 5


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"env_id": "odd/Odt-v0"}, SimulatorError, "Did you mean 'odd/Odd-v0'"),
        ({"env_id": "PickUp-v0"}, SimulatorError, "Did you mean 'vla/PickUp-v0'"),
        ({"env_id": "elsewhere/Thing-v0"}, SimulatorError, r"unknown environment.*`adapter.module`"),
        ({"env_id": "no_such_package:Thing-v0"}, SimulatorError, "cannot import 'no_such_package'.*Install"),
        ({"module": "no_such_package"}, SimulatorError, "cannot import 'no_such_package'"),
        ({"kwargs": {"fails": "reset"}}, SimulatorError, "failed to start: RuntimeError: no display.*vla doctor"),
        ({"env_id": "vla/Reach-v0", "kwargs": {}}, SimulatorError, r"'layout'.*\(adapter.kwargs\)"),
        ({"layout": "one camera"}, SimulatorError, r"`images: \{top: pixels\}`.*'pixels' \[12, 12, 3\]"),
        ({"layout": "goal"}, SimulatorError, r"render\(\).*'observation' \[2\]"),
        ({"images": {"top": "pixels.tap"}}, SimulatorError, r"adapter.images.*Did you mean 'pixels.top'"),
        ({"images": {"top": "pixels"}}, SimulatorError, r"adapter.images.*'pixels.top'"),
        ({"state": ("joints",)}, SimulatorError, r"adapter.state.*Valid: 'pixels.top', 'agent_pos'.*`state: \[\]`"),
        ({"layout": "flat image", "images": {"top": ""}}, SimulatorError, r"adapter.state.*`state: \[\]`"),
        ({"flip": ("bottom",)}, SimulatorError, "unknown camera in `flip` 'bottom'.*'top'"),
        ({"images": {"top": "agent_pos"}}, SpecError, "camera 'top': expected an image"),
        ({"env_id": "odd/Steps-v0"}, SimulatorError, "must be a one-dimensional Box, got Discrete"),
        ({"robot": {"action_names": ["x"]}}, SimulatorError, r"action_names has 1 names \(x\) for 2 entries"),
        ({"robot": {"state_names": ["x"]}}, SimulatorError, "state_names has 1 names"),
        ({"robot": {"controlhz": 5}}, SpecError, "Did you mean 'control_hz'"),
        ({"robot": {"cameras": ["wrist"]}}, SpecError, "unknown camera 'wrist'"),
    ],
    ids=lambda value: re.sub(r"\W+", "-", str(value))[:40] if isinstance(value, dict) else "",
)
def test_invalid_adapters_are_explained(arguments, error, message):
    with pytest.raises(error, match=message):
        make(**arguments)


def test_render_without_an_image():
    with pytest.raises(SimulatorError, match=r"render\(\) returned nothing.*render_mode: rgb_array"):
        make("goal", images={"top": "render()"}, state=(), kwargs={"render_mode": None})


@pytest.mark.parametrize(
    ("values", "message"),
    [({"success": "score.solvd"}, "Did you mean 'score.solved'"), ({"kwargs": {"info": False}}, r"Valid: \(none\)")],
)
def test_a_wrong_success_path_is_reported_at_the_end_of_the_first_episode(values, message):
    env = make(max_steps=2, **values)
    env.reset(seed=0)
    assert env.step(np.zeros(2))[4]["is_success"] is False  # many environments report success only in the last step
    with pytest.raises(SimulatorError, match=f"adapter.success.*{message}"):
        env.step(np.zeros(2))


def test_an_unsuitable_environment_is_closed(monkeypatch):
    closed = []
    monkeypatch.setattr(Odd, "close", lambda self: closed.append(True))
    with pytest.raises(SimulatorError):
        make(flip=("bottom",))
    assert closed


def test_pusht_as_configured():
    pytest.importorskip("gym_pusht")
    from pathlib import Path

    from vla.config import CollectConfig, load

    config = load(CollectConfig, Path(__file__).parents[2] / "configs" / "collect" / "pusht.yaml")
    env = simulator.make(config.env[0], config.adapter)
    observation, info = env.reset(seed=0)
    env.robot.check_observation(observation)
    assert env.robot.cameras == ("top",) and env.robot.state_names == ("x", "y") and "push the T" in info["instruction"]
    for _ in range(3):
        observation, *_, info = env.step(env.make_expert(seed=0).act())
    assert info["is_success"] is False and observation["pixels"]["top"].shape == (96, 96, 3)
    env.close()
