"""Image-to-image, inpainting and odd sizes, beside diffusers' own pipelines and plain loops."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import photograph
from diffusers import (
    AutoencoderDC,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    VQModel,
)
from PIL import Image
from tiny_pipelines import SHAPE, make_dit, make_pipeline, make_unet, make_vae, sample
from torch.nn import functional as F

from latent_diffusion import scale_latents

pytestmark = [
    # Some of diffusers' schedulers hand torch tensors to numpy in the way of numpy 1.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.usefixtures("one_thread"),
]

SCHEDULERS = [
    (DDIMScheduler, {}),
    (DPMSolverMultistepScheduler, {}),
    (EulerDiscreteScheduler, {}),
    (FlowMatchEulerDiscreteScheduler, {}),
    (HeunDiscreteScheduler, {}),
    pytest.param(DDPMScheduler, {}, marks=pytest.mark.slow),
    pytest.param(EulerAncestralDiscreteScheduler, {}, marks=pytest.mark.slow),
    pytest.param(
        FlowMatchEulerDiscreteScheduler, {"use_dynamic_shifting": True}, marks=pytest.mark.slow
    ),
    pytest.param(UniPCMultistepScheduler, {}, marks=pytest.mark.slow),
]
STOCK = [
    (DDIMScheduler, {"steps_offset": 1, "clip_sample": False}),
    (HeunDiscreteScheduler, {"steps_offset": 1}),
    pytest.param(DPMSolverMultistepScheduler, {"steps_offset": 1}, marks=pytest.mark.slow),
    pytest.param(EulerDiscreteScheduler, {"steps_offset": 1}, marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline()


def pixels(name="chelsea", size=16):
    """A photograph in [0, 1], of shape (1, 3, size, size)."""
    array = np.asarray(photograph(name, size), dtype=np.float32) / 255
    return torch.from_numpy(array).permute(2, 0, 1)[None]


def box_mask(top=4, bottom=12, left=4, right=12, height=16, width=16):
    mask = torch.zeros(height, width)
    mask[top:bottom, left:right] = 1
    return mask


def stock(kind, pipe, **options):
    """A stock pipeline of text, whose network is the denoiser and sees no text."""
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(4,),
        norm_num_groups=2,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        cross_attention_dim=8,
        attention_head_dim=2,
    )

    def forward(inputs, timestep, encoder_hidden_states, **_):
        return pipe.denoiser(inputs, timestep, return_dict=False)

    unet.forward = forward
    parts = dict.fromkeys(("text_encoder", "tokenizer", "feature_extractor"))
    other = kind(
        vae=pipe.vae,
        unet=unet,
        scheduler=type(pipe.scheduler).from_config(pipe.scheduler.config),
        safety_checker=None,
        requires_safety_checker=False,
        **parts,
    )
    other.set_progress_bar_config(disable=True)
    return other(
        prompt_embeds=torch.zeros(1, 1, 8),
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        num_inference_steps=5,
        **options,
    ).images


class TestImageToImage:
    @pytest.mark.parametrize("strength", [0.45, 0.8, 1.0])
    @pytest.mark.parametrize(("scheduler", "config"), STOCK)
    def test_equals_the_stock_pipeline(self, scheduler, config, strength):
        pipe, image = make_pipeline(scheduler=scheduler(**config)), photograph("coffee", 16)
        options = {"image": image, "strength": strength}
        wanted = stock(StableDiffusionImg2ImgPipeline, pipe, **options)
        latents = sample(pipe, num_inference_steps=5, output_type="latent", **options)
        torch.testing.assert_close(latents, wanted, atol=1e-5, rtol=1e-5)

    def test_flow_matching_equals_a_plain_loop(self):
        pipe = make_pipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            posterior = pipe.vae.encode(2 * pixels() - 1).latent_dist
            clean = posterior.sample(generator) * 0.5
            noise = torch.randn(1, *SHAPE, generator=generator)
            reference = FlowMatchEulerDiscreteScheduler(shift=3.0)
            reference.set_timesteps(10)
            sigmas = reference.sigmas[4:]
            x = (1 - sigmas[0]) * clean + sigmas[0] * noise
            for now, then in pairwise(sigmas):
                x = x + (then - now) * pipe.denoiser(x, now * 1000).sample
        latents = sample(
            pipe, image=pixels(), strength=0.6, num_inference_steps=10, output_type="latent"
        )
        torch.testing.assert_close(latents, x, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize(("scheduler", "config"), SCHEDULERS)
    def test_little_strength_returns_the_picture(self, scheduler, config, monkeypatch):
        pipe = make_pipeline(scheduler=scheduler(**config))
        image = sample(pipe, output_type="latent")
        near, far = (
            sample(pipe, image=image, strength=s, num_inference_steps=20, output_type="latent")
            for s in (0.05, 0.5)
        )
        assert (near - image).norm() < 0.3 * (far - image).norm()

    def test_pictures_of_every_kind_are_one(self, pipe):
        photo = photograph("chelsea", 16)
        array = np.asarray(photo, dtype=np.float32) / 255
        kinds = [
            photo,
            [photo],
            array,
            array[None],
            [array],
            pixels(),
            pixels()[0],
            [pixels()[0]],
            photo.convert("RGBA"),
        ]
        options = {"num_inference_steps": 1, "strength": 1.0}
        results = [sample(pipe, image=kind, **options) for kind in kinds]
        for result in results[1:]:  # convolutions round by the order of a tensor in memory
            torch.testing.assert_close(result, results[0], atol=1e-5, rtol=0)

    def test_latents_are_taken_as_scaled_and_as_they_are(self, pipe):
        latents = sample(pipe, output_type="latent")
        options = {"strength": 0.5, "num_inference_steps": 4, "output_type": "latent"}
        noise = torch.randn(1, *SHAPE)
        x = pipe(image=latents, latents=noise, **options).images
        scheduler = DDIMScheduler()
        scheduler.set_timesteps(4)
        with torch.no_grad():
            wanted = scheduler.add_noise(latents, noise, scheduler.timesteps[2:3])
            for t in scheduler.timesteps[2:]:
                wanted = scheduler.step(pipe.denoiser(wanted, t).sample, t, wanted).prev_sample
        torch.testing.assert_close(x, wanted, atol=1e-5, rtol=1e-5)

    def test_the_default_strength(self, pipe):
        default = sample(pipe, image=pixels(), num_inference_steps=5)
        assert torch.equal(
            default, sample(pipe, image=pixels(), num_inference_steps=5, strength=0.8)
        )
        assert pipe.num_timesteps == 4

    def test_sizes_are_the_pictures_or_those_asked_for(self, pipe):
        photo = photograph("coffee").resize((27, 22))
        assert sample(pipe, image=photo).shape == (1, 3, 22, 26)
        assert sample(pipe, image=photo, height=20, width=12).shape == (1, 3, 20, 12)
        assert sample(pipe, image=photo, height=20).shape == (1, 3, 20, 26)

    def test_a_batch_equals_single_calls(self, pipe):
        images = [photograph("chelsea", 16), photograph("coffee", 16)]
        options = {"num_inference_steps": 4, "output_type": "pt"}

        def generators():
            return [torch.Generator().manual_seed(seed) for seed in (5, 6)]

        batch = pipe(image=images, generator=generators(), **options).images
        single = [
            pipe(image=image, generator=generator, **options).images
            for image, generator in zip(images, generators(), strict=True)
        ]
        torch.testing.assert_close(batch, torch.cat(single), atol=1e-5, rtol=0)
        one = pipe(image=images[0], generator=generators(), **options).images
        torch.testing.assert_close(one[:1], batch[:1], atol=1e-5, rtol=0)
        assert not torch.equal(one[1], batch[1])

    def test_guidance_with_labels(self):
        pipe = make_pipeline(make_unet(classes=3))
        options = {"image": pixels(), "class_labels": [0, 2]}
        plain, guided = sample(pipe, **options), sample(pipe, **options, guidance_scale=3.0)
        assert plain.shape == (2, 3, 16, 16)
        assert not torch.equal(plain, guided)
        assert not torch.equal(plain[0], plain[1])

    @pytest.mark.parametrize("scheduler", [PNDMScheduler, LMSDiscreteScheduler])
    def test_schedulers_that_cannot_start_midway(self, scheduler):
        pipe = make_pipeline(scheduler=scheduler())
        with pytest.raises(ValueError, match=f"{scheduler.__name__} cannot start midway"):
            sample(pipe, image=pixels(), strength=0.5, num_inference_steps=4)
        whole = sample(pipe, image=pixels(), strength=1.0, num_inference_steps=4)
        assert whole.isfinite().all()

    def test_a_scheduler_that_adds_no_noise(self):
        with pytest.raises(ValueError, match="IPNDMScheduler cannot add noise to an image"):
            sample(make_pipeline(scheduler=IPNDMScheduler()), image=pixels())


class TestInpainting:
    @pytest.mark.parametrize("strength", [0.6, 1.0])
    @pytest.mark.parametrize(("scheduler", "config"), STOCK)
    def test_equals_the_stock_pipeline(self, scheduler, config, strength):
        """Where the mask ends at the latents' cells, which both then see alike."""
        pipe = make_pipeline(scheduler=scheduler(**config))
        mask = Image.fromarray(box_mask().numpy().astype(np.uint8) * 255)
        options = {"image": photograph("coffee", 16), "mask_image": mask, "strength": strength}
        wanted = stock(StableDiffusionInpaintPipeline, pipe, height=16, width=16, **options)
        latents = sample(pipe, num_inference_steps=5, output_type="latent", **options)
        torch.testing.assert_close(latents, wanted, atol=1e-5, rtol=1e-5)

    def test_flow_matching_equals_a_plain_loop(self):
        pipe = make_pipeline(scheduler=FlowMatchEulerDiscreteScheduler())
        reference = FlowMatchEulerDiscreteScheduler()
        reference.set_timesteps(6)
        sigmas, generator = reference.sigmas, torch.Generator().manual_seed(0)
        inside = F.max_pool2d(box_mask()[None, None], 2) > 0
        with torch.no_grad():
            clean = pipe.vae.encode(2 * pixels() - 1).latent_dist.sample(generator) * 0.5
            x = noise = torch.randn(1, *SHAPE, generator=generator)
            for now, then in pairwise(sigmas):
                x = x + (then - now) * pipe.denoiser(x, now * 1000).sample
                x = torch.where(inside, x, (1 - then) * clean + then * noise)
        latents = sample(
            pipe,
            image=pixels(),
            mask_image=box_mask(),
            num_inference_steps=6,
            output_type="latent",
        )
        torch.testing.assert_close(latents, x, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize(("scheduler", "config"), [*SCHEDULERS, (PNDMScheduler, {})])
    def test_pixels_outside_the_mask_are_the_pictures_own(self, scheduler, config):
        pipe, mask = make_pipeline(scheduler=scheduler(**config)), box_mask(3, 11, 5, 6)
        inside = mask.bool()
        result = sample(pipe, image=pixels(), mask_image=mask, num_inference_steps=4)
        assert torch.equal(result[..., ~inside], pixels()[..., ~inside])
        assert (result[..., inside] != pixels()[..., inside]).float().mean() > 0.9

    def test_also_as_arrays_and_pictures(self, pipe):
        photo, mask = photograph("chelsea", 16), box_mask(3, 11, 5, 6)
        options, inside = {"image": photo, "mask_image": mask}, mask.bool()
        array = sample(pipe, **options, output_type="np")
        np.testing.assert_array_equal(array[0][~inside], pixels()[0].permute(1, 2, 0)[~inside])
        picture = np.asarray(sample(pipe, **options, output_type="pil")[0])
        np.testing.assert_array_equal(picture[~inside], np.asarray(photo)[~inside])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_also_in_half_precision(self, dtype):
        pipe = make_pipeline(make_unet(), vae=make_vae()).to(dtype=dtype)
        inside = box_mask().bool()
        result = sample(pipe, image=pixels(), mask_image=box_mask())
        assert torch.equal(result[..., ~inside], pixels()[..., ~inside])
        assert result.isfinite().all()

    def test_a_line_of_one_pixel_is_repainted(self, pipe):
        """A nearest pixel in each cell, as stock pipelines look at, would miss this line."""
        mask = box_mask(0, 16, 7, 8)
        assert F.interpolate(mask[None, None], size=(8, 8)).sum() == 0
        image = sample(pipe, output_type="latent")
        latents = sample(pipe, image=image, mask_image=mask, seed=1, output_type="latent")
        changed = (latents != image).any(dim=1)[0]
        assert changed[:, 3].all()
        changed[:, 3] = False
        assert not changed.any()

    def test_masks_of_every_kind_are_one(self, pipe):
        mask = box_mask()
        array = mask.numpy()
        picture = Image.fromarray(array.astype(np.uint8) * 255)
        kinds = [
            mask,
            mask[None],
            mask[None, None],
            mask.bool(),
            [mask],
            array,
            array[None],
            array[..., None],
            array.astype(np.uint8) * 255,
            picture,
            [picture],
            picture.convert("1"),
            picture.convert("RGB"),
            picture.resize((32, 32), Image.Resampling.NEAREST),
        ]
        options = {"image": pixels(), "num_inference_steps": 1}
        results = [sample(pipe, mask_image=kind, **options) for kind in kinds]
        for kind, result in zip(kinds[1:], results[1:], strict=True):
            assert torch.equal(result, results[0]), kind
        assert torch.equal(mask, box_mask())  # and none is changed in place

    def test_an_empty_and_a_full_mask(self, pipe):
        image = pixels()
        assert torch.equal(sample(pipe, image=image, mask_image=torch.zeros(16, 16)), image)
        full = sample(pipe, image=image, mask_image=torch.ones(16, 16))
        generator = torch.Generator().manual_seed(0)
        torch.randn(1, *SHAPE, generator=generator)  # the posterior's
        free = pipe(generator=generator, num_inference_steps=3, output_type="pt").images
        assert torch.equal(full, free)

    def test_one_picture_and_many_masks(self, pipe):
        masks = torch.stack([box_mask(), box_mask(0, 4, 0, 4)])
        result = sample(pipe, image=pixels(), mask_image=masks)
        for image, mask in zip(result, masks.bool(), strict=True):
            assert torch.equal(image[:, ~mask], pixels()[0][:, ~mask])
        assert (result[1, :, :4, :4] != pixels()[0, :, :4, :4]).any()

    def test_a_callback_sees_the_known_region(self, pipe):
        image, seen = sample(pipe, output_type="latent"), []
        sample(
            pipe,
            image=image,
            mask_image=box_mask(),
            callback_on_step_end=lambda p, i, t, tensors: seen.append(tensors["latents"]) or {},
        )
        outside = F.max_pool2d(box_mask()[None], 2)[0] == 0
        assert torch.equal(seen[-1][..., outside], image[..., outside])
        assert not torch.equal(seen[-2][..., outside], image[..., outside])


class TestSizes:
    def test_a_unet_result_is_the_middle_of_a_larger_one(self, pipe):
        """Latents of 9 × 10, which cannot be halved, come from 10 × 10."""
        options = {"output_type": "latent", "batch_size": 2}
        odd = sample(pipe, height=18, width=22, **options)
        whole = sample(pipe, height=20, width=24, **options)
        assert odd.shape == (2, 4, 9, 11)
        assert torch.equal(odd, whole[..., 0:9, 0:11])
        pictures = sample(pipe, height=18, width=22, batch_size=2)
        with torch.no_grad():
            decoded = (pipe.vae.decode(odd / 0.5).sample / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(pictures, decoded)

    def test_a_margin_is_on_all_sides(self):
        pipe = make_pipeline(make_dit())
        options = {"output_type": "latent", "class_labels": 1}
        oblong = sample(pipe, height=8, width=16, **options)
        assert torch.equal(oblong, sample(pipe, **options)[..., 2:6, :])

    @pytest.mark.parametrize("side", [4, 12, 24, 30])
    def test_squares_of_a_dit(self, side):
        assert sample(make_pipeline(make_dit()), height=side, width=side).shape[-2:] == (side, side)

    def test_given_noise_is_in_the_middle(self, pipe):
        noise, seen = torch.randn(1, 4, 7, 8), []
        options = {"num_inference_steps": 2, "output_type": "latent", "latents": noise}
        with pytest.MonkeyPatch.context() as patch:
            forward = pipe.denoiser.forward

            def spy(inputs, **other):
                seen.append(inputs.clone())
                return forward(inputs, **other)

            patch.setattr(pipe.denoiser, "forward", spy)
            assert pipe(**options).images.shape == noise.shape
        assert seen[0].shape == (1, 4, 8, 8)
        assert torch.equal(seen[0][..., :7, :], noise)

    def test_inpainting_at_an_odd_size(self, pipe):
        photo = photograph("coffee").resize((22, 18))
        mask = box_mask(2, 9, 3, 15, 18, 22)
        result = sample(pipe, image=photo, mask_image=mask, output_type="np")
        wanted = np.asarray(photo, dtype=np.float32) / 255
        np.testing.assert_array_equal(result[0][mask == 0], wanted[mask == 0])
        assert (result[0][mask == 1] != wanted[mask == 1]).mean() > 0.9


class TestAutoencoders:
    def test_vq_latents_are_those_before_the_codebook(self):
        torch.manual_seed(0)
        vq = VQModel(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            latent_channels=8,
            vq_embed_dim=4,
            num_vq_embeddings=8,
        ).eval()
        pipe = make_pipeline(vae=vq)
        with torch.no_grad():
            raw = vq.encode(2 * pixels() - 1).latents
        latents = pipe.encode_image(pixels(), 1, None)
        torch.testing.assert_close(latents, raw * 0.18215)
        final = sample(pipe, image=pixels(), output_type="latent")
        codes = torch.cdist(
            (final / 0.18215).permute(0, 2, 3, 1).reshape(-1, 4), vq.quantize.embedding.weight
        ).argmin(dim=1)
        quantised = vq.quantize.embedding.weight[codes].view(1, 8, 8, 4).permute(0, 3, 1, 2)
        with torch.no_grad():
            decoded = vq.decode(quantised, force_not_quantize=True).sample
        wanted = (decoded / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(sample(pipe, image=pixels()), wanted, atol=1e-5, rtol=0)

    def test_three_latent_channels_are_not_taken_for_latents(self):
        """The VQ autoencoders of Rombach et al. have three: a picture tensor stays a picture."""
        torch.manual_seed(0)
        tiny = AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
            latent_channels=3,
        ).eval()
        pipe = make_pipeline(make_unet(in_channels=3, out_channels=3), vae=tiny)
        of_pillow = sample(pipe, image=photograph("chelsea", 16))
        torch.testing.assert_close(sample(pipe, image=pixels()), of_pillow, atol=1e-5, rtol=0)

    def test_a_deep_compression_autoencoder(self):
        torch.manual_seed(0)
        dc = AutoencoderDC(
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "ResBlock"),
            decoder_block_types=("ResBlock", "ResBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_qkv_multiscales=((), ()),
            decoder_qkv_multiscales=((), ()),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.4,
        ).eval()
        pipe = make_pipeline(vae=dc)
        with torch.no_grad():
            raw = dc.encode(2 * pixels() - 1).latent
        torch.testing.assert_close(pipe.encode_image(pixels(), 1, None), 0.4 * raw)
        assert sample(pipe, image=pixels()).shape == (1, 3, 16, 16)

    def test_a_grey_autoencoder(self):
        pipe = make_pipeline(vae=make_vae(in_channels=1, out_channels=1))
        photo = photograph("chelsea", 16)
        (result,) = sample(pipe, image=photo, mask_image=box_mask(), output_type="pil")
        outside = box_mask().numpy() == 0
        assert result.mode == "L"
        np.testing.assert_array_equal(
            np.asarray(result)[outside], np.asarray(photo.convert("L"))[outside]
        )

    def test_channel_statistics_scale_the_pictures_latents(self):
        config = {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]}
        vae = make_vae(**config)
        with torch.no_grad():
            posterior = vae.encode(2 * pixels() - 1).latent_dist
            raw = posterior.sample(torch.Generator().manual_seed(2))
        latents = make_pipeline(vae=vae).encode_image(pixels(), 1, torch.Generator().manual_seed(2))
        torch.testing.assert_close(latents, scale_latents(raw, vae.config))

    def test_an_fp16_vae_that_would_overflow_encodes_in_fp32(self, monkeypatch):
        pipe = make_pipeline(vae=make_vae().half())
        seen, encode = [], pipe.vae.encode
        monkeypatch.setattr(
            pipe.vae, "encode", lambda x: seen.append((x.dtype, pipe.vae.dtype)) or encode(x)
        )
        assert sample(pipe, image=pixels()).isfinite().all()
        assert seen == [(torch.float32, torch.float32)]
        assert pipe.vae.dtype == torch.float16


class TestClassConditional:
    def test_a_dit_makes_the_stock_pipelines_pictures(self):
        dit, vae = make_dit(classes=1000, out_channels=8), make_vae()
        scheduler = DDIMScheduler()
        reference = DiTPipeline(transformer=dit, vae=vae, scheduler=scheduler)
        reference.set_progress_bar_config(disable=True)
        options = {"class_labels": [3, 999], "guidance_scale": 4.0}
        wanted = reference(
            generator=torch.Generator().manual_seed(0),
            num_inference_steps=3,
            output_type="pt",
            **options,
        ).images
        images = sample(make_pipeline(dit, DDIMScheduler(), vae), **options)
        torch.testing.assert_close(images, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_image": box_mask()}, "mask_image needs the image it belongs to"),
        ({"strength": 0.5}, "strength needs an image to start from"),
        ({"image": pixels(), "strength": 1.5}, r"strength must be in \(0, 1\], not 1.5"),
        ({"image": pixels(), "strength": 0.1}, "strength 0.1 of 3 steps leaves none"),
        ({"image": pixels(), "strength": 0.0}, r"strength must be in \(0, 1\], not 0.0"),
        ({"image": []}, "image is an empty list"),
        ({"image": pixels(), "mask_image": []}, "mask_image is an empty list"),
        ({"image": pixels(), "height": 15}, "height must be a multiple of 2"),
        ({"image": pixels()[:, :2]}, "image has 2 channels, the autoencoder takes 3"),
        ({"image": 2 * pixels()}, r"floats in \[0, 1\]"),
        ({"image": 2 * pixels() - 1}, r"floats in \[0, 1\]"),
        ({"image": (255 * pixels()).byte()}, r"floats in \[0, 1\]"),
        ({"image": [pixels()[0], pixels(size=8)[0]]}, "arrays of several shapes"),
        ({"image": torch.zeros(1, *SHAPE), "height": 20}, "image holds latents"),
        ({"image": pixels(), "mask_image": torch.ones(1, 2, 16, 16)}, "must have one channel"),
        (
            {"image": pixels().expand(3, -1, -1, -1), "batch_size": 2},
            "batch_size for 2, image for 3",
        ),
        (
            {"image": pixels().expand(3, -1, -1, -1), "mask_image": torch.ones(2, 16, 16)},
            "image for 3, mask_image for 2",
        ),
    ],
)
def test_wrong_arguments(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        sample(pipe, **options)
