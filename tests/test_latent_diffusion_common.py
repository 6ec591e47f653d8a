"""What diffusers asks of every pipeline in its common tests, for all three tasks of ours."""

import sys

import numpy as np
import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
from diffusers.callbacks import PipelineCallback
from tiny_pipelines import NAMES, make_dit, make_pipeline, make_unet, make_vae, sample

from latent_diffusion import LatentDiffusionPipeline

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.usefixtures("one_thread"),
]

IMAGE = torch.linspace(0, 1, 3 * 16 * 16).view(1, 3, 16, 16)
MASK = torch.zeros(16, 16).index_fill(0, torch.arange(5, 11), 1.0)
TASKS = {
    "generation": {},
    "image-to-image": {"image": IMAGE, "strength": 0.7},
    "inpainting": {"image": IMAGE, "mask_image": MASK},
}


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline(make_unet(classes=3), id2label=NAMES)


@pytest.fixture(params=TASKS.values(), ids=TASKS)
def task(request):
    return {**request.param, "class_labels": "dog", "guidance_scale": 2.0}


@pytest.fixture
def modules_cache(tmp_path, monkeypatch):
    """diffusers copies a folder's code to a cache: to this one, for the length of a test."""
    cache = str(tmp_path / "modules")
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", cache)
    monkeypatch.setattr(sys, "path", [*sys.path])


def load(folder, **options):
    loaded = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **options)
    loaded.set_progress_bar_config(disable=True)
    return loaded


class TestSaving:
    def test_a_loaded_pipeline_is_equal(self, pipe, tmp_path, modules_cache):
        pipe.save_pretrained(tmp_path / "pipe")
        loaded = load(tmp_path / "pipe")
        for task in TASKS.values():
            assert torch.equal(sample(loaded, **task), sample(pipe, **task))

    # The name that diffusers before 0.42 knows; later ones want `dtype`.
    @pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning")
    def test_half_precision_variants(self, tmp_path, modules_cache):
        half = make_pipeline(make_unet(), vae=make_vae()).to(dtype=torch.float16)
        half.save_pretrained(tmp_path / "pipe", variant="fp16")
        names = {file.name for file in (tmp_path / "pipe").glob("*/*.safetensors")}
        assert names == {"diffusion_pytorch_model.fp16.safetensors"}
        loaded = load(tmp_path / "pipe", variant="fp16", torch_dtype=torch.float16)
        assert loaded.dtype == torch.float16
        options = TASKS["inpainting"]
        assert torch.equal(sample(loaded, **options), sample(half, **options))
        wide = load(tmp_path / "pipe", variant="fp16", torch_dtype=torch.bfloat16)
        assert {wide.vae.dtype, wide.denoiser.dtype} == {torch.bfloat16}
        assert sample(wide, **options).isfinite().all()

    def test_components_make_another_pipeline(self, pipe, task):
        assert set(pipe.components) == {"vae", "denoiser", "scheduler"}
        other = LatentDiffusionPipeline(**pipe.components, id2label=NAMES)
        again = LatentDiffusionPipeline.from_pipe(pipe)
        for copy in (other, again):
            copy.set_progress_bar_config(disable=True)
            assert torch.equal(sample(copy, **task), sample(pipe, **task))

    def test_a_component_is_replaced_while_loading(self, pipe, tmp_path, modules_cache):
        pipe.save_pretrained(tmp_path / "pipe")
        loaded = load(tmp_path / "pipe", scheduler=EulerDiscreteScheduler())
        assert type(loaded.scheduler) is EulerDiscreteScheduler
        assert not torch.equal(sample(loaded), sample(pipe))


class TestOutput:
    def test_dict_and_tuple_agree(self, pipe, task):
        tuple_output = pipe(
            **task,
            generator=torch.Generator().manual_seed(0),
            num_inference_steps=3,
            output_type="np",
            return_dict=False,
        )
        assert type(tuple_output) is tuple
        np.testing.assert_array_equal(tuple_output[0], sample(pipe, **task, output_type="np"))

    def test_a_batch_is_its_single_images(self, pipe, task):
        def generators():
            return [torch.Generator().manual_seed(seed) for seed in range(3)]

        options = {**task, "num_inference_steps": 3, "output_type": "pt"}
        batch = pipe(generator=generators(), **options).images
        assert batch.shape == (3, 3, 16, 16)
        for image, generator in zip(batch, generators(), strict=True):
            single = pipe(generator=generator, **options).images[0]
            torch.testing.assert_close(image, single, atol=1e-5, rtol=0)

    def test_a_generator_decides_the_result_and_steps_matter(self, pipe, task):
        first = sample(pipe, **task)
        assert torch.equal(first, sample(pipe, **task))
        assert not torch.equal(first, sample(pipe, **task, seed=1))
        assert not torch.equal(first, sample(pipe, **task, num_inference_steps=6))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_near(self, task, dtype):
        whole = make_pipeline(make_unet(classes=3), id2label=NAMES)
        wanted = sample(whole, **task)
        images = sample(whole.to(dtype=dtype), **task).float()
        torch.testing.assert_close(images, wanted, atol=0.05, rtol=0)
        assert (images - wanted).square().mean() < 1e-4

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_a_dit_at_another_size_in_half_precision(self, dtype):
        pipe = make_pipeline(make_dit(), vae=make_vae(force_upcast=False)).to(dtype=dtype)
        assert sample(pipe, height=24, width=20).isfinite().all()


class TestCallbacks:
    def test_inputs_are_those_asked_for(self, pipe, task):
        def callback(pipeline, step, timestep, tensors):
            assert set(tensors) == set(pipe._callback_tensor_inputs)
            return {"latents": torch.zeros_like(tensors["latents"])} if step == last else tensors

        last = 1 if "strength" in task else 2  # 0.7 of 3 steps are 2
        names = list(pipe._callback_tensor_inputs)
        latents = sample(
            pipe,
            **task,
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=names,
            output_type="latent",
        )
        assert latents.abs().sum() == 0

    def test_properties_say_what_a_call_does(self, pipe, task):
        seen = []

        class Watch(PipelineCallback):
            tensor_inputs = ["latents"]  # noqa: RUF012

            def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
                seen.append((pipeline.guidance_scale, pipeline.do_classifier_free_guidance))
                seen.append((pipeline.interrupt, pipeline.num_timesteps))
                pipeline._guidance_scale = 1.0
                pipeline._interrupt = True
                return callback_kwargs

        sample(pipe, **task, callback_on_step_end=Watch())
        steps = 2 if "strength" in task else 3  # 0.7 of 3, rounded down
        assert seen == [(2.0, True), (False, steps)]
        assert not pipe.do_classifier_free_guidance

    def test_the_progress_bar_counts_the_steps(self, task, capsys):
        pipe = make_pipeline(make_unet(classes=3), id2label=NAMES)
        pipe.set_progress_bar_config(disable=False)
        sample(pipe, **task)
        assert ("2/2" if "strength" in task else "3/3") in capsys.readouterr().err
        pipe.set_progress_bar_config(disable=True)
        sample(pipe, **task)
        assert capsys.readouterr().err == ""


class TestMemory:
    def test_slicing_and_tiling(self):
        pipe = make_pipeline()
        options = {"image": IMAGE, "batch_size": 2}
        whole = sample(pipe, **options)
        pipe.enable_vae_slicing()
        assert pipe.vae.use_slicing
        torch.testing.assert_close(sample(pipe, **options), whole, atol=1e-5, rtol=0)
        pipe.disable_vae_slicing()
        pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 16, 8
        large = {"image": IMAGE, "height": 48, "width": 40}
        untiled = sample(pipe, **large)
        pipe.enable_vae_tiling()
        tiled = sample(pipe, **large)
        assert tiled.shape == (1, 3, 48, 40)
        assert not torch.equal(tiled, untiled)
        pipe.disable_vae_tiling()
        assert torch.equal(sample(pipe, **large), untiled)
        assert not pipe.vae.use_slicing

    def test_offloading_hooks_run_in_the_sequence(self, task, monkeypatch):
        """As `enable_model_cpu_offload` sets them, with the CPU in the accelerator's place."""
        pipe = make_pipeline(make_unet(classes=3), id2label=NAMES)
        wanted, hook, freed = sample(pipe, **task), None, []
        for name in LatentDiffusionPipeline.model_cpu_offload_seq.split("->"):
            model = pipe.components[name]
            _, hook = cpu_offload_with_hook(model, "cpu", prev_module_hook=hook)
        monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(True))
        assert pipe._execution_device == torch.device("cpu")
        assert torch.equal(sample(pipe, **task), wanted)
        assert freed == [True]

    @pytest.mark.gpu
    def test_model_cpu_offload_on_a_gpu(self, task):
        pipe = make_pipeline(make_unet(classes=3), id2label=NAMES).to("cuda")
        wanted = sample(pipe, **task)
        pipe.enable_model_cpu_offload()
        for _ in range(2):
            torch.testing.assert_close(sample(pipe, **task).cpu(), wanted.cpu(), atol=1e-4, rtol=0)
            assert {pipe.vae.device.type, pipe.denoiser.device.type} == {"cpu"}

    @pytest.mark.gpu
    def test_a_gpu_makes_the_cpus_picture(self, task):
        pipe = make_pipeline(make_unet(classes=3), id2label=NAMES)
        wanted = sample(pipe, **task)
        images = sample(pipe.to("cuda"), **task)
        assert images.device.type == "cuda"
        torch.testing.assert_close(images.cpu(), wanted, atol=1e-3, rtol=0)
