"""The sampling pipeline: its arguments, its numbers, and the folder that stock diffusers loads."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    VQModel,
)
from diffusers.callbacks import PipelineCallback
from PIL import Image
from tiny_pipelines import NAMES, SHAPE, make_dit, make_pipeline, make_unet, make_vae, sample

from latent_diffusion import LatentDiffusionPipeline, scale_latents, unscale_latents

PIPELINES = Path(__file__).parents[1] / "pipelines"

# Some of diffusers' schedulers hand torch tensors to numpy in the way of numpy 1.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.usefixtures("one_thread"),
]

ZERO_SNR = {
    "timestep_spacing": "trailing",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
}


@pytest.fixture(scope="module")
def unconditional():
    return make_pipeline()


@pytest.fixture(scope="module", params=[make_unet, make_dit], ids=["unet", "dit"])
def conditional(request):
    return make_pipeline(request.param(classes=3), id2label=NAMES)


def exact_denoiser(pipe, point, monkeypatch):
    """Puts the optimal denoiser of a data set of one latent `point` in place of the network's."""

    def forward(inputs, timestep, class_labels=None, return_dict=True):
        t, config = timestep.view(-1, 1, 1, 1), pipe.scheduler.config
        if isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
            sigma = t / config.num_train_timesteps
            return ((inputs - point) / sigma,)  # x = (1 - s) point + s noise; noise - point
        alpha = pipe.scheduler.alphas_cumprod[t.long()]
        noise = (inputs - alpha.sqrt() * point) / (1 - alpha).sqrt()
        if config.prediction_type == "epsilon":
            return (noise,)
        return (alpha.sqrt() * noise - (1 - alpha).sqrt() * point,)

    monkeypatch.setattr(pipe.denoiser, "forward", forward)


class TestScale:
    @pytest.mark.parametrize(
        ("config", "expected"),
        [
            ({"scaling_factor": 0.5}, 2 * (3.0 - 0)),
            ({"scaling_factor": 0.5, "shift_factor": 0.25}, 2 * 3.0 + 0.25),
            (
                {"scaling_factor": 0.5, "latents_mean": [1.0] * 4, "latents_std": [5.0] * 4},
                3.0 * 5 / 0.5 + 1,
            ),
            ({}, 3.0),
        ],
    )
    def test_unscale_is_the_stock_pipelines_formula(self, config, expected):
        latents = torch.full((2, *SHAPE), 3.0)
        torch.testing.assert_close(
            unscale_latents(latents, config), torch.full_like(latents, expected)
        )

    def test_scale_inverts_unscale_channel_by_channel(self):
        config = {
            "scaling_factor": 0.7,
            "latents_mean": [0.0, 1.0, -2.0, 3.0],
            "latents_std": [1.0, 2.0, 3.0, 0.5],
        }
        latents = torch.randn(2, *SHAPE)
        torch.testing.assert_close(scale_latents(unscale_latents(latents, config), config), latents)
        raw = torch.tensor([0.0, 1.0, -2.0, 3.0]).view(1, 4, 1, 1)
        torch.testing.assert_close(scale_latents(raw, config), torch.zeros(1, 4, 1, 1))

    @pytest.mark.parametrize(
        "config",
        [
            {},
            {"shift_factor": 0.25},
            {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]},
        ],
        ids=["factor", "shift", "mean and std"],
    )
    def test_the_pipeline_decodes_the_unscaled_latents(self, config):
        vae = make_vae(**config)
        pipe = make_pipeline(vae=vae)
        latents = sample(pipe, output_type="latent")
        raw = latents / 0.5 + config.get("shift_factor", 0)
        if "latents_std" in config:
            std, mean = (
                torch.tensor(config[f"latents_{k}"]).view(1, 4, 1, 1) for k in ("std", "mean")
            )
            raw = latents * std / 0.5 + mean
        with torch.no_grad():
            expected = (vae.decode(raw).sample / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(sample(pipe), expected)


class TestCall:
    def test_unconditional(self, unconditional):
        images = unconditional(batch_size=2, num_inference_steps=2).images
        assert [type(image) for image in images] == [Image.Image] * 2
        assert images[0].size == (16, 16)

    def test_a_generator_decides_the_result(self, unconditional):
        assert torch.equal(sample(unconditional), sample(unconditional))
        assert not torch.equal(sample(unconditional), sample(unconditional, seed=1))

    def test_a_batch_with_a_list_of_generators_equals_single_images(self, unconditional):
        def generators():
            return [torch.Generator().manual_seed(seed) for seed in (3, 4)]

        options = {"num_inference_steps": 3, "output_type": "pt", "eta": 1.0}
        batch = unconditional(generator=generators(), **options).images
        single = [unconditional(generator=g, **options).images for g in generators()]
        torch.testing.assert_close(batch, torch.cat(single), atol=1e-5, rtol=0)

    def test_outputs_agree(self, unconditional):
        pt = sample(unconditional)
        array = sample(unconditional, output_type="np")
        pil = sample(unconditional, output_type="pil")
        np.testing.assert_array_equal(pt.permute(0, 2, 3, 1).numpy(), array)
        np.testing.assert_array_equal(np.asarray(pil[0]), (array[0] * 255).round().astype("uint8"))
        generator = torch.Generator().manual_seed(0)
        tuple_output = unconditional(
            generator=generator, num_inference_steps=3, output_type="pt", return_dict=False
        )
        assert isinstance(tuple_output, tuple)
        assert torch.equal(tuple_output[0], pt)

    def test_latents_replace_the_generator(self, unconditional):
        noise = torch.randn((1, *SHAPE), generator=torch.Generator().manual_seed(0))
        given = unconditional(latents=noise, num_inference_steps=3, output_type="pt").images
        assert torch.equal(given, sample(unconditional))

    def test_any_size_of_a_unet(self, unconditional):
        assert sample(unconditional, height=24, width=32).shape == (1, 3, 24, 32)
        sizeless = make_pipeline(make_unet(sample_size=None))
        assert sample(sizeless, height=8, width=16).shape == (1, 3, 8, 16)
        oblong = make_pipeline(make_unet(sample_size=(4, 8)))
        assert sample(oblong).shape == (1, 3, 8, 16)

    def test_callback_changes_the_latents(self, unconditional):
        seen = []

        def callback(pipe, step, timestep, tensors):
            seen.append((step, int(timestep), pipe.num_timesteps))
            return {"latents": torch.zeros_like(tensors["latents"])}

        latents = sample(unconditional, output_type="latent", callback_on_step_end=callback)
        assert torch.equal(latents, torch.zeros(1, *SHAPE))
        assert [step for step, *_ in seen] == [0, 1, 2]
        assert {total for *_, total in seen} == {3}

    def test_callback_interrupts(self, unconditional):
        steps = []

        def callback(pipe, step, timestep, tensors):
            steps.append(tensors["latents"])
            pipe._interrupt = step == 1

        latents = sample(unconditional, output_type="latent", callback_on_step_end=callback)
        assert len(steps) == 2
        assert torch.equal(latents, steps[-1])
        assert not torch.equal(latents, sample(unconditional, output_type="latent"))

    def test_a_callback_object_ends_the_guidance(self, conditional, monkeypatch):
        class Cutoff(PipelineCallback):
            tensor_inputs = ["labels"]  # noqa: RUF012

            def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
                pipeline._guidance_scale = 0.0
                return callback_kwargs

        sizes, forward = [], conditional.denoiser.forward

        def counted(inputs, **options):
            sizes.append(len(inputs))
            return forward(inputs, **options)

        monkeypatch.setattr(conditional.denoiser, "forward", counted)
        options = {"class_labels": 1, "guidance_scale": 4.0}
        sample(conditional, **options)
        sample(conditional, **options, callback_on_step_end=Cutoff())
        assert sizes == [2, 2, 2, 2, 1, 1]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"output_type": "jpeg"}, "output_type is one of pil, np, pt, latent"),
            ({"class_labels": 0}, "no class 0; the denoiser was taught 0 classes"),
            ({"guidance_scale": 2.0}, "guidance needs class_labels"),
            ({"num_inference_steps": 0}, "num_inference_steps must be at least 1"),
            ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
            (
                {"batch_size": 2, "latents": torch.zeros(1, 4, 8, 8)},
                "batch_size for 2, latents for 1",
            ),
            ({"latents": torch.zeros(1, 3, 8, 8)}, r"shape \(1, 4, 8, 8\), not \(1, 3, 8, 8\)"),
            ({"latents": np.zeros((1, 4, 8, 8))}, "latents must be a tensor"),
            ({"height": 17}, "height must be a multiple of 2, the autoencoder's factor, not 17"),
            ({"width": -4}, "width must be a multiple of 2, .* not -4"),
            ({"callback_on_step_end_tensor_inputs": ["noise"]}, "callbacks get only"),
        ],
    )
    def test_wrong_arguments(self, unconditional, options, message):
        with pytest.raises(ValueError, match=message):
            unconditional(**options)

    def test_sizes_that_a_denoiser_does_not_have(self):
        with pytest.raises(ValueError, match="no size of its own"):
            make_pipeline(make_unet(sample_size=None))()


class TestClasses:
    def test_labels_by_index_and_by_name(self, conditional):
        assert conditional.labels == {"cat": 0, "dog, hound": 1, "dog": 1, "hound": 1, "bird": 2}
        one = sample(conditional, class_labels="hound")
        assert torch.equal(one, sample(conditional, class_labels=1))
        assert not torch.equal(one, sample(conditional, class_labels=0))
        assert not torch.equal(one, sample(conditional))
        assert len(sample(conditional, class_labels=["cat", 1, "bird"])) == 3
        assert len(sample(conditional, class_labels="cat", batch_size=2)) == 2

    def test_guidance_of_one_is_no_guidance(self, conditional):
        plain = sample(conditional, class_labels=1)
        assert torch.equal(plain, sample(conditional, class_labels=1, guidance_scale=1.0))
        assert not torch.equal(plain, sample(conditional, class_labels=1, guidance_scale=3.0))

    def test_guidance_is_linear_in_every_channel(self, conditional):
        latents, t, labels = torch.randn(2, *SHAPE), torch.tensor(500), torch.tensor([0, 2])
        with torch.no_grad():
            conditional._guidance_scale = 1.0
            class_wise = conditional.predict(latents, t, labels)
            null = conditional.predict(latents, t, torch.full_like(labels, 3))
            conditional._guidance_scale = 2.5
            guided = conditional.predict(latents, t, labels)
        torch.testing.assert_close(guided, null + 2.5 * (class_wise - null), atol=1e-5, rtol=1e-4)

    def test_numbers_of_numpy_and_torch_are_labels(self, conditional):
        for one in (np.int64(1), torch.tensor(1), np.array(1)):
            assert conditional.get_label_ids(one) == [1]
            assert len(sample(conditional, class_labels=one, batch_size=2)) == 2
        for several in (np.array([0, 2]), torch.tensor([0, 2]), [np.int32(0), torch.tensor(2)]):
            assert conditional.get_label_ids(several) == [0, 2]
            assert len(sample(conditional, class_labels=several)) == 2

    def test_guidance_before_the_first_call(self):
        pipe = make_pipeline(make_unet(classes=3))
        assert pipe.guidance_scale == 1.0
        assert not pipe.do_classifier_free_guidance
        assert pipe.num_timesteps == 0
        assert not pipe.interrupt

    @pytest.mark.parametrize(
        "label", [3, -1, "fish", 1.0, np.float32(1), torch.tensor(1.0)], ids=str
    )
    def test_unknown_class(self, conditional, label):
        message = f"no class {label!r}; the denoiser was taught 3 classes, counted from 0: cat, "
        with pytest.raises(ValueError, match=re.escape(message)):
            conditional(class_labels=label)

    def test_a_label_list_that_contradicts_the_batch(self, conditional):
        with pytest.raises(ValueError, match="batch_size for 3, class_labels for 2"):
            conditional(batch_size=3, class_labels=[0, 1])

    def test_the_null_class_of_a_dit_is_its_last_embedding(self):
        dit = make_dit(classes=3)
        tables = [m.embedding_table for m in dit.modules() if hasattr(m, "embedding_table")]
        assert {table.num_embeddings for table in tables} == {4}
        assert make_pipeline(dit).get_label_ids(None) == [3]

    def test_a_dit_without_classes(self):
        pipe = make_pipeline(make_dit(classes=0))
        assert pipe.num_classes == 0
        assert sample(pipe).shape == (1, 3, 16, 16)


class TestScheduler:
    @pytest.mark.parametrize(
        ("scheduler", "config"),
        [
            (DDIMScheduler, {}),
            (DDPMScheduler, {}),
            (DPMSolverMultistepScheduler, {}),
            (EulerDiscreteScheduler, {}),
            (EulerAncestralDiscreteScheduler, {}),
            (HeunDiscreteScheduler, {}),
            (PNDMScheduler, {}),
            (FlowMatchEulerDiscreteScheduler, {}),
            (FlowMatchEulerDiscreteScheduler, {"use_dynamic_shifting": True}),
            (FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True}),
        ],
    )
    def test_each_runs_and_repeats(self, unconditional, scheduler, config):
        pipe = make_pipeline(unconditional.denoiser, scheduler(**config), unconditional.vae)
        latents = sample(pipe, num_inference_steps=4, output_type="latent", batch_size=2)
        assert latents.shape == (2, *SHAPE)
        assert latents.dtype == torch.float32
        assert latents.isfinite().all()
        again = sample(pipe, num_inference_steps=4, output_type="latent", batch_size=2)
        assert torch.equal(latents, again)

    @pytest.mark.parametrize("steps", [1, 4])
    @pytest.mark.parametrize(
        ("scheduler", "config"),
        [
            (FlowMatchEulerDiscreteScheduler, {}),
            (FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
            (DDIMScheduler, {"clip_sample": False}),
            (DDIMScheduler, {"clip_sample": False, **ZERO_SNR}),
            (DPMSolverMultistepScheduler, {"timestep_spacing": "trailing"}),
            (DPMSolverMultistepScheduler, ZERO_SNR),
            (EulerDiscreteScheduler, ZERO_SNR),
            (EulerAncestralDiscreteScheduler, {"timestep_spacing": "trailing"}),
        ],
    )
    def test_the_optimal_denoiser_of_one_point_ends_at_this_point(
        self, scheduler, config, steps, monkeypatch
    ):
        pipe = make_pipeline(scheduler=scheduler(**config))
        point = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))
        exact_denoiser(pipe, point, monkeypatch)
        latents = sample(pipe, batch_size=2, output_type="latent", num_inference_steps=steps)
        torch.testing.assert_close(latents, point.expand(2, *SHAPE), atol=1e-3, rtol=0)

    def test_ancestral_noise_comes_from_the_generators(self, unconditional):
        pipe = make_pipeline(
            unconditional.denoiser, EulerAncestralDiscreteScheduler(), unconditional.vae
        )
        generators = [torch.Generator().manual_seed(7) for _ in range(2)]
        options = {"num_inference_steps": 3, "output_type": "latent"}
        first, second = pipe(generator=generators, **options).images
        torch.testing.assert_close(first, second)

    def test_learned_variance(self):
        dit = make_dit(out_channels=8)
        plain = sample(make_pipeline(dit), class_labels=1, guidance_scale=2.0)
        assert plain.isfinite().all()
        learned = DDPMScheduler(variance_type="learned_range")
        options = {"output_type": "latent", "class_labels": 1}
        with_variance = sample(make_pipeline(dit, learned), **options)
        without = sample(make_pipeline(dit, DDPMScheduler()), **options)
        assert with_variance.shape == (1, *SHAPE)
        assert not torch.equal(with_variance, without)


class TestPrecision:
    def test_an_fp16_vae_that_would_overflow_decodes_in_fp32(self, monkeypatch):
        pipe = make_pipeline(vae=make_vae().half())
        seen = []
        decode = pipe.vae.decode
        monkeypatch.setattr(
            pipe.vae,
            "decode",
            lambda z, **kw: seen.append((z.dtype, pipe.vae.dtype)) or decode(z, **kw),
        )
        images = sample(pipe)
        assert seen == [(torch.float32, torch.float32)]
        assert pipe.vae.dtype == torch.float16
        assert images.isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_stays_near_fp32(self, unconditional, dtype):
        half = make_pipeline(make_unet(), vae=make_vae(force_upcast=False)).to(dtype=dtype)
        images = sample(half)
        assert images.dtype == dtype
        torch.testing.assert_close(images.float(), sample(unconditional), atol=0.02, rtol=0)

    def test_tiling_and_slicing_of_the_vae(self):
        pipe = make_pipeline()
        whole = sample(pipe, batch_size=2)
        pipe.vae.enable_slicing()
        torch.testing.assert_close(sample(pipe, batch_size=2), whole, atol=1e-5, rtol=0)
        pipe.vae.enable_tiling()
        assert sample(pipe, height=48, width=48).shape == (1, 3, 48, 48)

    def test_other_autoencoders_decode(self):
        torch.manual_seed(0)
        tiny = AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        )
        assert sample(make_pipeline(vae=tiny.eval()), height=24).shape == (1, 3, 24, 16)
        vq = VQModel(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            latent_channels=4,
            num_vq_embeddings=8,
        )
        assert sample(make_pipeline(vae=vq.eval())).shape == (1, 3, 16, 16)


# Runs in a process of its own: neither latent_ae nor this repository's files can be imported.
STRANGER = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("latent_ae", "latent_diffusion", "train_denoiser"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
import numpy as np, torch
from diffusers import DiffusionPipeline

source, again, output = sys.argv[1:]
torch.set_num_threads(1)
pipe = DiffusionPipeline.from_pretrained(source, trust_remote_code=True)
pipe.save_pretrained(again)
options = {"num_inference_steps": 3, "output_type": "np", "class_labels": "dog"}
options |= {"image": torch.full((1, 3, 16, 16), 0.5), "mask_image": torch.eye(16)}
first = pipe(generator=torch.Generator().manual_seed(0), **options).images
pipe = DiffusionPipeline.from_pretrained(again, trust_remote_code=True)
second = pipe(generator=torch.Generator().manual_seed(0), **options).images
np.save(output, np.stack([first, second]))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines") / "pipe"
    pipe = make_pipeline(make_unet(classes=3), id2label=NAMES)
    pipe.save_pretrained(folder)
    return pipe, folder


@pytest.fixture
def modules_cache(tmp_path, monkeypatch):
    """diffusers copies a folder's code to a cache: to this one, for the length of a test."""
    cache = str(tmp_path / "modules")
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", cache)
    monkeypatch.setattr(sys, "path", [*sys.path])


class TestFolder:
    def test_what_it_holds(self, saved):
        _, folder = saved
        content = json.loads((folder / "model_index.json").read_text())
        assert content["_class_name"] == ["latent_diffusion", "LatentDiffusionPipeline"]
        assert content["id2label"] == {"0": "cat", "1": "dog, hound", "2": "bird"}
        assert content["denoiser"] == ["diffusers", "UNet2DModel"]
        source = (PIPELINES / "latent_diffusion.py").read_text()
        assert (folder / "latent_diffusion.py").read_text() == source

    def test_loads_to_an_equal_pipeline(self, saved, modules_cache):
        pipe, folder = saved
        loaded = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded).__name__ == "LatentDiffusionPipeline"
        assert loaded.labels == pipe.labels
        assert set(loaded.components) == {"vae", "denoiser", "scheduler"}
        options = {"class_labels": ["cat", "bird"], "guidance_scale": 2.0}
        assert torch.equal(sample(loaded, **options), sample(pipe, **options))
        copy = LatentDiffusionPipeline(**loaded.components, **loaded.parameters)
        copy.set_progress_bar_config(disable=True)
        assert torch.equal(sample(copy, **options), sample(pipe, **options))

    def test_custom_pipeline_loads_from_a_checkout(self, saved, modules_cache):
        pipe, folder = saved
        file = str(PIPELINES / "latent_diffusion.py")
        loaded = DiffusionPipeline.from_pretrained(
            folder, custom_pipeline=file, trust_remote_code=True
        )
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(sample(loaded), sample(pipe))

    def test_code_is_refused_unless_trusted(self, saved, modules_cache):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            DiffusionPipeline.from_pretrained(saved[1])

    def test_stock_diffusers_alone_loads_and_saves_it_again(self, saved, tmp_path):
        pipe, folder = saved
        script = tmp_path / "stranger.py"
        script.write_text(STRANGER)
        environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
        environment.pop("HF_MODULES_CACHE", None)
        arguments = [folder, tmp_path / "again", tmp_path / "images.npy"]
        subprocess.run(
            [sys.executable, "-I", script, *arguments],
            env=environment,
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )
        first, second = np.load(tmp_path / "images.npy")
        task = {"image": torch.full((1, 3, 16, 16), 0.5), "mask_image": torch.eye(16)}
        expected = sample(pipe, output_type="np", class_labels="dog", **task)
        np.testing.assert_array_equal(first, expected)
        np.testing.assert_array_equal(second, expected)
        source = (PIPELINES / "latent_diffusion.py").read_text()
        assert (tmp_path / "again" / "latent_diffusion.py").read_text() == source
