"""Settings: flags, recipes and the saved copy are one object, and wrong ones are told in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from scarceseg.config import Config, merge, read_recipe, recipe_names
from scarceseg.engine.loop import learning_rate
from scarceseg.engine.run import train
from scarceseg.errors import ConfigError
from scarceseg.registry import Registry
from scarceseg.settings import config_from_flags
from tests.tiny import tiny_config, tiny_dataset


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


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_opens_with_its_facts_and_runs(name: str, tmp_path: Path) -> None:
    import scarceseg

    text = (Path(scarceseg.__file__).parent / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    head = [line for line in text.splitlines() if line.startswith("#")]
    assert f"--recipe {name}" in text
    assert all(any(word in line for line in head) for word in ("Command:", "Time", "xpected"))
    small = {"plan": {"patch": [32, 32, 16], "spacing_mm": 1.0}, "iterations": 2}
    arguments = {"feature_scale": 32} if "unet3d" in text else {"n_filters": 1}
    quick = tiny_config(tiny_dataset(tmp_path / "data")).model_dump(mode="json")
    config = Config.build(merge(merge(quick, read_recipe(name)), small))
    config.network.args = arguments
    train(config, tmp_path / "run")
    assert (tmp_path / "run" / "model.safetensors").exists()


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
