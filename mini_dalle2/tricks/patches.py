"""An upsampler that sees patches: the same model on p × p squares of pixels at once.

    UNet(x) = unfold(layers(fold(x)))        fold: (B, C, H, W) -> (B, C·p², H/p, W/p)

A CPU has little time, and most of a U-Net's time goes to its largest feature maps. Folding divides
the number of places by p². A narrow network has no room to pass on the noise of every pixel of a
patch, which predicting ε asks of it. Presets with patches therefore predict x_0 or v.

The folding itself is in unet.py. Read next: ../configs.py, whose presets choose it.
"""

from dataclasses import dataclass

from ..upsampler import UpsamplerConfig


# mini: the paper's networks see single pixels. Presets with `patch_size` above 1 see patches.
@dataclass(frozen=True)
class PatchUpsamplerConfig(UpsamplerConfig):
    """An upsampler's settings and the side p of its U-Net's patches, in pixels."""

    patch_size: int = 1

    def unet_settings(self):
        """Return the U-Net's settings as a dict."""
        return super().unet_settings() | dict(patch_size=self.patch_size)
