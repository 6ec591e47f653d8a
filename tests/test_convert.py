"""Both layouts run from the same weights; round trips by the bit; what is refused."""

import json
import re
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import yaml
from conftest import photograph_tensor
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from ldm_reference import FirstStage
from safetensors.torch import load_file, save_file

from latent_ae import UserError, cli, convert
from latent_ae.autoencoder import WEIGHTS_FILE
from latent_ae.conversion.architecture import complete_config, diffusers_shapes
from latent_ae.conversion.ldm_config import dump_ldm_config, parse_ldm_config
from latent_ae.conversion.names import ldm_name, ldm_shape, modern_name
from latent_ae.conversion.scale import FAMILIES
from latent_ae.conversion.tools import tool_notes

pytestmark = pytest.mark.usefixtures("one_thread")


def network(widths, layers=2, attention=(), **keys):
    """The keys of a config; `attention` are the levels that have it, largest picture first."""
    levels = range(len(widths))
    down = ["AttnDownEncoderBlock2D" if i in attention else "DownEncoderBlock2D" for i in levels]
    up = ["AttnUpDecoderBlock2D" if i in attention else "UpDecoderBlock2D" for i in levels]
    return {
        "block_out_channels": list(widths),
        "layers_per_block": layers,
        "down_block_types": down,
        "up_block_types": up[::-1],
        "sample_size": 64,
        **keys,
    }


NO_QUANT = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
# The real structures in small widths: LDM's 32 groups want multiples of 32.
CONFIGS = {
    "sd1": network((32, 64, 96, 96), scaling_factor=0.18215),
    "sdxl-fp16-fix": network((32, 64, 96, 96), scaling_factor=0.13025, force_upcast=False),
    "sd3": network((32, 64, 96, 96), scaling_factor=1.5305, shift_factor=0.0609, **NO_QUANT),
    "flux": network((32, 64, 96, 96), scaling_factor=0.3611, shift_factor=0.1159, **NO_QUANT),
    "kl-f16 with attention": network((32, 32, 64, 64, 128), 2, (4,), latent_channels=16),
    "kl-f32 with attention": network((32, 32, 32, 32, 64, 64), 1, (4, 5), latent_channels=8),
    "grey, no attention": network(
        (16, 48, 16), 1, norm_num_groups=4, mid_block_add_attention=False, latent_channels=3
    )
    | {"in_channels": 1, "out_channels": 1, "latents_mean": [0.1] * 3, "latents_std": [2.0] * 3},
}


def build(folder, config, seed=0):
    """A folder of random weights, every norm's affine part included."""
    torch.manual_seed(seed)
    made = AutoencoderKL(**config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    made.save_pretrained(folder)
    return made


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Each config as a folder, its network, and the single file that was made of it."""
    found = {}
    for name, config in CONFIGS.items():
        folder = tmp_path_factory.mktemp("networks") / "vae"
        stock = build(folder, config)
        file = folder.parent / "vae.safetensors"
        found[name] = (folder, stock, file, convert(folder, file))
    return found


def ddconfig_of(config):
    """LDM's keys of a config, by its own reading of the field's names."""
    widths, side = config["block_out_channels"], config["sample_size"]
    levels = enumerate(config["down_block_types"])
    keys = {
        "double_z": True,
        "z_channels": config.get("latent_channels", 4),
        "resolution": side,
        "in_channels": config.get("in_channels", 3),
        "out_ch": config.get("out_channels", 3),
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": [side // 2**i for i, kind in levels if "Attn" in kind],
        "dropout": 0.0,
    }
    return keys if config.get("mid_block_add_attention", True) else keys | {"attn_type": "none"}


def reference(config, file, prefix=""):
    """LDM's network with a file's weights, none missing and none left over."""
    quant = config.get("use_quant_conv", True)
    ldm = FirstStage(ddconfig_of(config), config.get("norm_num_groups", 32), quant).eval()
    tensors = load_file(file)
    ldm.load_state_dict({name.removeprefix(prefix): t for name, t in tensors.items()}, strict=True)
    return ldm


@torch.no_grad()
def assert_same_outputs(stock, ldm, size=64):
    """In float64: the order in which fp32 adds is no matter of the layout."""
    stock, ldm = deepcopy(stock).double(), ldm.double()
    images = photograph_tensor("coffee", size)[:, : stock.config.in_channels].double()
    moments = stock.encode(images).latent_dist.parameters
    torch.testing.assert_close(ldm.encode(images), moments, atol=1e-8, rtol=1e-8)
    latents = moments.chunk(2, 1)[0]
    decoded = stock.decode(latents).sample
    torch.testing.assert_close(ldm.decode(latents), decoded, atol=1e-8, rtol=1e-8)
    assert decoded.std() > 1e-2  # something that could differ


@pytest.mark.parametrize("name", CONFIGS)
def test_both_layouts_compute_the_same(made, name):
    _, stock, file, _ = made[name]
    # Attention over one position would be none.
    assert_same_outputs(stock, reference(CONFIGS[name], file), 64 if "with" in name else 32)


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_is_bit_equal(made, name, tmp_path):
    folder, _, file, _ = made[name]
    back = convert(file, tmp_path / "back")
    before, after = load_file(folder / WEIGHTS_FILE), load_file(tmp_path / "back" / WEIGHTS_FILE)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )
    assert back.tensors == len(before)
    convert(tmp_path / "back", tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("name", [n for n in CONFIGS if n not in ("sdxl-fp16-fix", "sd3")])
def test_a_foreign_file_s_architecture_comes_from_its_shapes(made, name, tmp_path):
    folder, stock, file, _ = made[name]
    foreign = tmp_path / "foreign.safetensors"
    save_file(load_file(file), foreign)  # without our record
    given = {"scaling_factor": 0.5}
    if CONFIGS[name].get("norm_num_groups"):  # what no shape tells
        with pytest.raises(UserError, match="diffusers builds no AutoencoderKL"):
            convert(foreign, tmp_path / "back", **given)
        given["config"] = folder
    found = convert(foreign, tmp_path / "back", **given).config
    loaded = AutoencoderKL.from_pretrained(tmp_path / "back")
    assert loaded.config.scaling_factor == 0.5
    for key in CONFIGS[name].keys() - {"scaling_factor", "shift_factor", "sample_size"}:
        if key not in ("force_upcast", "latents_mean", "latents_std"):
            assert list_of(loaded.config[key]) == list_of(stock.config[key]) == found[key], key
    before, after = stock.state_dict(), loaded.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def list_of(value):
    return list(value) if isinstance(value, tuple | list) else value


@pytest.mark.parametrize("name", [n for n in CONFIGS if "with attention" not in n])
def test_diffusers_own_reader_agrees(made, name):
    """Its mapping, which knows no attention within levels, is an independent one."""
    folder, stock, file, _ = made[name]
    theirs = convert_ldm_vae_checkpoint(load_file(file), stock.config)
    ours = load_file(folder / WEIGHTS_FILE)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in ours)


def test_diffusers_loads_the_single_file(made):
    folder, stock, file, _ = made["sd3"]
    loaded = AutoencoderKL.from_single_file(str(file), config=str(folder))
    before, after = stock.state_dict(), loaded.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_yaml_is_ldm_s(made):
    _, stock, file, conversion = made["kl-f16 with attention"]
    content = yaml.safe_load(file.with_suffix(".yaml").read_text())
    assert content["model"]["target"] == "ldm.models.autoencoder.AutoencoderKL"
    params = content["model"]["params"]
    assert params["ddconfig"] == ddconfig_of(CONFIGS["kl-f16 with attention"])
    assert params["embed_dim"] == 16
    assert content["scale_factor"] == stock.config.scaling_factor
    FirstStage(params["ddconfig"]).load_state_dict(load_file(file), strict=True)
    assert f"LDM's config is {file.stem}.yaml" in conversion.notes
    read = parse_ldm_config(file.with_suffix(".yaml"))
    whole = complete_config(read, "it")
    assert whole == {key: list_of(stock.config[key]) for key in whole}


def test_no_yaml_where_ldm_s_class_cannot_be_it(made):
    for name, words in (("flux", "no quant convolutions"), ("grey, no attention", "norm_num")):
        _, _, file, conversion = made[name]
        assert not file.with_suffix(".yaml").exists()
        assert words in conversion.notes[0]


def test_an_ldm_yaml_says_scale_and_attention(made, tmp_path):
    """That of a whole latent diffusion model, as trained with LDM's code."""
    _, _, file, _ = made["kl-f32 with attention"]
    inner = yaml.safe_load(file.with_suffix(".yaml").read_text())["model"]
    params = {"scale_factor": 0.25, "first_stage_config": inner}
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump({"model": {"target": "ldm", "params": params}}))
    save_file(load_file(file), tmp_path / "foreign.safetensors")
    found = convert(tmp_path / "foreign.safetensors", tmp_path / "back", config=path)
    assert found.config["scaling_factor"] == 0.25
    assert found.config["sample_size"] == 64
    inner["params"]["ddconfig"]["attn_resolutions"] = []
    path.write_text(yaml.safe_dump({"model": {"target": "ldm", "params": params}}))
    with pytest.raises(UserError, match="has down_block_types"):
        convert(tmp_path / "foreign.safetensors", tmp_path / "other", config=path)
    assert not (tmp_path / "other").exists()


def test_prefix_and_whole_checkpoints(made, tmp_path):
    folder, stock, _, _ = made["sd1"]
    alone = tmp_path / "prefixed.safetensors"
    made_here = convert(folder, alone, prefix="first_stage_model.")
    assert not any("ComfyUI" in note for note in made_here.notes)  # it is no file of its folder
    assert_same_outputs(stock, reference(CONFIGS["sd1"], alone, "first_stage_model."), 32)
    whole = {
        **load_file(alone),
        "model.diffusion_model.out.weight": torch.zeros(3),
        "model.diffusion_model.out.bias": torch.zeros(3),
        "cond_stage_model.x": torch.zeros(1),
        "scale_factor": torch.tensor(0.75),
    }
    save_file(whole, tmp_path / "model.safetensors")
    torch.save({"state_dict": whole, "global_step": 7}, tmp_path / "model.ckpt")
    torch.save(whole, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("model.safetensors", "model.ckpt", "old.pt"):
        out = tmp_path / name.replace(".", "-")
        back = convert(tmp_path / name, out)
        notes = " ".join(back.notes)
        assert "4 tensors beside the autoencoder (2 of model, 1 of " in notes
        assert "scaling_factor 0.75 from the checkpoint's tensor scale_factor" in notes
        assert back.config["scaling_factor"] == 0.75
        after = load_file(out / WEIGHTS_FILE)
        assert all(torch.equal(after[key], value) for key, value in stock.state_dict().items())


def test_a_training_run_of_ldm(made, tmp_path):
    """Its losses and averaged weights are counted; the latter are taken when asked for."""
    folder, _, file, _ = made["sd1"]
    tensors = load_file(file)
    averaged = {"model_ema." + n.replace(".", ""): t + 1 for n, t in tensors.items()}
    others = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.ones(3)}
    counters = {"model_ema.decay": torch.ones(()), "model_ema.num_updates": torch.tensor(3)}
    run = tmp_path / "last.ckpt"
    torch.save({"state_dict": tensors | averaged | others | counters, "epoch": 1}, run)
    plain = convert(run, tmp_path / "plain", family="sd1")
    notes = " ".join(plain.notes)
    assert "2 tensors of the training's losses" in notes
    assert f"{len(averaged) + 2} tensors of averaged weights" in notes
    assert plain.config["scaling_factor"] == FAMILIES["sd1"]["scaling_factor"]
    convert(run, tmp_path / "averaged", family="sdxl", ema=True)
    before = load_file(folder / WEIGHTS_FILE)
    for name, shift in (("plain", 0), ("averaged", 1)):
        after = load_file(tmp_path / name / WEIGHTS_FILE)
        assert all(torch.equal(after[key], value + shift) for key, value in before.items())
    del averaged["model_ema.encoderconv_inweight"]
    torch.save(tensors | averaged, run)
    with pytest.raises(UserError, match=r"of 1 tensors, such as encoder\.conv_in\.weight"):
        convert(run, tmp_path / "none", ema=True, scaling_factor=1)


def test_dtypes_stay_or_change_when_asked(made, tmp_path):
    folder, _, _, _ = made["sd1"]
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    tensors = load_file(folder / WEIGHTS_FILE)
    kinds = (torch.float16, torch.bfloat16, torch.float32)
    tensors = {n: t.to(kinds[i % 3]) for i, (n, t) in enumerate(tensors.items())}
    tensors["encoder.conv_in.bias"][0] = float("nan")  # kept, and compared by its bits
    save_file(tensors, mixed / WEIGHTS_FILE, {"format": "pt"})
    (mixed / "config.json").write_text((folder / "config.json").read_text())
    assert len(convert(mixed, tmp_path / "mixed.safetensors").dtypes) == 3
    convert(tmp_path / "mixed.safetensors", tmp_path / "back")
    assert (tmp_path / "back" / WEIGHTS_FILE).read_bytes() == (mixed / WEIGHTS_FILE).read_bytes()
    halved = convert(mixed, tmp_path / "half.safetensors", dtype="fp16")
    assert halved.dtypes == {"float16": len(tensors)}
    tensors["decoder.conv_in.bias"] = torch.full((96,), 1e5)
    save_file(tensors, mixed / WEIGHTS_FILE)
    with pytest.raises(UserError, match=r"decoder.conv_in.bias has values up to 1e\+05"):
        convert(mixed, tmp_path / "over.safetensors", dtype="fp16")
    assert not (tmp_path / "over.safetensors").exists()


def test_an_old_folder(made, tmp_path):
    """Its names of attention, its pickled weights, and a config that knows but a few keys."""
    folder, _, file, _ = made["sd1"]
    keys = ("_class_name", "block_out_channels", "down_block_types", "up_block_types")
    config = json.loads((folder / "config.json").read_text())
    config = {key: config[key] for key in (*keys, "layers_per_block")}
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in load_file(folder / WEIGHTS_FILE).items():
        former = name
        for new, word in old.items():
            former = former.replace(f".{new}.", f".{word}.")
        assert modern_name(former) == name
        tensors[former] = tensor
    (tmp_path / "old").mkdir()
    torch.save(tensors, tmp_path / "old/diffusion_pytorch_model.bin")  # of that age too
    said = json.dumps(config | {"_name_or_path": "/home/somebody"})
    (tmp_path / "old/config.json").write_text(said)
    convert(tmp_path / "old", tmp_path / "old.safetensors")
    before, after = load_file(file), load_file(tmp_path / "old.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert b"somebody" not in (tmp_path / "old.safetensors").read_bytes()
    back = convert(tmp_path / "old.safetensors", tmp_path / "back").config
    del back["_diffusers_version"]
    assert back == config
    save_file(before, tmp_path / "foreign.safetensors")
    told = convert(tmp_path / "foreign.safetensors", tmp_path / "b", config=tmp_path / "old").config
    assert told["scaling_factor"] == 0.18215  # what such a config means to diffusers


def test_what_loads_it_is_told():
    sd1 = complete_config(network((128, 256, 512, 512)), "it")
    assert tool_notes(sd1) == ["ComfyUI loads it", "AUTOMATIC1111's WebUI loads it"]
    flux = complete_config(network((128, 256, 512, 512), **NO_QUANT), "it")
    comfy, webui = tool_notes(flux)
    assert comfy == "ComfyUI loads it"
    assert "latent_channels 16 (it takes 4)" in webui
    f32 = complete_config(network((128, 256, 512, 512), latent_channels=64), "it")
    assert "HunyuanImage" in tool_notes(f32)[0]
    odd = tool_notes(complete_config(network((128, 256, 512, 512), norm_num_groups=16), "it"))
    assert "norm_num_groups 16 (it takes 32)" in odd[0]
    assert "decode it wrongly" in odd[-1]


def run(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["latent-ae", "convert", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code, *capsys.readouterr()


def test_the_command_line(capsys, monkeypatch, made, tmp_path):
    code, out, _ = run(capsys, monkeypatch, "--help")
    assert code == 0
    assert "--scaling-factor" in out
    monkeypatch.chdir(tmp_path)
    folder = made["sd3"][0]
    code, _, err = run(capsys, monkeypatch, folder, "a.safetensors")
    assert code == 0
    assert "note: no YAML for LDM" in err
    assert "is ready" in err
    code, _, err = run(capsys, monkeypatch, "a.safetensors", "b", "--shift-factor", 0.5)
    assert code == 0
    assert "note: as you say: shift_factor 0.5" in err
    config = json.loads(Path("b/config.json").read_text())
    assert config == json.loads((folder / "config.json").read_text()) | {"shift_factor": 0.5}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b"]


class Anything:
    """What a checkpoint should not hold."""


BAD = [
    (["none", "out"], "there is no folder or file none"),
    (["folder", "out"], "the target is a .safetensors file"),
    (["folder", "there.safetensors"], "there.safetensors exists already"),
    (["file.safetensors", "folder"], "folder exists already"),
    (["file.safetensors", "out.ckpt"], "the target is a folder"),
    (["file.safetensors", "out"], "give --family sd1 (0.18215), --family sdxl (0.13025)"),
    (["file.safetensors", "out", "--family", "flux"], "is no flux: it has 4 latent channels with"),
    (["file.safetensors", "out", "--scaling-factor", "-1"], "is no positive number"),
    (["file.safetensors", "out", "--config", "none.yaml"], "there is no config file none.yaml"),
    (["file.safetensors", "out", "--config", "tiny/config.json"], "is no config of diffusers'"),
    (["file.safetensors", "out", "--prefix", "vae"], "does not end in a dot"),
    (["file.safetensors", "out", "--prefix", "vae."], "it has no encoder.conv_out.weight"),
    (["folder", "out.safetensors", "--family", "sd1"], "are for single files"),
    (["pipeline", "out.safetensors"], "it has no config.json; try pipeline/vae"),
    (["tiny", "out.safetensors"], "is of class AutoencoderTiny, for which LDM has no layout"),
    (["gelu", "out.safetensors"], "all readers of LDM's layout compute SiLU"),
    (["missing", "out.safetensors"], "it comes without encoder.conv_in.bias"),
    (["pickle.ckpt", "out"], "holds more than tensors"),
    (["damaged.ckpt", "out"], "is damaged, or holds more than tensors"),
    (["damaged.safetensors", "out"], "is no whole safetensors file"),
    (["empty.pt", "out"], "holds no tensors, at its top or under `state_dict`; it has epoch"),
    (["text.txt", "out"], "is of no known kind"),
    (["diffusers.safetensors", "out"], "has diffusers' names already"),
    (["unknown.safetensors", "out", "--family", "sd1"], "with unknown tensors bn.running_mean"),
    (["short.safetensors", "out", "--family", "sd1"], "without decoder.up.1.block.2.conv2.bias"),
    (["wrong.safetensors", "out", "--family", "sd1"], "of shape (96, 96) where (96, 96, 1, 1) is"),
    (["twice.safetensors", "out"], "choose one with --prefix: '', 'vae.'"),
    (["vq.safetensors", "out"], "twice as many are wanted"),
    (["embed.safetensors", "out"], "LDM's embed_dim and z_channels"),
    (["video.safetensors", "out"], "is no autoencoder of pictures"),
    (["stem.safetensors", "out"], "ch_mult begins with another number than 1"),
    (["file.safetensors", "out", "--ema", "--family", "sd1"], "no averaged weights"),
]


@pytest.fixture(scope="module")
def bad_inputs(made, tmp_path_factory):
    """A folder in which every way to be wrong lies."""
    root = tmp_path_factory.mktemp("bad")
    folder, _, file, _ = made["sd1"]
    ldm, own = load_file(file), load_file(folder / WEIGHTS_FILE)
    config = json.loads((folder / "config.json").read_text())

    def as_folder(name, tensors, **changes):
        (root / name).mkdir()
        save_file(tensors, root / name / WEIGHTS_FILE)
        (root / name / "config.json").write_text(json.dumps(config | changes))

    def as_file(name, *without, **tensors):
        kept = {key: value for key, value in ldm.items() if key not in without}
        new = {key.replace("__", "."): value for key, value in tensors.items()}
        save_file(kept | new, root / f"{name}.safetensors")

    as_folder("folder", own)
    as_folder("gelu", own, act_fn="gelu")
    as_folder("missing", {k: v for k, v in own.items() if k != "encoder.conv_in.bias"})
    as_folder("pipeline", {"x": torch.zeros(1)})
    (root / "pipeline/config.json").rename(root / "pipeline/model_index.json")
    AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4
    ).save_pretrained(root / "tiny")
    as_file("file")
    as_file("there")
    as_file("short", "decoder.up.1.block.2.conv2.bias")
    as_file("unknown", bn__running_mean=torch.zeros(3))
    as_file(
        "wrong", encoder__mid__attn_1__q__weight=own["encoder.mid_block.attentions.0.to_q.weight"]
    )
    as_file("twice", vae__decoder__conv_in__weight=torch.zeros(1))
    as_file("vq", encoder__conv_out__weight=torch.zeros(4, 96, 3, 3))
    as_file("embed", post_quant_conv__weight=torch.zeros(4, 3, 1, 1))
    as_file("video", encoder__conv_out__weight=torch.zeros(8, 96, 3, 3, 3))
    as_file("stem", encoder__conv_in__weight=torch.zeros(64, 3, 3, 3))
    save_file(own, root / "diffusers.safetensors")
    torch.save({"state_dict": ldm, "callbacks": Anything()}, root / "pickle.ckpt")
    torch.save({"epoch": 3}, root / "empty.pt")
    for name in ("damaged.ckpt", "damaged.safetensors", "text.txt"):
        (root / name).write_bytes(b"no weights")
    return root


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=lambda value: str(value)[:60])
def test_bad_input_is_one_sentence_and_code_2(capsys, monkeypatch, bad_inputs, arguments, words):
    monkeypatch.chdir(bad_inputs)
    before = sorted(bad_inputs.rglob("*"))
    code, out, err = run(capsys, monkeypatch, *arguments)
    assert code == 2
    assert not out
    (line,) = err.strip().splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert sorted(bad_inputs.rglob("*")) == before


def test_nothing_remains_of_a_write_that_fails(made, tmp_path, monkeypatch):
    folder, _, file, _ = made["sd1"]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    for source, target in ((folder, "a.safetensors"), (file, "folder")):
        with pytest.raises(OSError, match="No space left"):
            convert(source, tmp_path / target)
    assert not list(tmp_path.iterdir())


def test_the_documented_numbers():
    page = (Path(__file__).parents[1] / "docs/convert.md").read_text()
    for name, keys in FAMILIES.items():
        (row,) = re.findall(rf"^\| `{name}` \|.*$", page, re.MULTILINE)
        assert str(keys["scaling_factor"]) in row
        assert str(keys.get("shift_factor", "")) in row


@pytest.mark.slow
def test_the_true_sd1(tmp_path):
    """At full size: 83.7 million parameters, as in every Stable Diffusion 1.x."""
    config = network((128, 256, 512, 512), scaling_factor=0.18215) | {"sample_size": 512}
    stock = build(tmp_path / "vae", config)
    assert sum(p.numel() for p in stock.parameters()) == 83_653_863
    convert(tmp_path / "vae", tmp_path / "vae.safetensors")
    assert len(load_file(tmp_path / "vae.safetensors")) == 248
    assert_same_outputs(stock, reference(config, tmp_path / "vae.safetensors"))
    convert(tmp_path / "vae.safetensors", tmp_path / "back")
    before, after = (load_file(tmp_path / n / WEIGHTS_FILE) for n in ("vae", "back"))
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_names_of_any_depth_are_one_to_one():
    for levels in (1, 2, 11):
        config = network([32] * levels, 1, (0, levels - 1))
        shapes = diffusers_shapes(config, "it")
        names = {ldm_name(name, levels) for name in shapes}
        assert len(names) == len(shapes)
        ddconfig = ddconfig_of(config | {"sample_size": 2**levels})
        with torch.device("meta"):
            wanted = FirstStage(ddconfig).state_dict()
        assert {n: tuple(t.shape) for n, t in wanted.items()} == {
            ldm_name(name, levels): ldm_shape(shape) for name, shape in shapes.items()
        }
        text = dump_ldm_config(complete_config(config | {"sample_size": 2**levels}, "it"), "a")
        assert yaml.safe_load(text)["model"]["params"]["ddconfig"] == ddconfig
