"""Pictures from a latent diffusion model: made new, made from another, or repainted in parts.

A folder that this pipeline has saved carries this file, so stock diffusers alone loads it:

    import torch
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)
    pipe(batch_size=4, generator=torch.Generator().manual_seed(0)).images[0].save("0.png")
    pipe(class_labels=["cat", "dog"], guidance_scale=3.0)  # where the denoiser was taught classes
    pipe.labels                                            # the names it knows
    pipe(height=192, width=320)                            # any multiple of pipe.vae_scale_factor

Image-to-image starts from a noised picture; inpainting repaints where the mask is white and keeps
every other pixel exactly:

    from diffusers.utils import load_image

    photo, mask = load_image("photo.png"), load_image("mask.png")
    pipe(image=photo, strength=0.6, class_labels="dog", guidance_scale=3.0)
    pipe(image=photo, mask_image=mask, class_labels="dog", guidance_scale=3.0)

Any diffusers scheduler that fits the denoiser's training can take the place of the saved one:

    from diffusers import DPMSolverMultistepScheduler

    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)

Where memory is short (each as everywhere in diffusers; a `VQModel` can neither tile nor slice):

    pipe.enable_vae_tiling()         # large pictures
    pipe.enable_vae_slicing()        # large batches
    pipe.enable_model_cpu_offload()  # on the GPU: the network at work, and a VAE that has encoded

From parts, with any diffusers autoencoder, a VQ one too (its latents are those before the codebook,
which `vae.decode` then applies), or one that carries its code, as latent_ae's quantised ones do:

    pipe = LatentDiffusionPipeline(vae, denoiser, scheduler, id2label={0: "cat", 1: "dog"})
    pipe.save_pretrained("FOLDER")

The denoiser sees scaled latents (see `scale_latents`). The null class of classifier-free guidance
is the last row of its label embedding: index `num_embeds_ada_norm` of a DiT, as diffusers has it,
and `num_class_embeds - 1` of a U-Net, so a U-Net for n classes has n + 1 embeddings.
"""

from __future__ import annotations

import inspect
import json
import operator
import os
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderTiny,
    DDPMScheduler,
    DiffusionPipeline,
    DiTTransformer2DModel,
    ImagePipelineOutput,
    LMSDiscreteScheduler,
    ModelMixin,
    PNDMScheduler,
    SchedulerMixin,
    UNet2DModel,
    VQModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.nn import functional as F

__all__ = ["LatentDiffusionPipeline", "scale_latents", "unscale_latents"]

MODULE = "latent_diffusion"  # the name under which this file travels in a saved folder
Labels = int | str | Sequence[int | str] | None
Callback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]
Generators = torch.Generator | list[torch.Generator] | None


def scale_latents(latents: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Brings raw latents (B, c, h, w) of an autoencoder of this config to the denoiser's scale.

    `(z - latents_mean) * scaling_factor / latents_std` if the config has both, as in
    `StableDiffusionXLPipeline`; else `(z - shift_factor) * scaling_factor`, as in
    `StableDiffusion3Pipeline`, where a shift of None is 0.
    """
    offset, factor = _statistics(latents, config)
    return (latents - offset) / factor


def unscale_latents(latents: Tensor, config: Mapping[str, Any]) -> Tensor:
    """The inverse of `scale_latents`: what `vae.decode` expects, of shape (B, c, h, w)."""
    offset, factor = _statistics(latents, config)
    return latents * factor + offset


def _statistics(latents: Tensor, config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The offset and the factor of `unscale_latents`, each of shape (1, c or 1, 1, 1)."""
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:  # one alone counts for nothing, as in stock pipelines
        mean, std = [config.get("shift_factor") or 0.0], [1.0]
    factor = latents.new_tensor(std) / config.get("scaling_factor", 1.0)
    return latents.new_tensor(mean).view(1, -1, 1, 1), factor.view(1, -1, 1, 1)


class LatentDiffusionPipeline(DiffusionPipeline):
    """Generation, image-to-image and inpainting in an autoencoder's latent space.

    Args:
        vae: an autoencoder whose `decode` maps latents (B, c, h, w) to images in [-1, 1].
        denoiser: a `UNet2DModel` or a `DiTTransformer2DModel` with `in_channels` c.
        scheduler: any diffusers scheduler whose prediction type the denoiser was trained for.
        id2label: names of the classes; kept in `model_index.json`.
    """

    model_cpu_offload_seq = "denoiser->vae"
    _callback_tensor_inputs = ("latents", "labels")
    _guidance_scale, _num_timesteps, _interrupt = 1.0, 0, False  # before the first call
    # Read when the class is made: a later load may put another version at the same cached path.
    _source = Path(__file__).read_text(encoding="utf-8")

    def __init__(
        self,
        # `from_pipe` hands on what is of exactly a type named here.
        vae: AutoencoderKL | AutoencoderDC | AutoencoderTiny | VQModel | ModelMixin,
        denoiser: UNet2DModel | DiTTransformer2DModel,
        scheduler: SchedulerMixin,
        id2label: dict[int, str] | dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(vae=vae, denoiser=denoiser, scheduler=scheduler)
        self.register_to_config(id2label=id2label)
        config: Mapping[str, Any] = vae.config
        levels = config.get("block_out_channels") or config.get("encoder_block_out_channels")
        self.vae_scale_factor = 2 ** (len(levels) - 1) if levels else 1
        channels, pictures = denoiser.config["in_channels"], config.get("in_channels", 3)
        # A tensor of so many channels counts as latents; where pictures have as many, none does.
        self.latent_channels = channels if channels != pictures else 0
        options: dict[str, Any] = {
            "vae_scale_factor": self.vae_scale_factor,
            "vae_latent_channels": self.latent_channels,
            "do_convert_rgb": pictures == 3,
            "do_convert_grayscale": pictures == 1,
        }
        self.image_processor = VaeImageProcessor(**options)
        # Pixels stay in [0, 1]: 2x - 1 and back would not give each its bits again.
        self.pixel_processor = VaeImageProcessor(**options, do_normalize=False)
        self.mask_processor = VaeImageProcessor(
            vae_scale_factor=self.vae_scale_factor,
            vae_latent_channels=0,
            do_normalize=False,
            do_binarize=True,
            do_convert_grayscale=True,
        )

    @property
    def labels(self) -> dict[str, int]:
        """Class index by name; a name such as "tench, Tinca tinca" is also found by its parts."""
        names = {name: int(index) for index, name in (self.config["id2label"] or {}).items()}
        parts = {part.strip(): index for name, index in names.items() for part in name.split(",")}
        return parts | names

    @property
    def num_classes(self) -> int:
        """How many classes the denoiser was taught; also the index of the null class."""
        config = self.denoiser.config
        return config.get("num_embeds_ada_norm", (config.get("num_class_embeds") or 1) - 1)

    @property
    def guidance_scale(self) -> float:
        """The scale of this call; a callback changes it by `_guidance_scale`."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the denoiser is asked twice, for the class and for the null class."""
        return self._guidance_scale > 1 and self.num_classes > 0

    @property
    def num_timesteps(self) -> int:
        """How often this call asks the denoiser."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the remaining steps are skipped; a callback says so by `_interrupt`."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: Labels = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        image: PipelineImageInput | None = None,
        mask_image: PipelineImageInput | None = None,
        strength: float | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generates images, in an `ImagePipelineOutput` or a tuple.

        Args:
            batch_size: how many; left out, as many as there are labels, latents, pictures or
                generators, else 1.
            class_labels: for all images or for each, by index or name; left out, the null class.
            height: in pixels, a multiple of `vae_scale_factor`; left out, the picture's (rounded
                down to a multiple), else the denoiser's own.
            width: likewise. A size that the denoiser cannot take is cut from the middle of the
                next larger one that it can: a U-Net halves its latents, a DiT wants a square.
            num_inference_steps: denoising steps; with a picture, `strength` times as many.
            guidance_scale: classifier-free guidance (Ho and Salimans 2022); in effect above 1.
            eta: stochasticity of DDIM, in [0, 1]; other schedulers ignore it.
            generator: makes the result repeatable; a list holds one for each image.
            latents: Gaussian noise of shape (B, c, h, w) to use instead of `generator`'s.
            output_type: "pil"; "np", (B, H, W, C), or "pt", (B, C, H, W), in [0, 1]; or "latent",
                the scaled latents of shape (B, c, h, w).
            return_dict: False for a plain tuple.
            callback_on_step_end: called as `callback(pipeline, step, timestep, tensors)`; what it
                returns under "latents" and "labels" replaces those. The latents are those of the
                size that the denoiser takes.
            callback_on_step_end_tensor_inputs: which tensors it receives.
            image: the picture to start from, one for all or one for each: PIL, or floats in [0, 1]
                as an array (B, H, W, C) or a tensor (B, C, H, W), or a list of these; or scaled
                latents (B, c, h, w), where c is not the pictures' number of channels.
            mask_image: white, at least half, where `image` is repainted: PIL, or an array or a
                tensor of one channel. All other pixels come back as they were.
            strength: how much of the noise `image` gets, in (0, 1]; left out, 0.8, and 1 with a
                mask, which then starts from noise alone, as `StableDiffusionInpaintPipeline` does.

        Raises:
            ValueError: an argument is wrong or does not fit the denoiser.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        names = callback_on_step_end_tensor_inputs
        self.check_inputs(num_inference_steps, guidance_scale, class_labels, output_type, names)
        strength = self._check_image_inputs(image, mask_image, strength, height=height, width=width)
        self._guidance_scale, self._interrupt = guidance_scale, False

        device, indices = self._execution_device, self.get_label_ids(class_labels)
        picture = None if image is None else self.prepare_image(image, height, width)
        shape = self._latent_shape(height, width, latents, picture)
        mask = None if mask_image is None else self.prepare_mask(mask_image, *shape[1:])
        batch_size = _batch_size(batch_size, class_labels, latents, generator, picture, mask)
        labels = torch.tensor(indices, device=device).expand(batch_size)
        shape = (batch_size, *shape)

        timesteps = self.get_timesteps(num_inference_steps, strength, shape, device)
        original, repainted = self.prepare_image_latents(picture, mask, shape, device, generator)
        noise = self.prepare_noise(shape, device, generator, latents)
        start = None if mask is not None and strength == 1 else original
        sample = self.prepare_latents(noise, start, timesteps[:1])
        options = self._step_options(eta=eta, generator=generator)

        steps: Any = self.progress_bar(timesteps)  # pyright: ignore[reportCallIssue, reportArgumentType]
        for i, t in enumerate(steps):
            if self._interrupt:  # a callback may say so; it may change _guidance_scale too
                continue
            prediction = self.predict(sample, t, labels)
            sample = self.scheduler.step(prediction, t, sample, **options, return_dict=False)[0]
            if original is not None and repainted is not None:
                kept = self.add_noise(original, noise, timesteps[i + 1 : i + 2])
                sample = torch.where(repainted, sample, kept)
            if callback_on_step_end is not None:
                tensors = {"latents": sample, "labels": labels}
                shown = {name: tensors[name] for name in names}
                tensors |= callback_on_step_end(self, i, t, shown) or {}
                sample, labels = tensors["latents"], tensors["labels"]

        images: Any = self._finish(_middle(sample, shape), picture, mask, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def check_inputs(
        self,
        num_inference_steps: int,
        guidance_scale: float,
        class_labels: Labels,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ) -> None:
        """Refuses arguments that are wrong whatever the picture; see `__call__`."""
        channels = self.vae.config.get("in_channels", 3)
        kinds = ("pil", "np", "pt", "latent")[channels > 4 :]  # Pillow has no more
        _check(output_type in kinds, f"output_type is one of {', '.join(kinds)}")
        known = self._callback_tensor_inputs
        _check(set(callback_on_step_end_tensor_inputs) <= set(known), f"callbacks get only {known}")
        _check(num_inference_steps >= 1, "num_inference_steps must be at least 1")
        _check(guidance_scale <= 1 or class_labels is not None, "guidance needs class_labels")

    def _check_image_inputs(
        self, image: object, mask_image: object, strength: float | None, **size: int | None
    ) -> float:
        """Refuses what does not go together; returns the strength, a default one if it is None."""
        _check(image is not None or mask_image is None, "mask_image needs the image it belongs to")
        _check(image is not None or strength is None, "strength needs an image to start from")
        default = 0.8 if image is not None and mask_image is None else 1.0
        strength = default if strength is None else strength
        _check(0 < strength <= 1, f"strength must be in (0, 1], not {strength}")
        f = self.vae_scale_factor
        for name, side in size.items():
            fits = side is None or (side > 0 and side % f == 0)
            _check(fits, f"{name} must be a multiple of {f}, the autoencoder's factor, not {side}")
        return strength

    def get_label_ids(self, class_labels: Any) -> list[int]:
        """Class indices of names or indices, which must exist; the null class for None."""
        if class_labels is None:
            return [self.num_classes]
        indices, names = [], self.labels
        for label in [class_labels] if _is_one(class_labels) else class_labels:
            index = -1
            with suppress(TypeError):  # of floats, which are no class, were they whole
                index = names.get(label, -1) if isinstance(label, str) else operator.index(label)
            some = f": {', '.join(list(names)[:10])} …" if names else ""
            taught = f"the denoiser was taught {self.num_classes} classes, counted from 0{some}"
            _check(0 <= index < self.num_classes, f"there is no class {label!r}; {taught}")
            indices.append(index)
        return indices

    def _latent_shape(
        self, height: int | None, width: int | None, latents: Tensor | None, picture: Tensor | None
    ) -> tuple[int, int, int]:
        """(c, h, w) of the result's latents: as asked for, as given, or the denoiser's own."""
        config, f = self.denoiser.config, self.vae_scale_factor
        _check(latents is None or isinstance(latents, Tensor), "latents must be a tensor")
        own: Any = config.sample_size if latents is None else tuple(latents.shape[-2:])
        if picture is not None:
            factor = 1 if self._is_latents(picture) else f
            own = tuple(side // factor for side in picture.shape[-2:])
        h, w = own if isinstance(own, Sequence) else (own, own)
        h, w = height // f if height else h, width // f if width else w
        _check(bool(h and w), "this denoiser has no size of its own: pass height and width")
        resized = picture is not None and (h, w) != own
        _check(not resized, "image holds latents, which no height and width can resize: omit these")
        return (config.in_channels, h, w)

    def _canvas(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The smallest shape (B, c, H, W) around (B, c, h, w) that the denoiser can take.

        A U-Net halves each side between its levels. `DiTTransformer2DModel` interpolates its
        position embedding to any size, but takes the tokens that it returns for those of a square.
        The result is cut from the middle: padded noise would be none that a denoiser was taught.
        """
        config, (b, c, h, w) = self.denoiser.config, shape
        multiple = config.get("patch_size") or 2 ** (len(config.get("block_out_channels", "1")) - 1)
        if "num_embeds_ada_norm" in config:
            h = w = max(h, w)
        return (b, c, -(-h // multiple) * multiple, -(-w // multiple) * multiple)

    def get_timesteps(
        self,
        num_inference_steps: int,
        strength: float,
        shape: tuple[int, ...],
        device: torch.device,
    ) -> Tensor:
        """The scheduler's timesteps for latents of `shape`, without those that `strength` skips."""
        config, options = self.scheduler.config, {}
        if config.get("use_dynamic_shifting"):  # as in StableDiffusion3Pipeline: linear in length
            height, width = self._canvas(shape)[-2:]
            length = height * width / self.denoiser.config.get("patch_size", 1) ** 2
            slope = config.max_shift - config.base_shift
            slope = slope / (config.max_image_seq_len - config.base_image_seq_len)
            options["mu"] = config.base_shift + slope * (length - config.base_image_seq_len)
        self.scheduler.set_timesteps(num_inference_steps, device=device, **options)
        skipped = num_inference_steps - int(num_inference_steps * strength)
        told = f"strength {strength} of {num_inference_steps} steps leaves none: raise either"
        _check(skipped < num_inference_steps, told)
        name = type(self.scheduler).__name__
        # They weigh past predictions, which they miss, by the number of steps before this one.
        whole = skipped == 0 or not isinstance(self.scheduler, PNDMScheduler | LMSDiscreteScheduler)
        _check(whole, f"{name} cannot start midway, as strength {strength} asks: take another")
        begin = skipped * getattr(self.scheduler, "order", 1)
        if hasattr(self.scheduler, "set_begin_index"):
            # Else the first step searches it, with a GPU sync.
            self.scheduler.set_begin_index(begin)
        timesteps = self.scheduler.timesteps[begin:]  # pyright: ignore
        self._num_timesteps = len(timesteps)
        return timesteps

    def prepare_image(
        self, image: PipelineImageInput, height: int | None = None, width: int | None = None
    ) -> Tensor:
        """Pictures (n, C, H, W) in [0, 1], or latents (n, c, h, w), of all that `__call__` takes.

        Pictures are resized to the height and width given, else down to multiples of the factor.
        """
        each = image if isinstance(image, list) else [image]
        _check(len(each) > 0, "image is an empty list: pass a picture, or leave it out")
        sizes = {tuple(x.shape) for x in each if isinstance(x, Tensor | np.ndarray)}
        _check(len(sizes) <= 1, "image is a list of arrays of several shapes: make them one")
        picture = self.pixel_processor.preprocess(image, height, width)
        if self._is_latents(picture):
            return picture.float()
        count, channels = picture.shape[1], self.vae.config.get("in_channels", 3)
        _check(count == channels, f"image has {count} channels, the autoencoder takes {channels}")
        ranged = picture.is_floating_point() and picture.min() >= 0 and picture.max() <= 1
        _check(bool(ranged), "an image that is an array or a tensor holds floats in [0, 1]")
        return picture.float()

    def _is_latents(self, picture: Tensor) -> bool:
        return picture.shape[1] == self.latent_channels

    def prepare_mask(self, mask_image: PipelineImageInput, h: int, w: int) -> Tensor:
        """Masks of shape (m, 1, H, W), True where a picture with latents (h, w) is repainted."""
        single, f = not isinstance(mask_image, list), self.vae_scale_factor
        masks: Any = [mask_image] if single else mask_image
        _check(len(masks) > 0, "mask_image is an empty list: pass a mask, or leave it out")
        masks = [_as_floats(mask) for mask in masks]
        mask = self.mask_processor.preprocess(masks[0] if single else masks, h * f, w * f)
        _check(mask.shape[1] == 1, f"mask_image must have one channel, not {mask.shape[1]}")
        return mask > 0.5

    def prepare_image_latents(
        self,
        picture: Tensor | None,
        mask: Tensor | None,
        shape: tuple[int, ...],
        device: torch.device,
        generator: Generators,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The picture's scaled latents, and where they are repainted, for the denoiser's size.

        A cell of the latents is repainted where the mask touches any of its pixels: the nearest
        one, which stock pipelines look at, would let thin lines of a mask pass unseen.
        """
        if picture is None:
            return None, None
        if not self._is_latents(picture):
            picture = self.encode_image(picture.to(device), shape[0], generator)
        canvas = self._canvas(shape)
        original = F.pad(picture.to(device), _margins(shape, canvas), mode="replicate")
        if mask is None:
            return original.expand(canvas), None
        touched = F.max_pool2d(mask.to(device, torch.float32), self.vae_scale_factor)
        repainted = F.pad(touched, _margins(shape, canvas), value=1.0) > 0
        return original.expand(canvas), repainted

    def encode_image(self, pixels: Tensor, batch_size: int, generator: Generators) -> Tensor:
        """Scaled latents (B, c, h, w), float32, of one or B pictures (n, C, H, W) in [0, 1].

        A posterior is sampled, as everywhere in diffusers; a VQ autoencoder's latents are those
        before quantisation, as in Rombach et al. 2022.
        """
        with self._upcast_vae():
            encoded = self.vae.encode((2 * pixels - 1).to(self.vae.dtype))
        if hasattr(encoded, "latent_dist"):
            posterior = encoded.latent_dist
            shape = (batch_size, *posterior.mean.shape[1:])  # one picture gets B draws
            noise = randn_tensor(shape, generator, posterior.mean.device, torch.float32)
            latents = posterior.mean.float() + posterior.std.float() * noise
        else:
            latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent
        return scale_latents(latents.float(), self.vae.config)

    def prepare_noise(
        self,
        shape: tuple[int, ...],
        device: torch.device,
        generator: Generators,
        latents: Tensor | None,
    ) -> Tensor:
        """Gaussian noise of the size that the denoiser takes, `latents` in its middle if given.

        It is float32, as are the latents throughout: only the networks run in their own precision.
        """
        canvas, given = self._canvas(shape), shape if latents is None else tuple(latents.shape)
        _check(given == shape, f"latents must be of shape {shape}, not {given}")
        if latents is not None and canvas == shape:
            return latents.to(device, torch.float32)
        noise = randn_tensor(canvas, generator, device, torch.float32)
        if latents is not None:
            _middle(noise, shape).copy_(latents)
        return noise

    def _step_options(self, **options: Any) -> dict[str, Any]:
        """Those of the options that the scheduler's step knows."""
        accepted = inspect.signature(self.scheduler.step).parameters
        return {name: value for name, value in options.items() if name in accepted}

    def prepare_latents(self, noise: Tensor, original: Tensor | None, timestep: Tensor) -> Tensor:
        """What to start from: noise at the scheduler's scale, or `original` with noise added."""
        if original is not None:
            return self.add_noise(original, noise, timestep)
        # Flow matching starts at noise of scale 1 and does not say so.
        return noise * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def add_noise(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Clean latents (B, c, H, W) at the level of `timestep` (1,), or clean if that is empty."""
        if len(timestep) == 0:  # after the last step
            return latents
        if hasattr(self.scheduler, "scale_noise"):  # flow matching
            return self.scheduler.scale_noise(latents, timestep, noise)
        name = type(self.scheduler).__name__
        _check(hasattr(self.scheduler, "add_noise"), f"{name} cannot add noise to an image")
        return self.scheduler.add_noise(latents, noise, timestep)

    def predict(self, latents: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """The denoiser's output for latents (B, c, h, w), guided if asked for, in float32.

        Guidance is on all latent channels. A learned variance (twice the channels) is handed on to
        a `DDPMScheduler` that wants one and is dropped for every other scheduler.
        """
        config, inputs = self.denoiser.config, latents
        takes_labels = "num_embeds_ada_norm" in config or config.get("num_class_embeds") is not None
        guided = self.do_classifier_free_guidance
        if guided:
            inputs = torch.cat([latents, latents])
            labels = torch.cat([labels, torch.full_like(labels, self.num_classes)])
        if hasattr(self.scheduler, "scale_model_input"):
            inputs = self.scheduler.scale_model_input(inputs, t)
        output = self.denoiser(
            inputs.to(self.denoiser.dtype),
            timestep=t.to(inputs.device).expand(len(inputs)),
            class_labels=labels if takes_labels else None,
            return_dict=False,
        )[0].float()
        prediction, variance = output[:, : latents.shape[1]], output[:, latents.shape[1] :]
        if guided:
            conditional, unconditional = prediction.chunk(2)
            prediction = unconditional + self._guidance_scale * (conditional - unconditional)
            variance = variance.chunk(2)[0]
        if isinstance(self.scheduler, DDPMScheduler) and "learned" in self.scheduler.variance_type:
            prediction = torch.cat([prediction, variance], dim=1)
        return prediction

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images, nominally in [-1, 1], of scaled latents of shape (B, c, h, w)."""
        latents = unscale_latents(latents.float(), self.vae.config)
        with self._upcast_vae():
            return self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]

    @contextmanager
    def _upcast_vae(self) -> Iterator[None]:
        """Runs an fp16 autoencoder in fp32 if its config says `force_upcast`: it would overflow."""
        upcast = self.vae.dtype == torch.float16 and self.vae.config.get("force_upcast", False)
        if upcast:
            self.vae.to(torch.float32)
        try:
            yield
        finally:
            if upcast:
                self.vae.to(torch.float16)

    def _finish(
        self, latents: Tensor, picture: Tensor | None, mask: Tensor | None, output_type: str
    ) -> Any:
        """The result of a call; outside the mask it has the picture's own pixels, bit for bit."""
        if output_type == "latent":
            return latents
        images: Any = self.image_processor.denormalize(self.decode_latents(latents))
        if picture is not None and mask is not None and not self._is_latents(picture):
            images = torch.where(mask.to(images.device), images, picture.to(images.device))
        return self.image_processor.postprocess(images, output_type, [False] * len(images))

    def enable_vae_tiling(self) -> None:
        """Encodes and decodes in tiles: large pictures in little memory, with `vae`'s own seams."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Encodes and decodes pictures whole again."""
        self.vae.disable_tiling()

    def enable_vae_slicing(self) -> None:
        """Encodes and decodes one image of a batch at a time."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Encodes and decodes whole batches again."""
        self.vae.disable_slicing()

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Saves all components, and this file beside them; takes what diffusers' own takes."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        # First, so that `push_to_hub=True` uploads it too.
        (folder / f"{MODULE}.py").write_text(self._source, encoding="utf-8")
        super().save_pretrained(save_directory, **kwargs)

    def to_json_string(self) -> str:
        """The content of `model_index.json`, naming this file as the home of the class."""
        content = json.loads(super().to_json_string())
        content["_class_name"] = [MODULE, type(self).__name__]
        # A part may carry its code beside its weights, where `diffusers.AutoModel` finds it too.
        for name, component in self.components.items():
            if home := (component.config.get("auto_map") or {}).get("AutoModel"):
                content[name] = home.rsplit(".", 1)
        return json.dumps(content, indent=2, sort_keys=True) + "\n"


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _batch_size(
    asked: int | None,
    class_labels: Any,
    latents: Tensor | None,
    generator: object,
    picture: Tensor | None,
    mask: Tensor | None,
) -> int:
    """The number of images on which all arguments agree; one picture or mask serves any number."""
    lists: dict[str, Sized | None] = {
        "class_labels": None if _is_one(class_labels) else class_labels,
        "latents": latents,
        "generator": generator if isinstance(generator, list) else None,
        "image": None if picture is None or len(picture) == 1 else picture,
        "mask_image": None if mask is None or len(mask) == 1 else mask,
    }
    sizes = {name: len(value) for name, value in lists.items() if value is not None}
    if asked is not None:
        sizes = {"batch_size": asked, **sizes}
    told = ", ".join(f"{name} for {size}" for name, size in sizes.items())
    _check(len(set(sizes.values())) <= 1, f"the number of images is unclear: {told}")
    size = next(iter(sizes.values()), 1)
    _check(size >= 1, f"batch_size must be at least 1, not {size}")
    return size


def _is_one(class_labels: Any) -> bool:
    return isinstance(class_labels, int | float | str) or getattr(class_labels, "ndim", 1) == 0


def _as_floats(mask: Any) -> Any:
    """Masks of booleans or bytes as numbers, which `VaeImageProcessor` can resize."""
    mask = mask.astype(np.float32) if isinstance(mask, np.ndarray) else mask
    return mask.float() if isinstance(mask, Tensor) else mask


def _margins(shape: tuple[int, ...], canvas: tuple[int, ...]) -> list[int]:
    """Left, right, top, bottom of (…, h, w) in the middle of (…, H, W), for `F.pad`."""
    (h, w), (height, width) = shape[-2:], canvas[-2:]
    left, top = (width - w) // 2, (height - h) // 2
    return [left, width - w - left, top, height - h - top]


def _middle(latents: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The view of shape (…, h, w) in the middle of latents (…, H, W)."""
    left, _, top, _ = _margins(shape, tuple(latents.shape))
    return latents[..., top : top + shape[-2], left : left + shape[-1]]
