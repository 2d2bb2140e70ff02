"""The dataset card in every dataset that is written."""

import numpy as np
from huggingface_hub import DatasetCard
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.recordings import ROBOT, record
from vla.data import format as v3
from vla.data.card import INSTRUCTIONS, dataset_card
from vla.data.writer import DemonstrationWriter


def test_a_written_dataset_has_its_card(tmp_path):
    root = record(tmp_path / "set", (12, 9, 15)).root
    card = DatasetCard.load(root / "README.md")  # reads the front matter as the hub does
    assert "LeRobot" in card.data.tags and card.data.task_categories == ["robotics"]
    assert card.data.to_dict()["configs"] == [{"config_name": "default", "data_files": "data/*/*.parquet"}]
    for line in (
        "# set",
        "| episodes | 3 |",
        "| frames | 36, 4 s at 10 frames per second |",
        "| environments | test/Point-v0 |",
        "| success | 3 of 3 episodes |",
        "| observation.images.front | video | [48, 64, 3] | height, width, channels |",
        "| action | float32 | [3] | dx, dy, gripper |",
        "| task 0 | 2 |",
    ):
        assert line in card.text.splitlines(), line


def test_a_dataset_without_state_environment_or_success_has_one_too(tmp_path):
    robot = v3.RobotSpec(("front",), (), ROBOT.action_names, control_hz=12.5)
    with DemonstrationWriter(tmp_path / "set", robot) as writer:
        image = np.zeros((16, 16, 3), np.uint8)
        writer.add_episode([{"pixels": {"front": image}}] * 2, np.zeros((2, 3), np.float32), "go")
    text = (tmp_path / "set" / "README.md").read_text()
    assert "| environments | not named |" in text and "| success | not recorded |" in text and "12.5 frames" in text


@settings(max_examples=20)
@given(st.lists(st.text(min_size=1), min_size=1, max_size=30))
def test_each_instruction_is_one_line_of_its_table(texts):
    robot = ROBOT.to_dict()
    info = v3.Info(fps=10, features=v3.features_of(ROBOT, {"front": (8, 8)}, {"front": {}}, False), robot=robot)
    card = dataset_card("set", info, [{"tasks": [text]} for text in texts])
    table = card.split("| instruction | episodes |\n|---|---|\n")[1].split("\n\n")[0].split("\n")
    assert len(table) == min(len(set(texts)), INSTRUCTIONS)
    assert all(line.startswith("| ") and line.endswith(" |") for line in table)
    assert sum(int(line.rsplit("|", 2)[1]) for line in table) <= len(texts)
