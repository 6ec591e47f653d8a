"""Going on from somebody's autoencoder, above all with its latent space left where it is."""

import json
import shutil

import diffusers
import pytest
import torch
from conftest import photograph_tensor
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderTiny
from safetensors.torch import load_file
from test_processes import assert_same_weights, launch

from latent_ae import UserError, export_run, train
from latent_ae.autoencoder import Autoencoder, build_network, load_network, weights_sha256
from latent_ae.cli import main
from latent_ae.config import NetworkConfig
from latent_ae.config_file import dump_yaml
from latent_ae.describe import describe
from latent_ae.latents import decode, encode
from latent_ae.lineage import latents_of, readable_latents
from latent_ae.memory import training_memory
from latent_ae.run_folder import RunFolder

# The configs of released autoencoders, narrower and shallower, their other keys as published.
SHAPES = {
    "sd15": {"latent_channels": 4, "scaling_factor": 0.18215, "force_upcast": False},
    "sdxl": {"latent_channels": 4, "scaling_factor": 0.13025, "force_upcast": True},
    "sd3": {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609},
    "flux": {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159},
    "flux2": {"latent_channels": 32},
}
CLASSES = {"flux2": AutoencoderKLFlux2}  # which scales by a BatchNorm
WITHOUT_QUANT_CONVS = {"use_quant_conv": False, "use_post_quant_conv": False}
for name in ("sd3", "flux"):
    SHAPES[name] |= WITHOUT_QUANT_CONVS
SMALL = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Builds the folder of an autoencoder of one of `SHAPES`."""

    def build(shape, **changes):
        folder = tmp_path_factory.mktemp("base") / shape
        torch.manual_seed(0)
        network = CLASSES.get(shape, AutoencoderKL)(
            **{
                "block_out_channels": (8, 16),
                "down_block_types": ("DownEncoderBlock2D",) * 2,
                "up_block_types": ("UpDecoderBlock2D",) * 2,
                "layers_per_block": 1,
                "norm_num_groups": 4,
                **SHAPES[shape],
                **changes,
            }
        )
        if shape == "flux2":
            network.bn.running_mean.normal_()
            network.bn.running_var.uniform_(0.5, 2)
        network.save_pretrained(folder)
        return folder

    return build


@pytest.fixture
def tuning(tiny):
    """A config that fine-tunes the decoder of a folder."""

    def build(folder, freeze="encoder", **sections):
        network = NetworkConfig(path=str(folder), freeze=freeze)
        return tiny(**sections).model_copy(update={"network": network})

    return build


@torch.no_grad()
def latents(folder):
    """By stock diffusers, of a photograph that is not a training picture."""
    kind = json.loads((folder / "config.json").read_text())["_class_name"]
    network = getattr(diffusers, kind).from_pretrained(folder).eval()
    return network.encode(photograph_tensor("chelsea", 64)).latent_dist.parameters


@pytest.mark.parametrize("shape", SHAPES)
def test_the_latent_space_does_not_move(base, tuning, quiet, tmp_path, shape):
    folder = base(shape)
    config = tuning(folder, training={"steps": 2, "validate_every": 2})
    run = train(config, quiet)
    out = export_run(run, tmp_path / "out", images=4)
    assert torch.equal(latents(out), latents(folder))
    before, after = load_file(folder / WEIGHTS), load_file(out / WEIGHTS)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    reading = ("decoder.", "post_quant_conv.")
    assert moved == {name for name in before if name.startswith(reading)}
    kept, told = (json.loads((f / "config.json").read_text()) for f in (folder, out))
    for key in ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "sample_size"):
        assert told.get(key) == kept.get(key), key
    if shape == "sdxl":  # which the few pictures of an export cannot disprove
        assert told["force_upcast"] is True
    assert "as it was before this fine-tuning" in (out / "README.md").read_text()


def test_an_autoencoder_that_scales_by_a_batch_norm_is_not_trained_whole(base, tuning, quiet):
    with pytest.raises(UserError, match=r"in a BatchNorm, .* network\.freeze=encoder"):
        train(tuning(base("flux2"), "nothing"), quiet)


def test_the_encoder_is_not_in_the_graph_and_there_is_no_kl(base, tuning):
    config = tuning(base("sd15"))
    model = Autoencoder.from_config(config)
    reconstruction = model(photograph_tensor("chelsea", 32))
    assert not reconstruction.code.latents.requires_grad
    assert reconstruction.code.loss_terms == {}
    reconstruction.images.sum().backward()
    for name, parameter in model.network.named_parameters():
        assert (parameter.grad is None) == name.startswith(("encoder", "quant")), name


def test_an_autoencoder_that_is_fine_tuned_whole_moves_and_is_measured(
    base, tuning, quiet, tmp_path
):
    folder = base("sd3")
    config = tuning(folder, "nothing", training={"steps": 2, "validate_every": 2})
    run = train(config, quiet)
    assert "kl" in RunFolder(run).log_rows()[0]
    out = export_run(run, tmp_path / "out", images=4)
    assert not torch.equal(latents(out), latents(folder))
    told = json.loads((out / "config.json").read_text())
    assert told["scaling_factor"] != SHAPES["sd3"]["scaling_factor"]
    assert readable_latents(out) == {weights_sha256(out)}
    kept = export_run(run, tmp_path / "kept", images=4, statistics="kept")
    told = json.loads((kept / "config.json").read_text())
    assert (told["scaling_factor"], told["shift_factor"]) == (1.5305, 0.0609)


def test_latents_of_the_base_are_decoded_by_its_new_decoder(base, tuning, quiet, photos, tmp_path):
    folder = base("sd15")
    encode(folder, str(photos), tmp_path / "latents", resolution=32)
    run = train(tuning(folder, training={"steps": 2, "validate_every": 2}), quiet)
    out = export_run(run, tmp_path / "out", images=4)
    decode(tmp_path / "latents", tmp_path / "pictures", model=out)
    assert list((tmp_path / "pictures").glob("*.png"))
    # A second generation reads both.
    again = export_run(
        train(tuning(out, training={"steps": 1}, output=str(tmp_path / "second")), quiet),
        tmp_path / "again",
        images=4,
    )
    assert readable_latents(again) > {weights_sha256(out), weights_sha256(folder)}
    other = base("sd15", layers_per_block=2)
    with pytest.raises(UserError, match="was encoded by another autoencoder"):
        decode(tmp_path / "latents", tmp_path / "more", model=other)


def _moved(folder):
    network = load_network(folder)
    with torch.no_grad():
        network.encoder.conv_in.bias += 1
    return network


REPLACED = {
    "weights": _moved,
    "no quant convs": lambda folder: build_network(NetworkConfig(**SMALL, use_quant_conv=False)),
    "deeper": lambda folder: build_network(NetworkConfig(**SMALL | {"layers_per_block": 2})),
    "another class": lambda folder: AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ),
}


@pytest.mark.parametrize("change", REPLACED)
def test_a_base_that_has_changed_vouches_for_nothing(base, change):
    folder = base("sd15")
    network = load_network(folder)
    assert latents_of(network, folder) == [weights_sha256(folder)]
    replacement = REPLACED[change](folder)
    shutil.rmtree(folder)
    assert latents_of(network, folder) == []
    replacement.save_pretrained(folder)
    assert latents_of(network, folder) == []


def test_a_resumed_fine_tuning_ends_bit_equal(base, tuning, quiet):
    """With an adversary that is heard, whose adaptive weight reads the frozen graph's end."""
    adversary = {"start": 1, "warmup_steps": 1, "channels": 4, "layers": 2}
    config = tuning(base("sdxl"), adversary=adversary, training={"precision": "bf16"})
    run = RunFolder(train(config, quiet))
    files = (f"network/{WEIGHTS}", "ema.safetensors", "discriminator.safetensors")
    whole = [load_file(run.checkpoint(4) / name) for name in files]
    assert all(name.startswith(("decoder", "post")) for name in whole[1])
    shutil.rmtree(run.checkpoint(4))
    train(config, quiet)
    for name, state in zip(files, whole, strict=True):
        again = load_file(run.checkpoint(4) / name)
        assert all(torch.equal(state[key], again[key]) for key in state), name


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True], ids=["ddp", "fsdp2"])
def test_two_processes_fine_tune_as_one(base, tuning, quiet, tmp_path, shard):
    folder = base("flux")

    def config(name, batch_size, **training):
        return tuning(
            folder,
            bottleneck={"weight": 0},  # the code deterministic, as noise is each process's own
            data={"batch_size": batch_size},
            training={"learning_rate": 5e-4, **training},
            output=str(tmp_path / name),
        )

    one = train(config("one", 4), quiet)
    two = config("two", 2, shard=shard)
    launch(two, tmp_path / "two.yaml")
    files = (f"network/{WEIGHTS}", "ema.safetensors")
    assert_same_weights(one, two.output, 4, files, rtol=1e-3, atol=3e-4)
    saved = load_file(RunFolder(two.output).checkpoint(4) / files[0])
    before = load_file(folder / WEIGHTS)
    assert all(torch.equal(saved[name], before[name]) for name in saved if "encoder" in name)


def test_what_is_frozen_costs_no_memory_and_is_told(base, tuning):
    folder = base("sd15")
    frozen, whole = tuning(folder), tuning(folder, "nothing")
    network = load_network(folder)
    memory = [training_memory(config, network) for config in (frozen, whole)]
    for key in ("weights and EMA", "gradients and optimizer", "activations"):
        assert memory[0][key] < memory[1][key], key
    facts = describe(frozen)
    assert "the decoder's alone learn" in facts["parameters"]
    assert "KL" not in facts["loss"]
    assert "without effect" in facts["kl weight λ"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["network.freeze=encoder"], "freeze: encoder needs `path`"),
        (["network.path=nowhere", "network.freeze=encoder"], "nowhere is no exported autoencoder"),
        (
            ["network.path=x", "network.init=linear"],
            "with `path` the network is that of the folder",
        ),
    ],
)
def test_what_cannot_be_fine_tuned_is_refused(tiny, tmp_path, capsys, monkeypatch, words, sentence):
    config = tmp_path / "config.yaml"
    config.write_text(dump_yaml(tiny()))
    monkeypatch.setattr("sys.argv", ["latent-ae", "train", str(config), "network=null", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("statistics", ["scale", "shift", "channels", "folded"])
def test_frozen_latents_are_not_scaled_anew(base, tuning, quiet, tmp_path, statistics):
    run = train(tuning(base("sd15"), training={"steps": 1}, validation=None), quiet)
    with pytest.raises(UserError, match="would scale the latents anew"):
        export_run(run, tmp_path / "out", statistics=statistics)
    assert not (tmp_path / "out").exists()
