"""Runs with quantised latents: trained, resumed, shared by processes, exported, refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import photograph_tensor, tiny_content
from diffusers import VQModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from test_processes import assert_same_weights, launch

from latent_ae import UserError, export_run, load_network, train
from latent_ae.acceleration import accelerated_layers
from latent_ae.autoencoder import Autoencoder, encode_mode, reconstruct, weights_sha256
from latent_ae.config import Config, LFQConfig, VQConfig
from latent_ae.config_file import parse_config
from latent_ae.describe import describe
from latent_ae.frozen import FrozenAutoencoder
from latent_ae.quantized import QuantizedAutoencoder
from latent_ae.run_folder import RunFolder
from latent_ae.training.guard import Alarms
from latent_ae.training.prepare import prepare

KINDS = {
    "vq": {"kind": "vq", "codebook_size": 32},
    "normalized": {"kind": "vq", "codebook_size": 32, "normalized": True, "gradient": "rotation"},
    "ema": {"kind": "vq", "codebook_size": 32, "update": "ema", "revive_after": 2},
    "residual": {"kind": "vq", "codebook_size": 16, "depth": 2, "heads": 2},
    "fsq": {"kind": "fsq", "levels": [5, 5, 4, 4]},
    "lfq": {"kind": "lfq", "bits": 6},
}
STOCK = ("vq", "normalized", "ema")
NETWORK = "network/diffusion_pytorch_model.safetensors"


def content_of(kind, photos, output, **training):
    content = tiny_content(photos, output)
    content["network"].pop("use_quant_conv", None)
    content["network"].pop("init", None)
    content["network"].pop("latent_channels", None)
    content["bottleneck"] = KINDS[kind] if isinstance(kind, str) else kind
    content["training"] |= training
    return content


@pytest.fixture(scope="module")
def runs(photos, tmp_path_factory, quiet):
    """A finished run of each kind, trained when it is first asked for."""
    done = {}

    def run(kind):
        if kind not in done:
            folder = tmp_path_factory.mktemp("quantized") / kind
            done[kind] = train(parse_config(content_of(kind, photos, folder)), quiet)
        return done[kind]

    return run


@pytest.fixture(scope="module")
def folders(runs, tmp_path_factory):
    """Its exported folder."""
    done = {}

    def folder(kind):
        if kind not in done:
            out = tmp_path_factory.mktemp("exported") / kind
            done[kind] = export_run(runs(kind), out, images=8)
        return done[kind]

    return folder


@pytest.mark.parametrize("kind", KINDS)
class TestEveryKind:
    def test_one_key_makes_a_run_discrete(self, kind, runs):
        rows = [row for row in RunFolder(runs(kind)).log_rows() if row["group"] == "train"]
        assert all("code_usage" not in row for row in rows)  # before a hundred updates
        assert all(row["perplexity"] >= 1 for row in rows)
        assert ("commitment" in rows[0]) == (kind != "fsq")
        assert ("codebook" in rows[0]) == (kind in ("vq", "normalized", "residual"))
        assert ("entropy" in rows[0]) == (kind == "lfq")
        last = [row for row in RunFolder(runs(kind)).log_rows() if row["group"] == "validation"][-1]
        assert last["psnr"] > 5

    def test_the_folder_reconstructs_as_the_run(self, kind, runs, folders):
        network, _ = RunFolder(runs(kind)).trained_network()
        image = photograph_tensor("chelsea", 64)
        with torch.no_grad():
            wanted = reconstruct(network.eval(), image)
            made = reconstruct(load_network(folders(kind)).eval(), image)
        assert (made - wanted).abs().max() < 1e-4
        frozen = FrozenAutoencoder(folders(kind))
        mean, logvar = frozen.encode(image)
        assert logvar is None
        numbers = frozen.indices(mean)
        assert (frozen.decode_indices(numbers) - wanted).abs().max() < 1e-4
        torch.testing.assert_close(frozen.entries(numbers), frozen.network.quantize(mean)[0])
        bits = frozen.codes * torch.log2(torch.tensor(frozen.codebook_size)) * mean[0, 0].numel()
        assert frozen.bits(mean, None).item() == pytest.approx(bits.item())

    def test_one_codebook_loads_in_stock_diffusers(self, kind, folders):
        if kind not in STOCK:
            pytest.skip("with its own code, below")
        stock = VQModel.from_pretrained(folders(kind))
        image = photograph_tensor("chelsea", 64)
        with torch.no_grad():
            made = stock(image).sample
            wanted = reconstruct(load_network(folders(kind)).eval(), image)
        assert (made - wanted).abs().max() < 1e-4
        assert not (folders(kind) / "quantized.py").exists()
        assert "VQModel.from_pretrained" in (folders(kind) / "README.md").read_text()

    def test_a_decoder_can_be_fine_tuned(self, kind, photos, folders, tmp_path, quiet):
        content = content_of(kind, photos, tmp_path / "run", steps=2)
        content["network"] = {"path": str(folders(kind)), "freeze": "encoder"}
        run = RunFolder(train(parse_config(content), quiet))
        before = load_file(folders(kind) / "diffusion_pytorch_model.safetensors")
        after = load_file(run.checkpoint(2) / NETWORK)
        name = "quantize.embedding.weight" if kind in STOCK else "quantize.codebooks"
        if name in before:
            kept = after["quantize.codebooks"]
            assert torch.equal(kept[0] if kind in STOCK else kept, before[name])
        moved = [k for k in before if k in after and not torch.equal(before[k], after[k])]
        assert moved
        assert all(k.startswith(("decoder", "post_quant_conv")) for k in moved)


def test_lengths_of_normalised_latents_do_not_spoil_the_stock_folder(runs, tmp_path):
    """Nothing in training holds them."""
    run = tmp_path / "run"
    shutil.copytree(runs("normalized"), run)
    checkpoint = RunFolder(run).latest()
    for name in (NETWORK, "ema.safetensors"):
        weights = load_file(checkpoint / name)
        for key in ("quant_conv.weight", "quant_conv.bias"):
            weights[key] = 3000 * weights[key]
        save_file(weights, checkpoint / name, {"format": "pt"})
    stock = VQModel.from_pretrained(export_run(run, tmp_path / "exported", images=8))
    network, _ = RunFolder(runs("normalized")).trained_network()
    image = photograph_tensor("chelsea", 64)
    with torch.no_grad():
        latents = stock.encode(image).latents
        assert 0.2 < latents.norm(dim=1).mean() < 5
        numbers = network.indices(encode_mode(network.eval(), image)[0])
        found = stock.quantize(latents)[2][2]
    assert (found.view_as(numbers) != numbers).float().mean() < 1e-3


def test_a_frozen_encoder_is_left_as_it_is(photos, tmp_path, quiet):
    """Others have stored its latents: their lengths are not settled."""
    torch.manual_seed(0)
    base = QuantizedAutoencoder(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, latent_channels=4,
        num_vq_embeddings=32, normalized=True,
    )  # fmt: skip
    with torch.no_grad():
        base.quant_conv.weight.mul_(64)
        base.quantize.codebooks.copy_(F.normalize(base.quantize.codebooks, dim=-1))
    base.save_pretrained(tmp_path / "base")
    content = content_of("normalized", photos, tmp_path / "run", steps=2)
    content["network"] = {"path": str(tmp_path / "base"), "freeze": "encoder"}
    out = export_run(train(parse_config(content), quiet), tmp_path / "out", images=8)
    before, after = (load_network(folder) for folder in (tmp_path / "base", out))
    assert torch.equal(before.quant_conv.weight, after.quant_conv.weight)
    readable = json.loads((out / "latent_ae.json").read_text())["latents_of"]
    assert readable == [weights_sha256(tmp_path / "base")]
    free = content_of("normalized", photos, tmp_path / "free", steps=2)
    free["network"] = {"path": str(tmp_path / "base")}
    out = export_run(train(parse_config(free), quiet), tmp_path / "settled", images=8)
    image = photograph_tensor("chelsea", 64)
    with torch.no_grad():
        assert 0.5 < VQModel.from_pretrained(out).encode(image).latents.norm(dim=1).mean() < 2


def test_a_folders_codebook_is_not_started_anew(folders, photos, tmp_path):
    content = content_of("vq", photos, tmp_path / "run")
    content["network"] = {"path": str(folders("vq"))}
    run = prepare(parse_config(content))
    before = load_file(folders("vq") / "diffusion_pytorch_model.safetensors")
    assert torch.equal(run.network.quantize.codebooks[0], before["quantize.embedding.weight"])
    assert "k-means" not in describe(parse_config(content))["codes"]
    run.close()


LOADED = """
import sys
sys.modules["latent_ae"] = None  # as on a machine that does not have it
import torch
from diffusers import AutoModel
network = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
image = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    latents = network.encode(image).latents
    made = network.decode_indices(network.indices(latents))
    again = network(image).sample
network.save_pretrained(sys.argv[3])
torch.save({"made": made, "again": again}, sys.argv[2])
"""


@pytest.mark.parametrize(
    "kind", ["fsq", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("lfq", "residual"))]
)
def test_the_others_load_with_the_code_in_their_folder(kind, folders, tmp_path):
    image, file = photograph_tensor("coffee", 64), tmp_path / "image.pt"
    torch.save(image, file)
    result = subprocess.run(
        [sys.executable, "-c", LOADED, str(folders(kind)), str(file), str(tmp_path / "again")],
        env=os.environ | {"HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "not expected" not in result.stderr
    made = torch.load(file, weights_only=True)
    with torch.no_grad():
        wanted = reconstruct(load_network(folders(kind)).eval(), image)
        again = reconstruct(load_network(tmp_path / "again").eval(), image)
    for pictures in (*made.values(), again):
        assert (pictures - wanted).abs().max() < 1e-4
    card = (folders(kind) / "README.md").read_text()
    assert "trust_remote_code=True" in card


@pytest.mark.parametrize("kind", ["ema", "residual", "lfq"])
def test_a_resumed_run_is_bit_equal(kind, runs, photos, tmp_path, quiet):
    """Moving averages, idle counts and revivals come back with the rest."""
    content = content_of(kind, photos, tmp_path / "run", steps=2)
    train(parse_config(content), quiet)
    content["training"]["steps"] = 4
    resumed = train(parse_config(content), quiet)
    files = [NETWORK, "ema.safetensors", "bottleneck.safetensors"]
    assert_same_weights(runs(kind), resumed, 4, files)


class TestProcesses:
    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["ema", "vq", "lfq"])
    def test_two_processes_equal_one(self, kind, photos, tmp_path, quiet):
        def config(name, batch_size):
            # Without revivals, which draw from each process's own latents.
            bottleneck = KINDS[kind] | ({} if kind == "lfq" else {"revive_after": 0})
            training = {"learning_rate": 5e-4, "ema": 0.5, "accumulation": 2}
            content = content_of(bottleneck, photos, tmp_path / name, **training)
            content["data"]["batch_size"] = batch_size
            content["validation"]["images"] = 2
            return parse_config(content)

        one = train(config("one", 4), quiet)
        two = config("two", 2)
        launch(two, tmp_path / "two.yaml")
        files = [NETWORK, "bottleneck.safetensors"]
        assert_same_weights(one, two.output, 4, files, rtol=1e-3, atol=1e-4)

    @pytest.mark.slow
    def test_revived_entries_are_the_same_on_every_process(self, photos, tmp_path):
        content = content_of("ema", photos, tmp_path / "run")
        content["bottleneck"] = KINDS["ema"] | {"codebook_size": 512, "kmeans": False}
        content["training"]["trackers"] = []
        path = tmp_path / "check.py"
        path.write_text(AGREEING)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", "2", str(path), json.dumps(content)]
        result = subprocess.run(
            command,
            env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        assert result.stdout.count("agree") == 2


AGREEING = """
import json, sys
import torch, torch.distributed
from rich.console import Console
from latent_ae.config_file import parse_config
from latent_ae.training.prepare import prepare
from latent_ae.training.step import update

run = prepare(parse_config(json.loads(sys.argv[1])))
revived = 0.0
for _ in range(4):
    revived += update(run).terms.get("codes_revived", torch.zeros(())).item()
    run.step += 1
assert revived > 0
books = run.network.quantize.codebooks.detach()
everyone = [torch.empty_like(books) for _ in range(2)]
torch.distributed.all_gather(everyone, books)
assert torch.equal(*everyone)
run.close()
print("agree", flush=True)
"""


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            ({"bottleneck": {"kind": "vq", "heads": 3}}, "heads 3 do not divide the 4 channels"),
            ({"bottleneck": {"kind": "fsq", "levels": [2, 5]}}, "levels"),
            (
                {"bottleneck": {"kind": "fsq"}, "network": {"vq_embed_dim": 3}},
                "4 levels for 3 channels",
            ),
            (
                {"bottleneck": {"kind": "lfq", "bits": 6}, "network": {"vq_embed_dim": 8}},
                "6 bits for 8 channels",
            ),
            (
                {"bottleneck": {"kind": "vq", "normalized": True, "depth": 2}},
                "normalized and depth exclude each other",
            ),
            ({"bottleneck": {"kind": "fsq", "levels": [2000, 3]}}, "levels"),
            (
                {
                    "bottleneck": {"kind": "vq"},
                    "network": {"init": "linear", "latent_channels": 8, "vq_embed_dim": 4},
                },
                "4 channels are quantised",
            ),
            (
                {"bottleneck": {"kind": "vq"}, "network": {"kind": "kl"}},
                "network.kind kl has a posterior: bottleneck.kind is kl there, not 'vq'",
            ),
            (
                {"bottleneck": {"kind": "kl"}, "network": {"kind": "vq"}},
                "gives codes: bottleneck.kind is vq or fsq or lfq there, not 'kl'",
            ),
            ({"bottleneck": {"kind": "vq"}, "training": {"shard": True}}, "training.shard"),
            (
                {"bottleneck": {"kind": "vq"}, "losses": {"equivariance": {}}},
                "losses.equivariance.scales",
            ),
            ({"bottleneck": {"kind": "vqq"}}, "bottleneck"),
        ],
    )
    def test_what_does_not_fit_is_said_before_training(self, changes, told, photos, tmp_path):
        content = content_of("vq", photos, tmp_path / "run")
        for section, values in changes.items():
            before = {} if section == "bottleneck" else content.get(section, {})
            content[section] = before | values
        with pytest.raises(UserError, match=told):
            parse_config(content)

    def test_a_folders_quantiser_is_not_another(self, folders, photos, tmp_path):
        content = content_of("vq", photos, tmp_path / "run")
        content["network"] = {"path": str(folders("vq"))}
        for bottleneck, told in (
            ({"kind": "vq", "codebook_size": 64}, "bottleneck.codebook_size=32"),
            ({"kind": "fsq"}, "bottleneck.kind=vq"),
            (KINDS["normalized"], "bottleneck.normalized=false"),
            ({"kind": "kl"}, "gives codes"),
        ):
            content["bottleneck"] = bottleneck
            with pytest.raises(UserError, match=told):
                Autoencoder.from_config(parse_config(content))

    def test_another_bottleneck_does_not_resume_a_run(self, runs, photos, quiet):
        content = content_of("vq", photos, runs("vq"))
        content["bottleneck"] = KINDS["vq"] | {"codebook_size": 64}
        with pytest.raises(UserError, match="another bottleneck"):
            train(parse_config(content), quiet)


class TestAlarms:
    def test_a_collapsed_codebook_is_told_once(self):
        alarms = Alarms(None, VQConfig(kind="vq", revive_after=0))
        rows = [{"code_usage": 0.05}] * 5
        told = [alarms.check(row, step) for step, row in enumerate(rows)]
        assert [len(sentences) for sentences in told] == [0, 0, 1, 0, 0]
        assert "5.0% of the codes" in told[2][0]
        assert "revive_after" in told[2][0]
        assert alarms.check({"code_usage": 0.5}, 6) == []

    def test_the_remedy_fits_the_kind(self):
        alarms = Alarms(None, LFQConfig(kind="lfq"))
        told = [alarms.check({"code_usage": 0.01}, step) for step in range(3)][-1]
        assert "bottleneck.entropy" in told[0]

    @pytest.mark.slow
    @pytest.mark.parametrize("revive_after", [0, 5])
    def test_a_run_that_collapses_says_so(self, photos, tmp_path, revive_after):
        content = content_of("vq", photos, tmp_path / "run", steps=112, log_every=2)
        content["bottleneck"] = {
            "kind": "vq",
            "codebook_size": 2**16,  # far more than these few pictures can use
            "kmeans": False,
            "revive_after": revive_after,
        }
        content["training"] |= {"checkpoint_every": 112, "validate_every": 112}
        run = RunFolder(train(parse_config(content), Console(quiet=True)))
        alarms = [row for row in run.log_rows() if row["group"] == "alarm"]
        assert len(alarms) == 1
        assert alarms[0]["step"] >= 100
        assert "of the codes were used lately" in alarms[0]["text"]


def test_what_a_config_means_is_told(tiny, photos, tmp_path):
    facts = describe(parse_config(content_of("vq", photos, tmp_path / "run")))
    assert facts["codes"].startswith("one of 32 a position; entries by the optimizer")
    assert "codebook + β · commitment" in facts["loss"]
    assert "bits a pixel" in facts["compression"]
    facts = describe(parse_config(content_of("residual", photos, tmp_path / "run")))
    assert facts["codes"].startswith("4 of 16 a position")


def test_layers_are_accelerated_in_training_and_out_of_it(folders):
    frozen = FrozenAutoencoder(folders("fsq"))
    assert accelerated_layers(frozen.network) > 4


def test_the_linear_start_is_that_of_a_kl_vae(photos, tmp_path, quiet):
    """The network reconstructs before it has learned anything, and the codes follow."""
    content = content_of("vq", photos, tmp_path / "run", steps=1, learning_rate=1e-9)
    content["network"] |= {
        "init": "linear", "block_out_channels": [32, 32], "norm_num_groups": 1,
        "mid_block_add_attention": False, "latent_channels": 4,
    }  # fmt: skip
    content["losses"] = {}
    content["bottleneck"] = {"kind": "vq", "codebook_size": 64}
    network, _ = RunFolder(train(parse_config(content), quiet)).trained_network()
    image = photograph_tensor("chelsea", 64)
    with torch.no_grad():
        latents, _ = encode_mode(network.eval(), image)
        unquantised = network.decode_entries(latents)
        made = reconstruct(network, image)
    assert (unquantised - image).square().mean() < 0.1 * image.var()
    assert (made - image).square().mean() < 0.5 * image.var()


def test_configs_are_frozen_and_print_back(photos, tmp_path):
    config = parse_config(content_of("lfq", photos, tmp_path / "run"))
    assert isinstance(config, Config)
    again = parse_config(json.loads(config.model_dump_json()))
    assert again == config
    assert Path(config.output).name == "run"
