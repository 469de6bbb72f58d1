"""Layers and initialisations shared by the networks of this package.

Constructors draw the initial weights; no code outside changes them afterwards: a context such as
`deepspeed.zero.Init` may split a module's parameters as soon as its constructor returns. To
replace the initialisation of a third-party layer, the owner calls `Module.apply` in its
constructor, the one traversal that such contexts support.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# LayerNorm over the last dimension with the epsilon of the published models.
layer_norm = partial(nn.LayerNorm, eps=1e-6)


@torch.no_grad()
def trunc_normal_(tensor: Tensor, std: float = 0.02) -> None:
    """Fill `tensor` (any floating dtype) from a normal of deviation `std`, truncated at +-2.

    The draw is made in float32 and rounded once, so every dtype gets the same distribution.
    """
    tensor.copy_(nn.init.trunc_normal_(tensor.float(), std=std))


@torch.no_grad()
def xavier_uniform_(tensor: Tensor) -> None:
    """Fill a matrix with Glorot's uniform initialisation, drawn in float32."""
    tensor.copy_(nn.init.xavier_uniform_(tensor.float()))


class Linear(nn.Linear):
    """`nn.Linear` that starts from a truncated normal (0.02) and zero bias."""

    def reset_parameters(self) -> None:
        """Draw the weights; called by the constructor of `nn.Linear`."""
        trunc_normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class XavierLinear(nn.Linear):
    """`nn.Linear` that starts from Glorot's uniform distribution and zero bias."""

    def reset_parameters(self) -> None:
        """Draw the weights; called by the constructor of `nn.Linear`."""
        xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class ZeroLinear(nn.Linear):
    """`nn.Linear` that starts at zero."""

    def reset_parameters(self) -> None:
        """Set the weights; called by the constructor of `nn.Linear`."""
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


# How the last layer of a decoder may start, by the name of the setting.
HEADS: dict[str, type[nn.Linear]] = {"zero": ZeroLinear, "xavier": XavierLinear}


def init_transformer(module: nn.Module) -> None:
    """Initialise one Transformer layer: `owner.apply(init_transformer)` in the owner's constructor.

    Linear weights from Glorot's uniform distribution, as masked image models do: at small widths a
    fixed deviation of 0.02 would all but silence a stack of them. Embeddings from a truncated
    normal (0.02, BERT), biases zero.
    """
    if isinstance(module, nn.Linear):
        xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        trunc_normal_(module.weight)


class ToChannelsLast(nn.Module):
    """(N, C, H, W) -> (N, H, W, C), a view."""

    def forward(self, x: Tensor) -> Tensor:
        """Permute."""
        return x.permute(0, 2, 3, 1)


class ToChannelsFirst(nn.Module):
    """(N, H, W, C) -> (N, C, H, W), a view (`channels_last` in memory)."""

    def forward(self, x: Tensor) -> Tensor:
        """Permute."""
        return x.permute(0, 3, 1, 2)


def residual_blocks(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and blocks of all Transformers and convolutional stages inside, by their list's name.

    These are the units that checkpointing recomputes.
    """
    for name, block in module.named_modules():
        if name.rpartition(".")[0].endswith(("blocks", "encoder.layer")):
            yield name, block


def run_block(
    block: nn.Module, x: Tensor, other: Tensor | None = None, *, checkpointed: bool
) -> Tensor:
    """Apply one block to x and to its second input (an attention mask, drawn numbers), if any.

    With `checkpointed` only these are kept for the backward pass, which runs the block again.
    """
    inputs = (x,) if other is None else (x, other)
    if checkpointed and torch.is_grad_enabled():
        # The reentrant kind gives zero gradients when a block's input needs none.
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


def require_divisible(name: str, value: int, by_name: str, by: int) -> None:
    """Raise ValueError unless `value` is a positive multiple of `by`."""
    if by < 1 or value < 1 or value % by:
        raise ValueError(f"{name}={value}: must be a positive multiple of {by_name}={by}")
