"""OpenVLA's policies in LIBERO: the commands to robosuite equal those of OpenVLA's own evaluation."""

import mujoco
import numpy as np
import pytest

from envs.libero import environment
from tests import openvla_folder as published
from tests.model.test_openvla import greedy_ids, published_action
from vla.config import AdapterConfig
from vla.errors import VLAError
from vla.policy import Policy
from vla.simulation import adapter as simulation

INSTRUCTION = "pick up the Milk and place it in the basket"
#: A visible scene. LIBERO renders group 1.
SCENE = """
<mujoco>
  <worldbody>
    <light pos="0 0 3"/><geom type="plane" size="2 2 0.1" group="1" rgba="0.6 0.4 0.2 1"/>
    <geom type="box" group="1" size="0.3 0.2 0.1" pos="0.4 0.3 0" rgba="0.1 0.2 0.9 1"/>
    <camera name="agentview" pos="0 0 2"/>
  </worldbody>
</mujoco>"""


class Recorder:
    """Has the interface of `Simulator`, and records the commands."""

    def __init__(self, suite, number):
        self.instruction, self.states, self.commands = INSTRUCTION, np.zeros((50, 1)), []
        self.model = mujoco.MjModel.from_xml_string(SCENE)
        self.data = mujoco.MjData(self.model)
        mujoco.mj_forward(self.model, self.data)

    def reset(self, seed, state):
        return np.zeros(8)

    def step(self, command):
        self.commands.append(command)
        return np.zeros(8), False

    def close(self):
        pass


def make(monkeypatch, **kwargs):
    monkeypatch.setattr(environment, "Simulator", Recorder)
    adapter = AdapterConfig(images={"image": "pixels.agentview"}, kwargs={"cameras": ["agentview"], **kwargs})
    return simulation.make("envs:vla-libero/object-7", adapter)


@pytest.mark.filterwarnings("ignore:.*(The names differ|actions per second)")
def test_commands_equal_openvlas(monkeypatch, tmp_path):
    published.save(tmp_path / "openvla", published.weights())
    policy = Policy.from_pretrained(str(tmp_path / "openvla"), unnorm_key="bridge_orig", device="cpu")
    with pytest.raises(VLAError, match=r"opens its gripper with 1 and closes it with 0, .* with -1 and 1"):
        policy.robot.check_fits(make(monkeypatch).robot, tolerated=("names", "rate"))
    env = make(monkeypatch, gripper="openvla", image_size=224)
    policy.robot.check_fits(env.robot, tolerated=("names", "rate"))
    observation, info = env.reset(seed=0)
    image = observation["pixels"]["image"]
    assert image.std() > 10
    prediction = policy.predict([observation], [info["instruction"]])
    env.step(prediction.chunks[0, 0])

    action = published_action(
        greedy_ids(published.weights(), INSTRUCTION, image), published.NORM_STATS["bridge_orig"]["action"]
    )
    action[6] = -np.sign(2 * action[6] - 1)  # normalize_gripper_action(binarize=True), then invert_gripper_action
    (command,) = env.unwrapped.simulator.commands
    np.testing.assert_allclose(command, action, atol=1e-6)
    env.close()


@pytest.mark.parametrize(("gripper", "values"), [("libero", (-1.0, -0.2, 0.2, 1.0)), ("openvla", (1.0, 0.6, 0.4, 0.0))])
def test_both_gripper_conventions(monkeypatch, gripper, values):
    env = make(monkeypatch, gripper=gripper)
    env.reset(seed=0)
    for value in values:
        env.step(np.array([0, 0, 0, 0, 0, 0, value], np.float32))
    assert [command[6] for command in env.unwrapped.simulator.commands] == [-1, -1, 1, 1]
    assert (env.robot.gripper_open, env.robot.gripper_closed) == (values[0], values[-1])
    if gripper == "openvla":
        with pytest.raises(ValueError, match='pass gripper="libero"'):
            env.unwrapped.make_expert()
    env.close()
