"""Registries, and plugins that register members."""

import pytest

from vla.cli import main
from vla.errors import ConfigError
from vla.support.registry import Registry


def test_names_are_unique_and_unknown_names_suggest_the_nearest():
    colours: Registry[int] = Registry("colour")
    assert colours.register("red")(1) == 1
    assert colours.get("red") == 1 and list(colours) == ["red"]
    with pytest.raises(ConfigError, match="colour 'red' is already registered"):
        colours.register("red")(2)
    with pytest.raises(ConfigError, match=r"unknown colour 'rad'. Did you mean 'red'\?.*--plugin MODULE"):
        colours.get("rad")


def test_a_plugin_is_imported_before_the_verb_is_parsed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_members.py").write_text("print('imported')")
    assert main(["--plugin", "my_members", "nonsense"]) == 2
    said = capsys.readouterr()
    assert said.out == "imported\n" and "unknown verb 'nonsense'" in said.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plugin=absent_module", "doctor"], "cannot import the plugin 'absent_module' (ModuleNotFoundError"),
        (["--plugin", "broken", "doctor"], "cannot import the plugin 'broken' (ZeroDivisionError: division by zero)"),
        (["--plugin"], "cannot import the plugin ''"),
        (["--plugin", "json"], "there is no verb after --plugin"),
    ],
)
def test_a_plugin_that_fails_is_one_message(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("1 / 0")
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
