"""How near a reconstruction is: PSNR, SSIM and LPIPS of each picture."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from latent_ae.data import normalize, to_uint8
from latent_ae.losses import PerceptualLoss

__all__ = ["ReconstructionMetrics"]

# Half of the 11-pixel window: Wang et al. average where it fits, as scikit-image does; torchmetrics
# 1.9 counts the mirrored border too, which lowers SSIM by .02 at 128².
_BORDER = 5
# That of rounding to 8 bits, 58.9 dB: a picture returned exactly (a flat one) must not make the
# mean infinite.
_SMALLEST_ERROR = 1 / (12 * 255**2)


class ReconstructionMetrics:
    """Collects the metrics of pictures one by one; the result is their mean.

    Reconstructions are clamped and rounded to 8 bits first, as a saved picture would be. PSNR (dB,
    at most 58.9) and SSIM (Wang et al. 2004: Gaussian window, σ 1.5, 11 pixels, where it fits) have
    the data range 1; LPIPS v0.1 runs in fp32.
    """

    def __init__(self, device: torch.device | str = "cpu", lpips_net: str = "alex") -> None:
        self.perceptual = PerceptualLoss(lpips_net).to(device)
        self.per_image: dict[str, list[float]] = {"psnr": [], "ssim": [], "lpips": []}

    @torch.no_grad()
    def update(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        """Adds a batch.

        Args:
            images: uint8 of shape (B, 3, H, W).
            reconstruction: floats in [-1, 1] or uint8, of the same shape.

        Returns:
            The reconstruction as uint8, of shape (B, 3, H, W).
        """
        if reconstruction.dtype != torch.uint8:
            reconstruction = to_uint8(reconstruction)
        target, estimate = images.float() / 255, reconstruction.float() / 255
        error = (estimate - target).square().mean((1, 2, 3)).clamp(min=_SMALLEST_ERROR)
        psnr = -10 * error.log10()
        _, ssim_map = structural_similarity_index_measure(
            estimate, target, data_range=1.0, reduction="none", return_full_image=True
        )
        ssim = ssim_map[..., _BORDER:-_BORDER, _BORDER:-_BORDER].mean((1, 2, 3))
        lpips = self.perceptual(normalize(images), normalize(reconstruction))
        for name, values in (("psnr", psnr), ("ssim", ssim), ("lpips", lpips)):
            self.per_image[name] += values.flatten().tolist()  # pyright: ignore
        return reconstruction

    def compute(self) -> dict[str, float]:
        """The mean over all pictures so far, by metric."""
        return {name: sum(values) / len(values) for name, values in self.per_image.items()}
