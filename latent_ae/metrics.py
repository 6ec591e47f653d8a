"""How near a reconstruction is: PSNR, SSIM, MS-SSIM and LPIPS of each picture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from latent_ae.data import normalize, to_uint8
from latent_ae.losses import PerceptualLoss

__all__ = ["SMALLEST_MS_SSIM", "ReconstructionMetrics", "lpips_metric"]

# Half of the 11-pixel window: Wang et al. average where it fits, as scikit-image does; torchmetrics
# 1.9 counts the mirrored border too, which lowers SSIM by .02 at 128².
_BORDER = 5
# That of rounding to 8 bits, 58.9 dB: a picture returned exactly (a flat one) must not make the
# mean infinite.
_SMALLEST_ERROR = 1 / (12 * 255**2)
SMALLEST_MS_SSIM = 176  # pixels, of which the fifth scale keeps the window's 11


def lpips_metric(net: str) -> str:
    """What a backbone's LPIPS is called among the metrics: `lpips` is AlexNet's."""
    return "lpips" if net == "alex" else f"lpips_{net}"


class ReconstructionMetrics:
    """Collects the metrics of pictures one by one; the result is their mean.

    Reconstructions are clamped and rounded to 8 bits first, as a saved picture would be. PSNR (dB,
    at most 58.9) and SSIM (Wang et al. 2004: Gaussian window, σ 1.5, 11 pixels, where it fits) have
    the data range 1; MS-SSIM (Wang et al. 2003) is torchmetrics'; LPIPS v0.1 runs in fp32.

    Args:
        device: where they are computed.
        lpips: the backbones of LPIPS; none where pictures have no colours (`has_colours`).
        ms_ssim: whether to take it; of pictures below 176 pixels it is NaN.
        lpips_path: a safetensors file of VGG16's weights, where torchvision cannot fetch them.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        lpips: Sequence[str] = ("alex",),
        *,
        ms_ssim: bool = False,
        lpips_path: str | None = None,
    ) -> None:
        paths = {"vgg": lpips_path}
        self.perceptual = {
            lpips_metric(net): PerceptualLoss(net, paths.get(net)).to(device) for net in lpips
        }
        names = ["psnr", "ssim", *(["ms_ssim"] if ms_ssim else []), *self.perceptual]
        self.per_image: dict[str, list[float]] = {name: [] for name in names}

    @torch.no_grad()
    def measure(self, images: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        """The metrics of each picture of a batch, each of shape (B,).

        Args:
            images: uint8 of shape (B, C, H, W).
            reconstruction: likewise.
        """
        # Here, because it loads half of scipy: a run that does not validate yet need not wait.
        from torchmetrics.functional.image import structural_similarity_index_measure

        target, estimate = images.float() / 255, reconstruction.float() / 255
        error = (estimate - target).square().mean((1, 2, 3)).clamp(min=_SMALLEST_ERROR)
        values = {"psnr": -10 * error.log10()}
        _, ssim_map = structural_similarity_index_measure(
            estimate, target, data_range=1.0, reduction="none", return_full_image=True
        )
        values["ssim"] = ssim_map[..., _BORDER:-_BORDER, _BORDER:-_BORDER].mean((1, 2, 3))
        if "ms_ssim" in self.per_image:
            values["ms_ssim"] = _ms_ssim(estimate, target)
        for name, distance in self.perceptual.items():
            values[name] = distance(normalize(images), normalize(reconstruction))
        return values

    def update(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        """Adds a batch.

        Args:
            images: uint8 of shape (B, C, H, W).
            reconstruction: floats in [-1, 1] or uint8, of the same shape.

        Returns:
            The reconstruction as uint8, of shape (B, C, H, W).
        """
        if reconstruction.dtype != torch.uint8:
            reconstruction = to_uint8(reconstruction)
        for name, values in self.measure(images, reconstruction).items():
            self.per_image[name] += values.flatten().tolist()
        return reconstruction

    def compute(self) -> dict[str, float]:
        """The mean over all pictures so far, by metric."""
        return {name: sum(values) / len(values) for name, values in self.per_image.items()}


def _ms_ssim(estimate: Tensor, target: Tensor) -> Tensor:
    if min(target.shape[-2:]) < SMALLEST_MS_SSIM:
        return torch.full((len(target),), torch.nan)
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    # A negative contrast term (the pictures disagree) has no real power; relu is the usual answer.
    values = multiscale_structural_similarity_index_measure(
        estimate, target, data_range=1.0, reduction="none", normalize="relu"
    )
    return values.reshape(-1)  # pyright: ignore[reportAttributeAccessIssue]
