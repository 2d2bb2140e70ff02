"""Meta-World's environments follow the protocol of published evaluations."""

import importlib.metadata
import sys

import gymnasium as gym
import mujoco
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import envs
from envs.metaworld import MUJOCO
from envs.metaworld_instructions import PHRASES, phrases


def test_registration_and_instructions_need_no_metaworld(monkeypatch):
    assert len(envs.METAWORLD_IDS) == len(PHRASES) == 50
    assert all(env_id in gym.registry for env_id in envs.METAWORLD_IDS)
    for name in [name for name in sys.modules if name.partition(".")[0] == "metaworld"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "metaworld", None)
    monkeypatch.setattr(mujoco, "__version__", MUJOCO)
    with pytest.raises(gym.error.DependencyNotInstalled, match=r"run scripts/setup metaworld"):
        gym.make("vla-metaworld/drawer-open-v3")


def test_another_version_of_mujoco_is_rejected(monkeypatch):
    monkeypatch.setattr(mujoco, "__version__", "3.99.0")
    with pytest.raises(
        gym.error.DependencyNotInstalled, match=rf"mujoco=={MUJOCO}, but 3\.99\.0 .*run scripts/setup metaworld"
    ):
        gym.make("vla-metaworld/drawer-open-v3")


def test_the_required_version_is_the_one_that_metaworld_pins():
    pytest.importorskip("metaworld")
    assert f"mujoco=={MUJOCO}" in importlib.metadata.requires("metaworld")


def test_every_phrase_means_one_task():
    said = [phrase for task in PHRASES for kind in ("train", "heldout") for phrase in phrases(task, kind)]
    assert len(said) == len(set(said))
    for task, own in PHRASES.items():
        assert 4 <= len(own.train) <= 6 and own.heldout and phrases(task, "canonical") == own.train[:1]
        assert all(phrase == phrase.lower().strip(" .") for phrase in own.train + own.heldout)
    words = {word for task in PHRASES for phrase in phrases(task, "train") for word in phrase.replace(",", "").split()}
    unheard = {
        w for task in PHRASES for phrase in phrases(task, "heldout") for w in phrase.replace(",", "").split()
    } - words
    assert not unheard


def make(task, **kwargs):
    pytest.importorskip("metaworld")
    if mujoco.__version__ != MUJOCO:
        pytest.skip(f"Meta-World needs mujoco=={MUJOCO}, this is {mujoco.__version__}")
    return gym.make(f"vla-metaworld/{task}-v3", **{"cameras": (), **kwargs})


def hands(env, seed, steps=20):
    """States [steps + 1, 4] of an episode of the expert without noise."""
    states = [env.reset(seed=seed)[0]["agent_pos"]]
    expert = env.get_wrapper_attr("make_expert")()
    for _ in range(steps):
        states.append(env.step(expert.act())[0]["agent_pos"])
    return np.array(states)


@pytest.mark.parametrize("task", ["push", "drawer-open", "door-open", "handle-pull"])
def test_positions_depend_only_on_the_seed(task):
    env, fresh = make(task), make(task)
    first, other = hands(env, 0), hands(env, 1)
    assert np.array_equal(first, hands(env, 0)) and np.array_equal(first, hands(fresh, 0))
    assert not np.allclose(first, other, atol=1e-3)
    env.reset(seed=0)
    things = env.unwrapped._raw[4:7].copy()
    env.reset()  # without a seed, continue the random sequence
    assert not np.allclose(things, env.unwrapped._raw[4:7])
    assert env.reset(seed=4)[1] == fresh.reset(seed=4)[1]


def test_observations_contain_no_privileged_information():
    env = make("push", cameras=("corner2",))
    observation, info = env.reset(seed=0)
    assert set(observation) == {"pixels", "agent_pos"} and set(observation["pixels"]) == {"corner2"}
    assert observation["agent_pos"].shape == (4,) and observation["agent_pos"].dtype == np.float32
    assert np.allclose(observation["agent_pos"], env.unwrapped._raw[:4], atol=1e-6)
    assert np.allclose(observation["agent_pos"][:3], env.unwrapped._inner.data.body("hand").xpos, atol=1e-6)
    assert set(info) == {"instruction", "is_success"} and info["is_success"] is False
    assert info["instruction"] == env.get_wrapper_attr("task_description") in phrases("push-v3", "train")
    env.close()


def test_the_image_is_rotated_by_180_degrees():
    env = make("drawer-open", cameras=("corner2",), image_size=64)
    seen = env.reset(seed=0)[0]["pixels"]["corner2"]
    inner = env.unwrapped._inner
    assert np.allclose(inner.model.cam_pos[2], [0.75, 0.075, 0.7]) and inner.model.camera("corner2").id == 2
    with mujoco.Renderer(inner.model, 64, 64) as renderer:
        renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
        renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        renderer.update_scene(inner.data, "corner2")
        raw = renderer.render()
    assert seen.shape == (64, 64, 3) and seen.dtype == np.uint8
    assert np.abs(seen.astype(int) - raw[::-1, ::-1]).mean() < 1 < np.abs(seen.astype(int) - raw).mean()
    red = (seen[..., 0] > 90) & (seen[..., 1] < 60)  # the arm enters from the upper left
    assert np.nonzero(red)[1].mean() < 32 and red[:32].sum() > red[32:].sum() > 0
    env.close()


def test_lerobots_convention():
    """`pixels` and `agent_pos` equal those of LeRobot's environment: Meta-World's own rendering with a changed camera
    position, both image axes flipped, and the first four entries of the raw observation."""
    worlds = pytest.importorskip("metaworld.env_dict").ALL_V3_ENVIRONMENTS
    env = make("drawer-open", cameras=("corner2",), image_size=480, convention="lerobot")
    spaces = env.observation_space
    assert set(spaces) == {"pixels", "agent_pos"}
    assert spaces["pixels"].shape == (480, 480, 3) and spaces["pixels"].dtype == np.uint8
    assert spaces["agent_pos"].shape == (4,) and spaces["agent_pos"].dtype == np.float64
    assert env.action_space.dtype == np.float32 and env.action_space.shape == (4,)
    theirs = worlds["drawer-open-v3"](render_mode="rgb_array", camera_name="corner2")
    theirs._freeze_rand_vec, theirs.seeded_rand_vec, theirs._set_task_called = False, True, True
    theirs.model.cam_pos[2] = [0.75, 0.075, 0.7]
    theirs.seed(3)
    theirs.reset()
    observation, _ = env.reset(seed=3)
    for action in (np.array([0.5, -1, 0.2, 1], np.float32), np.array([-1, 0.3, 1, -1], np.float32)):
        observation, _, _, _, _ = env.step(action)
        raw, _, _, _, _ = theirs.step(action)
        assert spaces.contains(observation)
        np.testing.assert_array_equal(observation["agent_pos"], raw[:4])
        np.testing.assert_array_equal(observation["pixels"], np.flip(theirs.render(), (0, 1)))
    env.close()
    theirs.close()


def test_the_first_image_shows_this_episode():
    env, fresh = make("drawer-open", cameras=("corner2",)), make("drawer-open", cameras=("corner2",))
    env.reset(seed=1)
    assert np.array_equal(env.reset(seed=0)[0]["pixels"]["corner2"], fresh.reset(seed=0)[0]["pixels"]["corner2"])
    env.close()
    fresh.close()


@pytest.mark.parametrize("task", ["drawer-open", "door-open", "reach", "button-press-topdown", "pick-place"])
@pytest.mark.parametrize("repeat", [1, 4])
def test_the_expert_solves_the_task_and_success_ends_the_episode(task, repeat):
    env = make(task, action_repeat=repeat)
    for seed in (0, 1):
        _, info = env.reset(seed=seed)
        expert = env.get_wrapper_attr("make_expert")()
        step, over = 0, False
        while not over:
            action = expert.act()
            assert env.action_space.contains(action) and np.array_equal(action, expert.label)
            _, reward, terminated, truncated, info = env.step(action)
            assert info["is_success"] == terminated and 0 <= reward <= 10
            step, over = step + 1, terminated or truncated
        assert info["is_success"] and step < 250 / repeat


@pytest.mark.parametrize(("repeat", "limit"), [(1, 500), (4, 125), (8, 63)])
def test_an_episode_has_500_steps_for_every_action_repeat(repeat, limit):
    env = make("reach", action_repeat=repeat)
    assert env.get_wrapper_attr("robot")["control_hz"] == 80 / repeat
    env.reset(seed=0)
    ends = []
    while not (ends and any(ends[-1])):
        ends.append(env.step(np.array([0, 0, 1, 0], np.float32))[2:4])
    assert len(ends) == limit and ends[-1] == (False, True)


def test_gripper_polarity():
    env = make("reach")
    robot = env.get_wrapper_attr("robot")
    env.reset(seed=0)
    opening = {}
    for name in ("gripper_closed", "gripper_open"):
        for _ in range(25):
            observation = env.step(np.array([0, 0, 0, robot[name]], np.float32))[0]
        opening[name] = observation["agent_pos"][3]
    assert opening["gripper_open"] > 0.9 and opening["gripper_closed"] < 0.5


def test_noise_moves_the_hand_but_not_the_label():
    env = make("push")
    env.reset(seed=0)
    maker = env.get_wrapper_attr("make_expert")
    expert, again = maker(noise=1.0, seed=5), maker(noise=1.0, seed=5)
    clean = maker()
    differs = 0
    for _ in range(60):
        action = expert.act()
        assert np.array_equal(action, again.act()) and np.array_equal(expert.label, clean.act())
        assert env.action_space.contains(action) and env.action_space.contains(expert.label)
        differs += not np.array_equal(action, expert.label)
        env.step(action)
    assert differs > 3


def test_check_env_is_clean(recwarn):
    env = make("basketball", cameras=("corner2",), render_mode="rgb_array", image_size=32)
    check_env(env.unwrapped, skip_render_check=True)
    assert not [str(warning.message) for warning in recwarn]
    env.reset(seed=0)
    assert env.render().shape == (384, 384, 3)
    env.close()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"cameras": ("corner",)}, "corner2"),
        ({"image_size": 4}, "16 to 1024"),
        ({"phrasing": "heldou"}, "Did you mean 'heldout'"),
        ({"action_repeat": 0}, "1 to 500"),
        ({"task": "reech-v3"}, "Did you mean 'reach-v3'"),
    ],
)
def test_wrong_arguments_are_explained(kwargs, message):
    pytest.importorskip("metaworld")
    with pytest.raises(ValueError, match=message):
        gym.make("vla-metaworld/reach-v3", **kwargs)


def test_invalid_calls_are_explained():
    env = make("reach").unwrapped
    with pytest.raises(RuntimeError, match="reset"):
        env.step(np.zeros(4))
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"4 numbers \(dx, dy, dz, gripper\)"):
        env.step(np.zeros(7))
    with pytest.raises(ValueError, match="dz=nan"):
        env.step(np.array([0, 0, np.nan, 0]))
