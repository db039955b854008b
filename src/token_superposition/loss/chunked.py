"""The loss chunk by chunk: the logits of some rows at a time, their loss, and at once their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from token_superposition.errors import TokenSuperpositionError

# Rows of a chunk on a CPU, elsewhere, and for the Triton kernel: as many as make the matrix products efficient, if
# their logits take no more than these bytes.
CHUNK_ROWS, CHUNK_ROWS_ACCELERATOR, CHUNK_ROWS_KERNEL = 240, 2048, 4096
CHUNK_BYTES = 2**30
# Head gradients of low precision are summed in float32 through a buffer of at most this many elements.
TILE_ELEMENTS = 2**22


@torch.library.custom_op("token_superposition::linear_multi_hot_loss", mutates_args=())
def linear_multi_hot_loss(
    hidden: Tensor,  # (N, d)
    weight: Tensor,  # (V, d), or this process's rows of it
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N, s)
    target_weights: Tensor,  # (N, s) as given by targets.target_weights, or by targets.bag_members if composite
    valid: Tensor,  # (N,) bool
    dtype: torch.dtype,
    softcap: float,
    logit_scale: float,
    z_loss: float,
    kernel: str,
    chunk_rows: int,
    differentiate: Sequence[bool],
    vocab_start: int,
    group: str,
    composite: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum of the rows' losses, and its gradients by ``hidden``, ``weight`` and ``bias`` (empty where not asked for).

    The matrix products run in ``dtype``; the rest and the sum over chunks in the dtype of ``target_weights``. So do the
    gradients of weight and bias come, which may be too large for float16 until they are divided by the rows.
    ``kernel`` is ``torch`` or ``triton``. ``group`` names the process group over which the vocabulary is sharded
    (none if empty); ``vocab_start`` is the first id of ``weight``. ``composite`` makes it the sum-to-one loss.
    """
    (n, d), v = hidden.shape, weight.shape[0]
    acc = target_weights.dtype
    device = hidden.device
    need_hidden, need_weight, need_bias = differentiate
    total = torch.zeros((), dtype=acc, device=device)
    grad_hidden = torch.empty_like(hidden) if need_hidden else hidden.new_empty(0)
    grad_weight = torch.zeros((v, d), dtype=acc, device=device) if need_weight else target_weights.new_empty(0)
    grad_bias = torch.zeros(v, dtype=acc, device=device) if need_bias else target_weights.new_empty(0)
    usual = CHUNK_ROWS if device.type == "cpu" else CHUNK_ROWS_KERNEL if kernel == "triton" else CHUNK_ROWS_ACCELERATOR
    widest = dtype if kernel == "triton" else acc
    most = max(chunk_rows or min(usual, CHUNK_BYTES // (v * widest.itemsize)), 1)
    rows = max(ceil_div(n, max(ceil_div(n, most), 1)), 1)  # chunks of equal size
    logits = torch.empty((rows, v), dtype=dtype, device=device)
    with torch.autocast(device.type, enabled=False):
        w_c = weight.to(dtype)
        for i in range(0, n, rows):
            ok = valid[i : i + rows].unsqueeze(1)
            # A row without a target is set to 0 whatever it holds, so that it can add nothing anywhere.
            h = torch.where(ok, hidden[i : i + rows], 0).to(dtype)
            if logit_scale != 1:
                h = h * logit_scale
            z = torch.mm(h, w_c.T, out=logits[: h.shape[0]])
            if bias is not None:
                z.add_(bias.to(dtype))
            y, w = own_targets(targets[i : i + rows], target_weights[i : i + rows], vocab_start, v, group)
            if kernel == "triton":
                from token_superposition.loss.kernel import loss_and_gradient as by_kernel

                losses = by_kernel(z, y, w, softcap, z_loss)
                g = z
            else:
                losses, g = loss_and_gradient(z.to(acc), y, w, softcap, z_loss, group, composite)
            total += torch.where(ok.squeeze(1), losses, 0).sum()
            if not any(differentiate):
                continue
            g = g.to(dtype)
            if need_hidden:
                part = g @ w_c
                if group:
                    part = _all_reduce(part.to(acc), "sum", group)
                grad_hidden[i : i + rows] = torch.where(ok, part * logit_scale, 0)
            if need_weight:
                _add_product(grad_weight, g, h)
            if need_bias:
                grad_bias += ok.squeeze(1).to(acc) @ g.to(acc)
    return total, grad_hidden, grad_weight, grad_bias


def loss_and_gradient(
    z: Tensor,  # (n, V) logits; overwritten
    y: Tensor,  # (n, s)
    w: Tensor,  # (n, s)
    softcap: float,
    z_loss: float,
    group: str,
    composite: bool = False,
) -> tuple[Tensor, Tensor]:  # (n,) losses; (n, V) gradient by the logits, in the memory of z where that is possible
    slope = None
    if softcap:
        capped = z.div_(softcap).tanh_()
        slope = 1 - capped.square()
        z = capped.mul_(softcap)
    top = z.amax(1, keepdim=True)
    if group:
        top = _all_reduce(top, "max", group)
    z.sub_(top)
    targets = z.gather(1, y)
    if composite:  # the targets weigh as the model sees them: a softmax over the members of the bag
        members = targets.masked_fill(w == 0, -torch.inf)
        best = members.amax(1, keepdim=True).nan_to_num(neginf=0.0)
        w = members.sub_(best).exp_()
        inside = w.sum(1, keepdim=True).clamp_(min=1)  # 1 or more, but in a row without members
        picked, w = (inside.log() + best).squeeze(1), w / inside
    else:
        picked = (torch.where(w > 0, targets, 0) * w).sum(1)  # a masked target may have a logit of -inf
    sums = z.exp_().sum(1)
    if group:
        sums, picked = _all_reduce(sums, "sum", group), _all_reduce(picked, "sum", group)
    log_sums = sums.log()
    losses = log_sums - picked
    scale = 1 / sums
    if z_loss:
        lse = log_sums + top.squeeze(1)
        losses = losses + z_loss * lse.square()
        scale = scale * (1 + 2 * z_loss * lse)
    g = z.mul_(scale.unsqueeze(1)).scatter_add_(1, y, -w)  # repeated targets add up
    return losses, g if slope is None else g.mul_(slope)


def own_targets(
    targets: Tensor,  # (N, s)
    w: Tensor,  # (N, s)
    start: int,
    v: int,
    group: str,
) -> tuple[Tensor, Tensor]:  # columns of this process's logits and their weights: 0 where the weight is 0
    """A target beyond the vocabulary stays as it is, and picking its logit fails. So it does not in a sharded one."""
    y = targets - start
    if group:
        w = torch.where((y >= 0) & (y < v), w, 0)
    return torch.where(w > 0, y, 0), w


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _add_product(total: Tensor, g: Tensor, h: Tensor) -> None:  # (V, d) += (n, V).T @ (n, d)
    if g.dtype == total.dtype:
        total.addmm_(g.T, h)
        return
    if total.is_cuda:  # the product itself is added in the precision of the sum
        torch.addmm(total, g.T, h, out_dtype=total.dtype, out=total)
        return
    tile = max(TILE_ELEMENTS // h.shape[1], 1)
    for i in range(0, total.shape[0], tile):
        total[i : i + tile] += g[:, i : i + tile].T @ h


def _all_reduce(x: Tensor, operation: str, group: str) -> Tensor:
    from torch.distributed._functional_collectives import all_reduce, wait_tensor

    return wait_tensor(all_reduce(x, operation, cast(Any, group)))


@linear_multi_hot_loss.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, target_weights: Tensor, *settings: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_hidden, need_weight, need_bias = settings[7]  # valid, then from dtype on
    return (
        target_weights.new_empty(()),
        torch.empty_like(hidden) if need_hidden else hidden.new_empty(0),
        target_weights.new_empty(weight.shape if need_weight else 0),
        target_weights.new_empty(weight.shape[0] if need_bias else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # the gradients are outputs that nobody differentiates: no zeros for them
    ctx.save_for_backward(*inputs[:6])
    ctx.settings = inputs[6:]
    # The gradients are kept beside the graph's saved tensors, so that the backward pass can scale them in place.
    ctx.gradients = tuple(g.detach() for g in output[1:])


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 16
    if torch.is_grad_enabled():
        raise TokenSuperpositionError(
            "linear_multi_hot_cross_entropy was differentiated with create_graph=True; "
            "only impl='reference' has second derivatives"
        )
    gradients = ctx.gradients
    if not torch.compiler.is_compiling():
        ctx.gradients = None
        if gradients is None:  # a second backward pass through a retained graph
            gradients = linear_multi_hot_loss(*ctx.saved_tensors, *ctx.settings)[1:]
    scale = torch.mul if torch.compiler.is_compiling() else Tensor.mul_
    scaled = [
        scale(g, grad).to(t.dtype) if need else None
        for g, t, need in zip(gradients, ctx.saved_tensors[:3], ctx.settings[6], strict=True)
    ]
    return (*scaled, *[None] * 13)


linear_multi_hot_loss.register_autograd(_backward, setup_context=_setup_context)
