"""What the residual blocks share: the fused and the eager path, the choice between them, and the shortcut.

A block's ``_fused`` is the paper's figure written in :mod:`fastres.functional`; its ``_eager`` calls the modules one
after another, as mmcls does. Which of the two runs is looked up at every forward (``fused_obstacle``): the norms' real
types count, so a model stays right when a tool folds, converts, wraps or hooks its norms. Convolutions are called as
modules on both.

Under activation checkpointing (``with_cp``) the fused path updates running statistics once a step; eager norms are
called a second time when the block is recomputed and update theirs twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastres._fusable import check_input, check_values, hooked, norm_obstacle, observed, relu_obstacle
from fastres._norm import DropPath
from fastres._registry import build_activation_layer, build_conv_layer, build_norm_layer
from fastres.functional import Linked, Pending, conv_bn, materialize
from fastres.initialize import BaseModule, InitCfg

__all__ = ["ResidualBlock", "norm_property"]

_MIN_DROP_PATH = 1e-5  # below this a block has no drop path


def norm_property(index: int) -> Any:
    """``norm{index}``, under whatever name the norm's abbreviation gave it."""

    def get(self: Any) -> Any:
        return self._modules[getattr(self, f"norm{index}_name")]

    return property(get, doc=f"The norm after conv{index}.")


class ResidualBlock(BaseModule):
    """What :class:`BasicBlock` and :class:`Bottleneck` share: the two paths, and the choice between them."""

    convs: int  # convolutions on the residual branch
    conv1: nn.Module
    conv2: nn.Module
    norm1: Any = norm_property(1)
    norm2: Any = norm_property(2)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        expansion: int,
        stride: int,
        dilation: int,
        downsample: nn.Module | None,
        style: str,
        with_cp: bool,
        conv_cfg: dict[str, Any] | None,
        norm_cfg: dict[str, Any],
        drop_path_rate: float,
        act_cfg: dict[str, Any],
        init_cfg: InitCfg | None,
        convolutions: Sequence[dict[str, Any]],
    ) -> None:
        super().__init__(init_cfg)
        self.in_channels, self.out_channels, self.expansion = in_channels, out_channels, expansion
        self.mid_channels = convolutions[0]["out_channels"]
        self.stride, self.dilation, self.style, self.with_cp = stride, dilation, style, with_cp
        self.conv_cfg, self.norm_cfg = conv_cfg, norm_cfg
        for i, arguments in enumerate(convolutions, 1):
            name, norm = build_norm_layer(norm_cfg, arguments["out_channels"], postfix=i)
            setattr(self, f"norm{i}_name", name)
            self.add_module(f"conv{i}", build_conv_layer(conv_cfg, bias=False, **arguments))
            self.add_module(name, norm)
        self.relu = build_activation_layer(act_cfg)
        self.downsample = downsample
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > _MIN_DROP_PATH else nn.Identity()

    @property
    def last_norm(self) -> nn.Module:
        """The norm at the end of the branch, which ``zero_init_residual`` zeroes."""
        return self._modules[getattr(self, f"norm{self.convs}_name")]  # type: ignore[return-value]

    def fused_obstacle(self) -> str:
        """Why this block takes the eager sequence as it is now, in words; empty where it is fused."""
        for i in range(1, self.convs + 1):
            name = getattr(self, f"norm{i}_name")
            if obstacle := norm_obstacle(self._modules[name]):  # type: ignore[arg-type]
                return f"{name} {obstacle}"
        if obstacle := relu_obstacle(self.relu):
            return f"relu {obstacle}"
        if type(self.drop_path) not in (nn.Identity, DropPath):
            return f"drop_path is {type(self.drop_path).__name__}"
        if hooked(self.drop_path):
            return "drop_path has hooks"
        return observed()

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] to [N, out_channels, ceil(H / stride), ceil(W / stride)].

        Raises:
            TypeError, ValueError: naming the argument, before any running statistics change.
        """
        self._check(x)
        if self.fused_obstacle():
            return self.relu(self._checkpointed(self._eager, x))
        return self._checkpointed(self._fused, x)

    def _eager(self, x: Tensor) -> Tensor:
        """The block up to its last ReLU, every module called."""
        raise NotImplementedError

    def _fused(self, x: Tensor) -> Tensor:
        """The whole block in fused functions."""
        raise NotImplementedError

    def _check(self, x: Any) -> None:
        op = type(self).__name__
        check_input(op, x, self.conv1)
        if self.downsample is None:
            kept = self.stride == 1 or x.shape[2] == x.shape[3] == 1
            if x.shape[1] != self.out_channels or not kept:
                raise ValueError(
                    f"{op}: downsample is None, but the branch changes {list(x.shape)} to {self.out_channels} channels "
                    f"at stride {self.stride}; wanted a downsample module"
                )
        check_values(op, x, self.stride, self)

    def _checkpointed(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.with_cp and x.requires_grad:
            return checkpoint(function, x, use_reentrant=False)
        return function(x)

    def _keep(self, x: Tensor | Linked) -> Tensor | None:
        """Drop path's factor for each sample, or None."""
        if not isinstance(self.drop_path, DropPath):
            return None
        return self.drop_path.keep(x.out if isinstance(x, Linked) else x)

    def _identity(self, x: Tensor | Linked) -> Tensor | Pending | Linked:
        """The shortcut: x itself, its downsample still pending, or a tensor where that cannot be fused."""
        shortcut = self.downsample
        if shortcut is None:
            return x
        if type(shortcut) is not nn.Sequential or len(shortcut) < 2 or hooked(shortcut):
            return shortcut(materialize(x))
        *before, conv, norm = shortcut
        if norm_obstacle(norm):
            return shortcut(materialize(x))
        for module in before:
            x = module(materialize(x))
        return conv_bn(x, conv, norm.fused())  # type: ignore[operator]

    def _add(self, out: Tensor, x: Tensor) -> Tensor:
        """Drop path and the shortcut, eagerly."""
        identity = x if self.downsample is None else self.downsample(x)
        out = self.drop_path(out)
        # In place as in mmcls, where it is known that autograd allows it: backward hooks and a ReLU's output forbid it.
        if (
            type(self.last_norm) is nn.BatchNorm2d
            and not hooked(self.last_norm)
            and not hooked(self.drop_path)
        ):
            return out.add_(identity)
        return out + identity
