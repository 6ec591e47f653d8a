"""diffusers' stock pipelines around an autoencoder, with tiny random companions."""

import diffusers
import torch
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from latent_ae.autoencoder import reconstruct
from latent_ae.bottlenecks import split_moments
from latent_ae.scaling import LatentScaling

STATISTICS = ("scale", "shift_factor", "latents_mean", "folded")
MEAN, STD = [0.7, -0.4, 0.2, 1.1], [0.5, 1.5, 0.8, 2.0]
WIDTH = 16  # of every text encoder
LENGTH = 16  # tokens


def clip_tokenizer():
    """Every byte a token, alone and at a word's end; no merges."""
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=LENGTH)


def t5_tokenizer():
    """A unigram model of the letters."""
    letters = "▁abcdefghijklmnopqrstuvwxyz"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((p, -3.0) for p in letters)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=LENGTH)


def clip_encoder(kind=CLIPTextModel):
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return kind(config).eval()


def t5_encoder(width=WIDTH):
    config = T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=width,
        d_kv=8,
        d_ff=WIDTH,
        num_layers=1,
        num_heads=2,
    )
    return T5EncoderModel(config).eval()


def unet(vae, **changes):
    return diffusers.UNet2DConditionModel(
        **{
            "sample_size": 16,
            "in_channels": vae.config["latent_channels"],
            "out_channels": vae.config["latent_channels"],
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": WIDTH,
            "attention_head_dim": 2,
            "norm_num_groups": 4,
            **changes,
        }
    ).eval()


def ddim():
    return diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        steps_offset=1,
    )


def stable_diffusion(vae, kind="StableDiffusionPipeline"):
    return getattr(diffusers, kind)(
        vae=vae,
        text_encoder=clip_encoder(),
        tokenizer=clip_tokenizer(),
        unet=unet(vae),
        scheduler=ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(vae, kind="StableDiffusionXLPipeline"):
    sizes, pooled = 6, WIDTH
    network = unet(
        vae,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 * sizes + pooled,
        transformer_layers_per_block=1,
        use_linear_projection=True,
        cross_attention_dim=2 * WIDTH,  # both encoders' hidden states side by side
    )
    return getattr(diffusers, kind)(
        vae=vae,
        text_encoder=clip_encoder(),
        text_encoder_2=clip_encoder(CLIPTextModelWithProjection),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=network,
        scheduler=ddim(),
        add_watermarker=False,
    )


def stable_diffusion_3(vae, kind="StableDiffusion3Pipeline"):
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=vae.config["latent_channels"],
        out_channels=vae.config["latent_channels"],
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=32,
    ).eval()
    return getattr(diffusers, kind)(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=clip_encoder(CLIPTextModelWithProjection),
        text_encoder_2=clip_encoder(CLIPTextModelWithProjection),
        text_encoder_3=t5_encoder(2 * WIDTH),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        tokenizer_3=t5_tokenizer(),
    )


def flux(vae, kind="FluxPipeline"):
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * vae.config["latent_channels"],
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(2, 2, 4),
    ).eval()
    return getattr(diffusers, kind)(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=clip_encoder(),
        text_encoder_2=t5_encoder(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=t5_tokenizer(),
    )


def dit(vae, kind="DiTPipeline"):
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=vae.config["latent_channels"],
        out_channels=2 * vae.config["latent_channels"],
        num_layers=1,
        sample_size=32,
        num_embeds_ada_norm=10,
        norm_num_groups=4,
    ).eval()
    return getattr(diffusers, kind)(transformer=transformer, vae=vae, scheduler=ddim())


BUILDERS = {
    "StableDiffusionPipeline": stable_diffusion,
    "StableDiffusionImg2ImgPipeline": stable_diffusion,
    "StableDiffusionInpaintPipeline": stable_diffusion,
    "StableDiffusionXLPipeline": stable_diffusion_xl,
    "StableDiffusionXLImg2ImgPipeline": stable_diffusion_xl,
    "StableDiffusionXLInpaintPipeline": stable_diffusion_xl,
    "StableDiffusion3Pipeline": stable_diffusion_3,
    "StableDiffusion3Img2ImgPipeline": stable_diffusion_3,
    "StableDiffusion3InpaintPipeline": stable_diffusion_3,
    "FluxPipeline": flux,
    "FluxImg2ImgPipeline": flux,
    "FluxInpaintPipeline": flux,
    "DiTPipeline": dit,
}


@torch.no_grad()
def told(vae, statistics):
    """The autoencoder with such numbers in its config, and a posterior as narrow as its mean."""
    channels = vae.config["latent_channels"]
    vae.quant_conv.weight[channels:] = 0
    vae.quant_conv.bias[channels:] = -30
    if statistics == "shift_factor":
        vae.register_to_config(scaling_factor=0.6, shift_factor=1.3)
    if statistics == "latents_mean":
        repeat = channels // 4
        vae.register_to_config(
            scaling_factor=0.6, latents_mean=MEAN * repeat, latents_std=STD * repeat
        )
    return vae.eval()


@torch.no_grad()
def differences(kind, vae, image):
    """How far a pipeline's use of the statistics is from `LatentScaling`'s.

    Args:
        kind: the pipeline's class.
        vae: from `told`.
        image: in [-1, 1], of shape (1, 3, 64, 64).

    Returns:
        The largest difference between the picture that comes out of its final latents and the
        reconstruction, in [0, 1]; and between the latents that it encodes and those it ought to,
        None where it encodes nothing.
    """
    mean, _ = split_moments(vae.encode(image).latent_dist.parameters)
    latents = LatentScaling.of(vae).to_final(mean)
    wanted = (reconstruct(vae, image) / 2 + 0.5).clamp(0, 1)
    pipe = build(kind, vae)
    encoded = idealise(pipe, latents)
    decoded = run(pipe, image / 2 + 0.5, repainted=1)
    encoding = (encoded[0] - latents).abs().max().item() if encoded else None
    return (decoded - wanted).abs().max().item(), encoding


def build(kind, vae):
    """A pipeline of that class around `vae`, quiet, with weights that depend on nothing else."""
    torch.manual_seed(0)
    pipe = BUILDERS[kind](vae, kind)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, image, output_type="pt", repainted=0.5):
    """Four steps of a pipeline at the size of `image` (1, 3, H, W) in [0, 1], without guidance.

    Image pipelines change `image`; inpainting repaints that share of it, from the left.
    """
    kind, (height, width) = type(pipe).__name__, image.shape[-2:]
    options = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": output_type}
    options["generator"] = torch.Generator().manual_seed(0)
    if kind == "DiTPipeline":
        picture = pipe(class_labels=[1], **options | {"output_type": "np"}).images  # knows no "pt"
        return torch.from_numpy(picture).permute(0, 3, 1, 2)
    options |= {"prompt": "a photograph", "height": height, "width": width}
    if "Inpaint" in kind:
        mask = torch.zeros(1, 1, height, width)
        mask[..., : int(width * repainted)] = 1
        options |= {"image": image, "mask_image": mask, "strength": 0.5}
    elif "Img2Img" in kind:
        options |= {"image": image, "strength": 0.5}
        if kind in ("StableDiffusionImg2ImgPipeline", "StableDiffusionXLImg2ImgPipeline"):
            del options["height"], options["width"]
    if "StableDiffusion3" in kind or "Flux" in kind:
        options["max_sequence_length"] = LENGTH
    return pipe(**options).images


def idealise(pipe, latents):
    """Lets each step of the scheduler give `latents`.

    Returns:
        A list that will hold the latents that the pipeline encodes, before noise.
    """
    encoded = []

    def recorded(original):
        def add_noise(samples, *rest, **options):
            encoded.append(samples)
            return original(samples, *rest, **options)

        return add_noise

    def step(output, t, sample, *_, return_dict=True, **__):
        clean = latents
        if clean.ndim != sample.ndim:
            clean = pipe._pack_latents(clean, *clean.shape)
        return DDIMSchedulerOutput(clean.expand_as(sample))

    for name in ("add_noise", "scale_noise"):
        if hasattr(pipe.scheduler, name):
            setattr(pipe.scheduler, name, recorded(getattr(pipe.scheduler, name)))
    pipe.scheduler.step = step
    return encoded
