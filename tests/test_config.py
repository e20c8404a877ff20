"""Settings: flags, recipes and the saved copy are one object, and wrong ones are told in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from scarceseg.config import Config, read_recipe
from scarceseg.engine.loop import learning_rate
from scarceseg.errors import ConfigError
from scarceseg.registry import Registry
from scarceseg.settings import config_from_flags


def flags(**typed: object) -> Config:
    return config_from_flags(None, None, [], {"dataset": "data", **typed})


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    config = flags(labeled="4", spacing="1.25", patch="64,64,48", method="ua-mt", val="ä,b")
    (tmp_path / "config.yaml").write_text(config.dump(), encoding="utf-8")
    assert Config.load(tmp_path / "config.yaml") == config
    assert config.plan.spacing_mm == (1.25, 1.25, 1.25)
    assert config.plan.patch == (64, 64, 48)
    assert config.val == ["ä", "b"]


def test_flags_win_over_the_recipe_and_set_over_flags() -> None:
    recipe = config_from_flags("la-fast", None, [], {"dataset": "data", "iterations": 7})
    assert (recipe.iterations, recipe.plan.patch) == (7, (64, 64, 48))
    assert recipe.plan.spacing_mm == (1.25, 1.25, 1.25)
    changed = config_from_flags("la-fast", None, ["iterations=8", "optim.lr=0.5"], {"dataset": "d", "iterations": 7})
    assert (changed.iterations, changed.optim.lr) == (8, 0.5)


def test_names_numbers_and_lists() -> None:
    assert flags(labeled="4").labeled == 4
    assert flags(labeled="a,b").labeled == ["a", "b"]
    assert flags(spacing="1,1,2.5").plan.spacing_mm == (1.0, 1.0, 2.5)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"iteration": 5}, ["unknown setting 'iteration'", "'iterations'"]),
        ({"optim": {"learning_rate": 1}}, ["optim.learning_rate"]),
        ({"optim": {"lr": -1}}, ["optim.lr", "greater than 0", "-1"]),
        ({"iterations": "many"}, ["iterations", "'many'"]),
        ({"foreground": 2}, ["foreground", "2"]),
        ({"precision": "fp8"}, ["precision", "fp8"]),
    ],
)
def test_wrong_settings(values: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        Config.build(values)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_unreadable_recipe(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("a: [")
    (tmp_path / "list.yaml").write_text("- 1")
    for name, word in (("broken.yaml", "cannot read"), ("list.yaml", "mapping"), ("none.yaml", "cannot read")):
        with pytest.raises(ConfigError, match=word):
            read_recipe(str(tmp_path / name))


def test_a_recipe_builds_on_another(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "mine.yaml").write_text("base: ../ours.yaml\nplan: {patch: [32, 32, 32]}\noptim: {lr: 0.5}")
    (tmp_path / "ours.yaml").write_text("base: la\noptim: {lr: 0.1, schedule: poly}\nlabeled: 3")
    values = read_recipe(str(tmp_path / "deep" / "mine.yaml"))
    assert "base" not in values
    config = Config.build(values)
    assert (config.plan.patch, config.plan.spacing_mm) == ((32, 32, 32), (0.625, 0.625, 0.625))
    assert (config.optim.lr, config.optim.schedule, config.labeled, config.iterations) == (0.5, "poly", 3, 6000)
    typed = config_from_flags(str(tmp_path / "ours.yaml"), None, ["optim.lr=0.2"], {"dataset": "d", "labeled": "2"})
    assert (typed.optim.lr, typed.labeled, typed.optim.schedule) == (0.2, 2, "poly")


def test_recipes_in_a_circle_and_without_a_base(tmp_path: Path) -> None:
    for name, base in (("a", "b.yaml"), ("b", "./c.yaml"), ("c", "a.yaml"), ("self", "self.yaml")):
        (tmp_path / f"{name}.yaml").write_text(f"base: {base}")
    (tmp_path / "lost.yaml").write_text("base: laa")
    (tmp_path / "gone.yaml").write_text("base: nowhere.yaml")
    (tmp_path / "several.yaml").write_text("base: [la, btcv]")
    for name, words in (
        ("a", r"circle: a\.yaml -> b\.yaml -> c\.yaml -> a\.yaml"),
        ("self", r"circle: self\.yaml -> self\.yaml"),
        ("lost", "unknown recipe 'laa': did you mean"),
        ("gone", r"cannot read the settings in .*nowhere\.yaml"),
        ("several", r"base: expected the name or the file of one recipe, got \['la', 'btcv'\]"),
    ):
        with pytest.raises(ConfigError, match=words):
            read_recipe(str(tmp_path / f"{name}.yaml"))


def test_learning_rate_keeps_the_published_proportions() -> None:
    optim = Config().optim
    assert [learning_rate(optim, t, 6000) for t in (0, 2499, 2500, 5000)] == pytest.approx([1e-2, 1e-2, 1e-3, 1e-4])
    assert [learning_rate(optim, t, 1000) for t in (416, 417, 834)] == pytest.approx([1e-2, 1e-3, 1e-4])
    optim.schedule = "poly"
    assert learning_rate(optim, 500, 1000) == pytest.approx(0.01 * 0.5**0.9)


def test_registry_names() -> None:
    registry: Registry[type] = Registry("colour", "scarceseg.functional")
    registry.register("red", "crimson")(int)
    registry.register("red")(int)
    with pytest.raises(ConfigError, match="colour 'red' is registered twice"):
        registry.register("red")(str)
    with pytest.raises(ConfigError, match="did you mean 'crimson'"):
        registry.get("crimsom")
    assert registry.names() == ["crimson", "red"]


def test_a_folder_may_be_a_path() -> None:
    assert Config(dataset=Path("heart")).dataset == "heart" == Config.build({"dataset": Path("heart")}).dataset
