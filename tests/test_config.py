import json
from pathlib import Path

import pytest

from latent_ae import UserError
from latent_ae.config import Config
from latent_ae.config_file import dump_yaml, load_config, parse_config, plain

CONFIGS = Path(__file__).parents[1] / "configs"
MINIMAL = "data: {path: somewhere}\noutput: runs/x\n"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def test_overrides_reach_every_depth(file):
    config = load_config(
        file,
        ["losses.perceptual.net=alex", "training.steps=7", "network.block_out_channels=[32, 64]"],
    )
    assert config.losses.perceptual.net == "alex"
    assert config.training.steps == 7
    assert config.network.block_out_channels == (32, 64)


def test_exponent_without_a_point_is_a_number(file):
    # PyYAML reads 1e-4 as a string; a trainer must not.
    assert load_config(file, ["training.learning_rate=1e-4"]).training.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.reslution=3", ["data.reslution", "did you mean 'resolution'"]),
        ("trainin.steps=3", ["unknown key 'trainin'", "training"]),
        ("losses.perceptual.nett=alex", ["losses.perceptual.nett", "valid keys here: net"]),
        ("data.crop=middle", ["data.crop", "'middle'", "random_resized"]),
        ("bottleneck.kind=vqq", ["bottleneck.kind", "kl"]),
        ("training.steps=0", ["training.steps", "greater than 0"]),
        ("training.steps=many", ["training.steps", "many"]),
        ("network.norm_num_groups=7", ["norm_num_groups 7 does not divide 128"]),
        ("data.resolution=100", ["data.resolution 100", "factor 8"]),
        ("data.crop_area=[0.9, 0.1]", ["data.crop_area", "smallest"]),
        ("training.ema=1", ["training.ema", "less than 1"]),
        ("training.betas=[0.9, 1.0]", ["training.betas", "less than 1"]),
        ("bottleneck.weight=.inf", ["bottleneck.weight", "finite"]),
        ("data={path: a, resolution: 256, resize: 64}", ["resize 64 is below resolution 256"]),
        ("validation={path: a, resolution: 16}", ["validation.resolution", "32"]),
        ("nonsense", ["key=value"]),
    ],
)
def test_wrong_input_is_refused_by_name(file, override, words):
    with pytest.raises(UserError) as refusal:
        load_config(file, [override])
    for word in words:
        assert word in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_network_path_stands_alone(file):
    with pytest.raises(UserError, match="latent_channels"):
        load_config(file, ["network={path: x, latent_channels: 8}"])


def test_missing_file_missing_key_and_double_key(tmp_path):
    with pytest.raises(UserError, match="no config file"):
        load_config(tmp_path / "none.yaml")
    path = tmp_path / "run.yaml"
    path.write_text("data: {path: a}\n")
    with pytest.raises(UserError, match="'output' is missing"):
        load_config(path)
    path.write_text(MINIMAL + "output: again\n")
    with pytest.raises(UserError, match=r"run\.yaml.*'output' stands twice"):
        load_config(path)
    path.write_text("data: [unclosed\n")
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(path)


def test_resolved_yaml_reads_back_equal(file, tmp_path):
    config = load_config(file, ["losses.perceptual={net: vgg}", "validation={path: held_out}"])
    again = tmp_path / "again.yaml"
    again.write_text(dump_yaml(config))
    assert load_config(again) == config
    fine_tune = load_config(file, ["network={path: some/folder}"])
    again.write_text(dump_yaml(fine_tune))
    assert load_config(again) == fine_tune


def test_schema_of_the_editors_is_current():
    # Regenerate with: latent-ae config --schema > configs/schema.json
    assert json.loads((CONFIGS / "schema.json").read_text()) == Config.model_json_schema()


def test_every_key_is_described():
    def sections(schema):
        yield schema
        yield from schema.get("$defs", {}).values()

    for section in sections(Config.model_json_schema()):
        for key, value in section["properties"].items():
            described = "description" in value or "$ref" in value or "anyOf" in value
            described = described or "allOf" in value
            assert described, f"{section['title']}.{key} says nothing of itself"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads_and_says_how_to_run_it(path):
    load_config(path)
    head = path.read_text().split("\n\n")[0]
    assert "schema.json" in head
    for word in ("command:", "hardware:", "expect:", "source:"):
        assert word in head.lower(), f"the head of {path.name} lacks {word!r}"


def test_none_is_kept_where_it_is_not_what_is_unsaid():
    content = {"data": {"path": "x"}, "output": "y", "losses": {"equivariance": {"scales": None}}}
    config = parse_config(content)
    assert config.losses.equivariance.scales is None
    assert parse_config(plain(config)) == config
