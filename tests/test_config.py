import pytest
import yaml

from occfeat_targets.config import TargetsConfig
from occfeat_targets.store.settings import ConfigError, differences, settings_file


def test_nuscenes_preset_shows_every_setting_at_its_default():
    preset = settings_file("nuscenes", "occfeat_targets")
    assert TargetsConfig.load(preset) == TargetsConfig()
    assert yaml.safe_load(preset.read_text()).keys() == TargetsConfig().plain().keys()


def test_presets_are_found_by_name_and_are_possible():
    names = ("nuscenes", "demo", "miniature", "lidar", "lidar-miniature")
    for name in (*names, "pop3d", "pop3d-miniature"):
        assert TargetsConfig.load(settings_file(name, "occfeat_targets"))
    with pytest.raises(
        ConfigError, match="no preset 'paper'; there are demo, lidar-miniature, lidar, miniature"
    ):
        settings_file("paper", "occfeat_targets")


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
        ("frobnicate=1", "unknown setting frobnicate; known: source, grid"),
        ("lidar.sweeps=two", "lidar.sweeps must be a valid integer, got 'two'"),
        ("lidar.sweeps=true", "lidar.sweeps must be a valid integer, got True"),
        ("lidar.sweeps=0", "lidar.sweeps must be greater than or equal to 1, got 0"),
        ("lidar=5", "lidar must be a mapping"),
        ("lidar.near_m=-1", "lidar.near_m must be greater than or equal to 0, got -1"),
        ("teacher.input_size=[252]", "teacher.input_size.1 field required, got [252]"),
        (
            "teacher.precision=fp8",
            "teacher.precision must be 'auto', 'float32', 'bfloat16' or 'float16', got 'fp8'",
        ),
        ("images.quality=101", "images.quality must be less than or equal to 100, got 101"),
        ("map.mode=maybe", "map.mode must be 'auto', 'required' or 'never', got 'maybe'"),
        ("frames.limit=0", "frames.limit must be greater than or equal to 1, got 0"),
        ("block_frames=0", "block_frames must be greater than or equal to 1, got 0"),
        ("grid.x=[50, -50, 200]", "grid.x needs finite bounds lo < hi"),
        ("grid.x=[-50, 50, 0]", "grid.x needs a whole number of cells"),
        ("grid.y=[-500, 500, 200]", "grid reaches 500.0 m"),
        ("images.qualty=3", "unknown setting images.qualty; did you mean images.quality"),
        ("images.size=[0, 512]", "images.size.0 must be greater than 0, got 0"),
        ("teacher.input_size=[-14, 14]", "teacher.input_size.0 must be greater than 0, got -14"),
        ("map.line_width_m=0", "map.line_width_m must be greater than 0, got 0"),
        ("labels.map=never", "unknown setting labels; known: source, grid"),
        ("outputs={panoptic: {}}", "no output 'panoptic'"),
        ('outputs={"no.such:Thing": {}}', "cannot load the output 'no.such:Thing'"),
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
