import pytest

from bloomery import config
from bloomery.config import Config, DatasetDir, Field, ModelDir
from bloomery.errors import ConfigError


class Loop(Config):
    learning_rate: float = Field(default=1e-3, description="peak")
    log_every: int = Field(default=10, description="steps", json_schema_extra=config.RUN_ONLY)


class Train(Config):
    data: DatasetDir
    teachers: dict[str, ModelDir | None] = {}
    loop: Loop = Loop()
    sizes: list[Loop] = []


def build(**data):
    return config.build(Train, data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"data": "d", "loop": {"learning_rat": 1}}, "loop.learning_rat: unknown key; did you mean learning_rate?"),
        ({"data": "d", "zzz": 1}, "zzz: unknown key; known keys: data, loop, sizes, teachers"),
        (
            {"data": "d", "sizes": [{"lerning_rate": 1}]},
            "sizes.0.lerning_rate: unknown key; did you mean learning_rate?",
        ),
        ({"loop": {}}, "data: missing"),
        ({"data": "d", "loop": {"learning_rate": "fast"}}, "found 'fast'"),
    ],
)
def test_bad_settings_are_named(data, message):
    with pytest.raises(ConfigError) as error:
        config.build(Train, data)
    assert message in str(error.value)


def test_every_problem_is_reported_at_once():
    with pytest.raises(ConfigError) as error:
        build(loop={"learning_rate": "x"}, zzz=1)
    assert len(str(error.value).splitlines()) == 3


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        build(data="d").data = "e"


def test_overrides_reach_nested_settings_and_keep_the_original():
    data = {"data": "d", "loop": {"learning_rate": 1}, "sizes": [{}, {}]}
    changed = config.apply_overrides(data, ["loop.learning_rate=3e-4", "sizes.1.learning_rate=2"])
    built = config.build(Train, changed)
    assert (built.loop.learning_rate, built.sizes[1].learning_rate) == (3e-4, 2.0)
    assert data["loop"]["learning_rate"] == 1


@pytest.mark.parametrize("override", ["loop", "=3", "sizes.x=1", "sizes.7.learning_rate=1"])
def test_malformed_overrides(override):
    with pytest.raises(ConfigError):
        config.apply_overrides({"sizes": [{}]}, [override])


def test_yaml_numbers_and_duplicates():
    assert config.parse_yaml("[1e-4, 10, 1.5, 3e8, 1.2.3, -2, .5]") == [1e-4, 10, 1.5, 3e8, "1.2.3", -2, 0.5]
    assert isinstance(config.parse_yaml("7"), int)
    with pytest.raises(ConfigError, match=r"line 2: the key 'a' is given twice"):
        config.parse_yaml("a: 1\na: 2")


def test_yaml_files(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        config.read_yaml(tmp_path / "tiny.yaml")
    (tmp_path / "tiny.yml").write_text("a: [1")
    with pytest.raises(ConfigError, match="did you mean"):
        config.read_yaml(tmp_path / "tiny.yaml")
    with pytest.raises(ConfigError, match="line 1: not valid YAML"):
        config.read_yaml(tmp_path / "tiny.yml")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        config.read_yaml(tmp_path / "latin.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="expected a mapping"):
        config.read_yaml(tmp_path / "list.yaml")


def test_round_trip(tmp_path):
    built = build(data="d", teachers={"a": "m", "b": None}, sizes=[{"learning_rate": 1e-7}])
    (tmp_path / "c.yaml").write_text(config.dump(built))
    assert config.load(Train, tmp_path / "c.yaml") == built


def test_dependency_edges_come_from_types():
    edges = config.inputs(build(data="d", teachers={"a": "m", "b": None}))
    assert {name: (kind, str(path)) for name, (kind, path) in edges.items()} == {
        "data": ("dataset", "d"), "teachers.a": ("model", "m"),
    }  # fmt: skip


def test_identity_leaves_out_paths_and_run_only_settings():
    base = config.identity(build(data="d"))
    assert base == config.identity(build(data="elsewhere", loop={"log_every": 99}))
    assert base != config.identity(build(data="d", loop={"learning_rate": 5}))
    assert base != config.identity(build(data="d", sizes=[{}]))


RECIPE = """\
# before
base:  # the model
  loop: {max_steps: 5, batch_size: 2}  # steps
  parallel:
    tensor: 2
    # of two
  seed: 1  # last

# after
next: {loop: {batch_size: 4}}
"""


@pytest.mark.parametrize(
    ("names", "value", "old", "new"),
    [
        (("base", "loop", "batch_size"), 8, "batch_size: 2}", "batch_size: 8}"),
        (("base", "loop", "micro"), 1, "batch_size: 2}", "batch_size: 2, micro: 1}"),
        (("base", "parallel"), {"expert": 4}, "tensor: 2\n    # of two", "{expert: 4}\n    # of two"),
        (("base", "new"), {"a": [1]}, "seed: 1  # last", "seed: 1  # last\n  new: {a: [1]}"),
        (("next", "loop", "deep"), None, "batch_size: 4}}", "batch_size: 4, deep: null}}"),
    ],
)
def test_one_setting_changes_and_the_rest_stays_as_written(names, value, old, new):
    changed = config.with_setting(RECIPE, names, value)
    assert changed == RECIPE.replace(old, new)
    found = config.parse_yaml(changed)
    for name in names:
        found = found[name]
    assert found == value


def test_a_setting_needs_its_place():
    with pytest.raises(ConfigError, match=r"base\.missing: not in the file"):
        config.with_setting(RECIPE, ("base", "missing", "a"), 1)
    with pytest.raises(ConfigError, match=r"base\.seed: expected a mapping that a can be written into"):
        config.with_setting(RECIPE, ("base", "seed", "a"), 1)
