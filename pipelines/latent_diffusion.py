"""Pictures from a latent diffusion model: a denoiser's latents through an autoencoder's decoder.

A folder that this pipeline has saved carries this file, so stock diffusers alone loads it:

    import torch
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)
    pipe(batch_size=4, generator=torch.Generator().manual_seed(0)).images[0].save("0.png")
    pipe(class_labels=["cat", "dog"], guidance_scale=3.0)  # where the denoiser was taught classes
    pipe.labels                                            # the names it knows

Any diffusers scheduler that fits the denoiser's training can take the place of the saved one:

    from diffusers import DPMSolverMultistepScheduler

    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)

From parts, with any diffusers autoencoder (`pipe.vae.enable_tiling()` works as everywhere):

    pipe = LatentDiffusionPipeline(vae, denoiser, scheduler, id2label={0: "cat", 1: "dog"})
    pipe.save_pretrained("FOLDER")

The denoiser sees scaled latents (see `scale_latents`). The null class of classifier-free guidance
is the last row of its label embedding: index `num_embeds_ada_norm` of a DiT, as diffusers has it,
and `num_class_embeds - 1` of a U-Net, so a U-Net for n classes has n + 1 embeddings.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    DiTTransformer2DModel,
    ImagePipelineOutput,
    ModelMixin,
    SchedulerMixin,
    UNet2DModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

__all__ = ["LatentDiffusionPipeline", "scale_latents", "unscale_latents"]

MODULE = "latent_diffusion"  # the name under which this file travels in a saved folder
Labels = int | str | Sequence[int | str] | None
Callback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]


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
    """Unconditional or class-conditional image generation in an autoencoder's latent space.

    Args:
        vae: an autoencoder whose `decode` maps latents (B, c, h, w) to images in [-1, 1].
        denoiser: a `UNet2DModel` or a `DiTTransformer2DModel` with `in_channels` c.
        scheduler: any diffusers scheduler whose prediction type the denoiser was trained for.
        id2label: names of the classes; kept in `model_index.json`.
    """

    model_cpu_offload_seq = "denoiser->vae"
    _callback_tensor_inputs = ("latents", "labels")
    # Read when the class is made: a later load may put another version at the same cached path.
    _source = Path(__file__).read_text(encoding="utf-8")

    def __init__(
        self,
        vae: ModelMixin,
        denoiser: UNet2DModel | DiTTransformer2DModel,
        scheduler: SchedulerMixin,
        id2label: dict[int, str] | dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(vae=vae, denoiser=denoiser, scheduler=scheduler)
        self.register_to_config(id2label=id2label)
        levels = vae.config.get("block_out_channels") or vae.config.get(
            "encoder_block_out_channels"
        )
        self.vae_scale_factor = 2 ** (len(levels) - 1) if levels else 1
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

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
        if "num_embeds_ada_norm" in config:
            return config.num_embeds_ada_norm
        return (config.get("num_class_embeds") or 1) - 1

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
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generates images, in an `ImagePipelineOutput` or a tuple.

        Args:
            batch_size: how many; left out, as many as there are labels or latents, else 1.
            class_labels: for all images or for each, by index or name; left out, the null class.
            height: in pixels; left out, the denoiser's own size.
            width: likewise.
            num_inference_steps: denoising steps.
            guidance_scale: classifier-free guidance (Ho and Salimans 2022); in effect above 1.
            eta: stochasticity of DDIM, in [0, 1]; other schedulers ignore it.
            generator: makes the result repeatable; a list holds one for each image.
            latents: Gaussian noise of shape (B, c, h, w) to start from, instead of `generator`'s.
            output_type: "pil"; "np", (B, H, W, C), or "pt", (B, C, H, W), in [0, 1]; or "latent",
                the scaled latents of shape (B, c, h, w).
            return_dict: False for a plain tuple.
            callback_on_step_end: called as `callback(pipeline, step, timestep, tensors)`; what it
                returns under "latents" and "labels" replaces those.
            callback_on_step_end_tensor_inputs: which tensors it receives.

        Raises:
            ValueError: an argument is wrong or does not fit the denoiser.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        kinds = ("pil", "np", "pt", "latent")
        _check(output_type in kinds, f"output_type is one of {', '.join(kinds)}")
        known = self._callback_tensor_inputs
        _check(set(callback_on_step_end_tensor_inputs) <= set(known), f"callbacks get only {known}")
        _check(num_inference_steps >= 1, "num_inference_steps must be at least 1")
        _check(guidance_scale <= 1 or class_labels is not None, "guidance needs class_labels")
        indices = self.get_label_ids(class_labels)
        batch_size = _batch_size(batch_size, class_labels, latents, generator)
        shape = (batch_size, *self._latent_shape(height, width, latents))
        given = shape if latents is None else tuple(latents.shape)
        _check(given == shape, f"latents must be of shape {shape}, not {given}")
        self._guidance_scale, self._interrupt = guidance_scale, False

        device = self._execution_device
        labels = torch.tensor(indices, device=device).expand(batch_size)
        timesteps = self._set_timesteps(num_inference_steps, shape, device)
        sample = self.prepare_latents(shape, device, generator, latents)
        accepted = inspect.signature(self.scheduler.step).parameters
        options = {"eta": eta, "generator": generator}
        options = {name: value for name, value in options.items() if name in accepted}

        steps: Any = self.progress_bar(timesteps)  # pyright: ignore[reportCallIssue, reportArgumentType]
        for i, t in enumerate(steps):
            if self._interrupt:  # a callback may say so; it may change _guidance_scale too
                continue
            prediction = self.predict(sample, t, labels)
            sample = self.scheduler.step(prediction, t, sample, **options, return_dict=False)[0]
            if callback_on_step_end is not None:
                tensors = {"latents": sample, "labels": labels}
                tensors = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                changed = callback_on_step_end(self, i, t, tensors) or {}
                sample, labels = changed.get("latents", sample), changed.get("labels", labels)

        images: Any = sample if output_type == "latent" else self.decode_latents(sample)
        images = self.image_processor.postprocess(images, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def get_label_ids(self, class_labels: Labels) -> list[int]:
        """Class indices of names or indices, which must exist; the null class for None."""
        if class_labels is None:
            return [self.num_classes]
        single = isinstance(class_labels, int | str)
        labels, names = [class_labels] if single else list(class_labels), self.labels
        for label in labels:
            known = label in names if isinstance(label, str) else 0 <= label < self.num_classes
            some = f": {', '.join(list(names)[:10])} …" if names else ""
            taught = f"the denoiser was taught {self.num_classes} classes, counted from 0{some}"
            _check(known, f"class_labels: there is no class {label!r}; {taught}")
        return [names[label] if isinstance(label, str) else int(label) for label in labels]

    def _latent_shape(
        self, height: int | None, width: int | None, latents: Tensor | None
    ) -> tuple[int, int, int]:
        """(c, h, w) of the latents: as asked for, else as given, else the denoiser's own."""
        config, f = self.denoiser.config, self.vae_scale_factor
        own = config.sample_size if latents is None else tuple(latents.shape[-2:])
        own = own if isinstance(own, Sequence) else (own, own)
        h, w = (side and side * f for side in own)
        h, w = height or h, width or w
        _check(bool(h and w), "this denoiser has no size of its own: pass height and width")
        multiple = f * 2 ** (len(config.get("block_out_channels", (0,))) - 1)
        fits = h > 0 and w > 0 and h % multiple == w % multiple == 0
        _check(fits, f"height and width must be multiples of {multiple}, not {h} and {w}")
        if "num_embeds_ada_norm" in config:
            own = config.sample_size * f
            _check(h == w == own, f"height and width must be {own} for this DiT")
        return (config.in_channels, h // f, w // f)

    def _set_timesteps(self, steps: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
        config, options = self.scheduler.config, {}
        if config.get("use_dynamic_shifting"):  # as in StableDiffusion3Pipeline: linear in length
            length = shape[-2] * shape[-1] / self.denoiser.config.get("patch_size", 1) ** 2
            slope = config.max_shift - config.base_shift
            slope = slope / (config.max_image_seq_len - config.base_image_seq_len)
            options["mu"] = config.base_shift + slope * (length - config.base_image_seq_len)
        self.scheduler.set_timesteps(steps, device=device, **options)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)  # else each first step searches it, with a GPU sync
        self.num_timesteps = len(self.scheduler.timesteps)
        return self.scheduler.timesteps

    def prepare_latents(
        self,
        shape: tuple[int, ...],
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
    ) -> Tensor:
        """The noise to start from, of `shape`, at the scheduler's initial scale.

        It is float32, as are the latents throughout: only the networks run in their own precision.
        """
        if latents is None:
            latents = randn_tensor(shape, generator, device, torch.float32)
        # Flow matching starts at noise of scale 1 and does not say so.
        return latents.to(device, torch.float32) * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def predict(self, latents: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """The denoiser's output for latents (B, c, h, w), guided if asked for, in float32.

        Guidance is on all latent channels. A learned variance (twice the channels) is handed on to
        a `DDPMScheduler` that wants one and is dropped for every other scheduler.
        """
        config, inputs = self.denoiser.config, latents
        takes_labels = "num_embeds_ada_norm" in config or config.get("num_class_embeds") is not None
        guided = self._guidance_scale > 1 and self.num_classes > 0
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
        """Images, nominally in [-1, 1], of scaled latents of shape (B, c, h, w).

        An fp16 autoencoder whose config says `force_upcast` decodes in fp32, as it would overflow.
        """
        latents = unscale_latents(latents.float(), self.vae.config)
        upcast = self.vae.dtype == torch.float16 and self.vae.config.get("force_upcast", False)
        if upcast:
            self.vae.to(torch.float32)
        images = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        if upcast:
            self.vae.to(torch.float16)
        return images

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
        return json.dumps(content, indent=2, sort_keys=True) + "\n"


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _batch_size(
    asked: int | None, class_labels: Labels, latents: Tensor | None, generator: object
) -> int:
    """The number of images on which all arguments agree."""
    listed = None if isinstance(class_labels, int | str) else class_labels
    generators = generator if isinstance(generator, list) else None
    lists = {"class_labels": listed, "latents": latents, "generator": generators}
    sizes = {name: len(value) for name, value in lists.items() if value is not None}
    if asked is not None:
        sizes = {"batch_size": asked, **sizes}
    told = ", ".join(f"{name} for {size}" for name, size in sizes.items())
    _check(len(set(sizes.values())) <= 1, f"the number of images is unclear: {told}")
    size = next(iter(sizes.values()), 1)
    _check(size >= 1, f"batch_size must be at least 1, not {size}")
    return size
