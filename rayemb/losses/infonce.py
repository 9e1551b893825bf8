"""InfoNCE (van den Oord et al., 2018; symmetric as in CLIP, Radford et al., 2021) with several positives."""

import math
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from rayemb.config import Config
from rayemb.losses.pairs import Duplicates, Pairs


class InfoNCEConfig(Config):
    """Softmax over all candidates; the positives of one anchor share its probability mass."""

    name: Literal["infonce"] = "infonce"
    temperature: float = Field(0.07, gt=0, description="softmax temperature, or its start if it is learnable")
    learnable_temperature: bool = Field(True, description="whether the temperature is trained with the encoder")
    min_temperature: float = Field(0.01, gt=0, description="floor of a learnable temperature (CLIP's 1/100)")
    margin: float = Field(0.0, ge=0, lt=2, description="subtracted from the cosine of the positives")
    duplicates: Duplicates = Field(
        "positive", description="what a candidate with the anchor's label is: positive, ignore or negative"
    )

    @model_validator(mode="after")
    def _above_floor(self) -> "InfoNCEConfig":
        if self.learnable_temperature and self.temperature < self.min_temperature:
            raise ValueError(f"temperature ({self.temperature}) is below min_temperature ({self.min_temperature})")
        return self


class InfoNCE(nn.Module):
    """Row losses of anchors against candidates; owns the temperature.

    Choose it for pairs with many in-batch negatives. The temperature is held at its floor by clamping in forward,
    not by editing the parameter: under ZeRO the parameter is a copy of a partitioned master weight.
    """

    def __init__(self, config: InfoNCEConfig) -> None:
        super().__init__()
        self.config = config
        # One element, not zero dimensions: DeepSpeed's broadcast of the weights cannot view a scalar as bytes.
        log_scale = torch.full((1,), -math.log(config.temperature))
        self.log_scale = nn.Parameter(log_scale, requires_grad=config.learnable_temperature)

    @property
    def temperature(self) -> float:
        """The current temperature."""
        return 1.0 / float(self._scale().detach())

    def forward(self, anchors_BD: Tensor, candidates_MD: Tensor, pairs: Pairs) -> Tensor:
        """Losses `(B,)` of unit vectors `(B, D)` against unit vectors `(M, D)`, in fp32 or better."""
        if anchors_BD.element_size() < 4 or candidates_MD.element_size() < 4:
            anchors_BD, candidates_MD = anchors_BD.float(), candidates_MD.float()
        with torch.autocast(anchors_BD.device.type, enabled=False):  # autocast would compute the cosines in bf16
            s_BM = anchors_BD @ candidates_MD.T
        return info_nce(s_BM, pairs, scale=self._scale().to(s_BM.dtype), margin=self.config.margin)

    def _scale(self) -> Tensor:
        if not self.config.learnable_temperature:
            return self.log_scale.exp()
        ceiling = -math.log(self.config.min_temperature)
        clamped: Tensor = _Ceiling.apply(self.log_scale, ceiling)  # type: ignore[no-untyped-call]
        return clamped.exp()


class _Ceiling(torch.autograd.Function):
    """`clamp(max=ceiling)` whose gradient still flows where a descent step would lead back below the ceiling.

    The gradient of a plain clamp is zero above it: a temperature that once crossed its floor would stay there.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, ceiling: float) -> Tensor:
        ctx.save_for_backward(x > ceiling)
        return x.clamp(max=ceiling)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (above,) = ctx.saved_tensors
        return grads[0].masked_fill(above & (grads[0] < 0), 0.0), None


def info_nce(s_BM: Tensor, pairs: Pairs, *, scale: Tensor | float, margin: float = 0.0) -> Tensor:
    """`-sum_j w_j log softmax(scale * (s - margin * [w > 0]))_j / sum_j w_j` per row, `(B,)`.

    `s_BM` are similarities; ignored candidates leave the softmax altogether. With one positive and no margin this
    is the cross-entropy of CLIP; with several it is SupCon's L_out (Khosla et al., 2020).
    """
    w_BM = pairs.positives.to(s_BM.dtype)
    if margin:
        s_BM = s_BM - margin * (w_BM > 0).to(s_BM.dtype)
    logits = s_BM * scale
    if pairs.ignore is not None:
        logits = logits.masked_fill(pairs.ignore, float("-inf"))
    log_p = logits - logits.logsumexp(dim=1, keepdim=True)
    # Where the weight is zero the product must be zero too, and 0 * -inf is not.
    weighted = torch.where(w_BM > 0, w_BM * log_p, torch.zeros_like(log_p))
    losses: Tensor = -weighted.sum(1) / w_BM.sum(1)
    return losses
