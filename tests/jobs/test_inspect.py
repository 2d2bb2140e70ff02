"""`vla inspect`: the report on the contents and problems of a dataset."""

import json
import re

import pytest

from tests.data.recordings import record
from vla.config import InspectConfig
from vla.data.reader import Demonstrations
from vla.errors import ConfigError, DataError
from vla.jobs.inspect import inspect


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return record(tmp_path_factory.mktemp("inspect") / "wandering", [30, 25, 28, 30, 3]).root


def test_the_report(data, tmp_path, capsys):
    before = Demonstrations(data).fingerprint
    out = inspect(InspectConfig(data=data, out=tmp_path / "report", bins=32))
    names = {path.name for path in out.iterdir()}
    assert names == {"index.html", "actions.png", "camera-front.png", "lengths.png"}
    page = (out / "index.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page), "the page must not need other files"
    printed = capsys.readouterr().out
    for text in (page, printed):
        assert "short episodes" in text and "gripper" in text and "task 1" in text and "116 at 10 per second" in text
    assert Demonstrations(data).fingerprint == before


def test_a_report_in_the_dataset_folder_without_cameras(tmp_path, capsys):
    root = record(tmp_path / "set", [12, 12]).root
    info = json.loads((root / "meta/info.json").read_text())
    del info["features"]["observation.images.front"], info["robot"]
    (root / "meta/info.json").write_text(json.dumps(info))
    out = inspect(InspectConfig(data=root))
    assert out == root / "inspect" and (out / "index.html").is_file()
    assert "cameras" in capsys.readouterr().out
    Demonstrations(root)  # the report does not affect reading


def test_unused_columns_are_reported(tmp_path, capsys):
    root = record(tmp_path / "set", [12, 12]).root
    info = json.loads((root / "meta/info.json").read_text())
    features = info["features"]
    features["observation.joints"] = features.pop("observation.state")
    features["observation.images.depth"] = {**features["observation.images.front"], "info": {"is_depth_map": True}}
    del info["robot"]
    (root / "meta/info.json").write_text(json.dumps(info | {"splits": {"train": "0:1", "val": "1:2"}}))
    inspect(InspectConfig(data=root, out=tmp_path / "report"))
    printed = " ".join(capsys.readouterr().out.split())
    assert "These columns are not read: observation.joints." in printed
    assert "(depth not used: observation.images.depth)" in printed and "other splits: val" in printed
    page = (tmp_path / "report/index.html").read_text()
    assert "bin width (63 bins)" in page  # the default, as in the built-in backbone


def test_errors(tmp_path, data):
    with pytest.raises(DataError, match="there is no folder"):
        inspect(InspectConfig(data=tmp_path / "none"))
    with pytest.raises(ConfigError, match="bins"):
        inspect(InspectConfig(data=data, bins=1))
