import pytest
import yaml

from occfeat_targets.config import TargetsConfig
from occfeat_targets.store.settings import ConfigError, differences


def test_nuscenes_preset_shows_every_setting_at_its_default(pytestconfig):
    preset = pytestconfig.rootpath / "pipelines" / "nuscenes.yaml"
    assert TargetsConfig.load(preset) == TargetsConfig()
    assert yaml.safe_load(preset.read_text()).keys() == TargetsConfig().plain().keys()


def test_round_trip_through_plain_values():
    config = TargetsConfig.load(
        None, ["grid.z=[-5, 5, 16]", "lidar.sweeps=3", "frames.scenes=[a, b]"]
    )
    assert config.grid.z == (-5.0, 5.0, 16)
    assert config.frames.scenes == ("a", "b")
    assert TargetsConfig.of(yaml.safe_load(yaml.safe_dump(config.plain()))) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lidar.sweps=3", "unknown setting lidar.sweps; did you mean lidar.sweeps"),
        ("frobnicate=1", "unknown setting frobnicate; known: grid"),
        ("lidar.sweeps=two", "lidar.sweeps must be int"),
        ("lidar.sweeps=true", "lidar.sweeps must be int"),
        ("lidar.sweeps=0", "lidar.sweeps must be >= 1"),
        ("lidar=5", "lidar must be a mapping"),
        ("lidar.near_m=-1", "lidar.near_m must be >= 0"),
        ("teacher.input_size=[252]", "teacher.input_size must have 2 entries"),
        ("teacher.precision=fp8", "teacher.precision must be one of"),
        ("images.quality=101", "images.quality must be 1 to 100"),
        ("map.mode=maybe", "labels.map must be one of"),
        ("frames.limit=0", "frames.limit must be >= 1"),
        ("block_frames=0", "block_frames must be >= 1"),
        ("grid.x=[50, -50, 200]", "grid.x needs finite bounds lo < hi"),
        ("grid.x=[-50, 50, 0]", "grid.x needs a whole number of cells"),
        ("grid.y=[-500, 500, 200]", "grid reaches 500.0 m"),
        ("grid.q=[0, 1, 1]", "unknown setting grid.q"),
        ("lidar.sweeps", "--set wants section.key=value"),
        ("lidar.sweeps=[", "not valid YAML"),
    ],
)
def test_mistakes_are_named(override, message):
    with pytest.raises(ConfigError) as error:
        TargetsConfig.load(None, [override])
    assert message in str(error.value)


def test_differences_name_every_leaf():
    a = TargetsConfig().plain()
    b = TargetsConfig.load(None, ["lidar.sweeps=3", "block_frames=8"]).plain()
    assert differences(a, b) == ["block_frames: 32 -> 8", "lidar.sweeps: 1 -> 3"]
    assert differences(a, a) == []
