"""MiniMind's decoder, dense or mixture of experts, over packed rows.

Modules carry the names of the original and of transformers' Qwen3 and Qwen3-MoE, so weights move between the three
without surgery.  (B, T) rows are flattened to tokens; `cu_seqlens` keeps samples apart; the head and the loss run on
labelled tokens only.

Shape letters: B rows, T tokens (flattened B * row length inside the layers), C hidden, H heads, D head size,
I intermediate, E experts, K experts per token, G balance groups, N labelled tokens, V vocabulary.

    python -c "from minimind_ds import PRESETS, MiniMindForCausalLM; print(MiniMindForCausalLM(PRESETS['debug']))"
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minimind_ds import kernels
from minimind_ds.config.errors import UserError
from minimind_ds.config.model import ModelConfig
from minimind_ds.convert import minimind
from minimind_ds.data import IGNORE
from minimind_ds.kernels import KernelRequirements, KernelSelection, attention, resolve, with_compiled
from minimind_ds.kernels import parse as parse_kernels
from minimind_ds.model.rotary import Rotary

from . import loss
from .product import chained_product

if TYPE_CHECKING:
    from minimind_ds.data.packing import PackedBatch

BALANCE = ("batch", "row", "document", "global")


class ModelOutput(NamedTuple):
    """What a forward pass gives back: `loss_sum / n_labelled + aux_loss` is a batch's loss.

    A tuple, because DeepSpeed hooks the tensors of tuples and not of other classes.

    Without its hooks it learns of the last micro-batch of a step too late: with the optimizer offloaded at stage 3,
    all but one micro-batch's gradients were lost.

    loss_sum: cross-entropy summed over labelled tokens, nats, float32 (0 when there are none).
    n_labelled: how many tokens carry a label.
    aux_loss: the balance loss, coefficient included, a mean over real tokens (0 for a dense model and in eval mode).
    logits: (B, T, V) when asked for, else None.
    expert_counts: (layers, E), real tokens' choices of each expert, for metrics; None for a dense model or in eval.
    n_correct: how many labels have the largest logit, when asked for, else None.
    """

    loss_sum: Tensor
    n_labelled: int
    aux_loss: Tensor
    logits: Tensor | None = None
    expert_counts: Tensor | None = None
    n_correct: Tensor | None = None


class ForwardContext(NamedTuple):
    """What every layer of one forward pass shares."""

    cu_seqlens: Tensor
    max_seqlen: int
    cos_TD: Tensor
    sin_TD: Tensor
    group_T: Tensor | None
    n_groups: int
    kernels: KernelSelection
    attend: Callable[..., Tensor]
    total_counts: Callable[[Tensor], Tensor] | None


def kernel_requirements(config: ModelConfig) -> KernelRequirements:
    """What this model asks of its kernels."""
    return KernelRequirements(config.head_dim, config.dropout)


class Norm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps


class ResidualNorm(Norm):
    def forward(self, x: Tensor, residual: Tensor | None, context: ForwardContext) -> tuple[Tensor, Tensor]:
        """-> x + residual (x itself without one), and its norm."""
        return kernels.add_rms_norm(x, residual, self.weight, self.eps, backend=context.kernels.elementwise)


class FinalNorm(ResidualNorm):
    def forward(self, x: Tensor, residual: Tensor | None, context: ForwardContext) -> Tensor:
        """-> the norm of x + residual."""
        return super().forward(x, residual, context)[1]


class HeadNorm(Norm):
    def forward(self, x_THD: Tensor, context: ForwardContext) -> Tensor:
        """-> each head normalised and rotated to its position."""
        return rotate(x_THD, self.weight, self.eps, context)


def rotate(x_THD: Tensor, weight_D: Tensor | None, eps: float, context: ForwardContext) -> Tensor:
    return kernels.norm_rope(x_THD, weight_D, context.cos_TD, context.sin_TD, eps, backend=context.kernels.rope)


class Linear(nn.Linear):
    """No bias; the product is made in the input's dtype, which is wider than the weight's where that is faster."""

    def __init__(self, in_features: int, out_features: int, device: torch.device | str | None = None):
        super().__init__(in_features, out_features, bias=False, device=device)

    def forward(self, x: Tensor, hand_on: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """-> the product; with hand_on also x, for the next module that reads it (product.py says who may)."""
        weight = self.weight.to(x.dtype)
        return chained_product(x, weight) if hand_on else F.linear(x, weight)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        C, H, Hkv, D = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.head_dim, self.dropout, self.qk_norm = D, config.dropout, config.qk_norm
        self.q_proj = Linear(C, H * D)
        self.k_proj = Linear(C, Hkv * D)
        self.v_proj = Linear(C, Hkv * D)
        self.o_proj = Linear(H * D, C)
        if config.qk_norm:
            self.q_norm = HeadNorm(D, config.rms_norm_eps)
            self.k_norm = HeadNorm(D, config.rms_norm_eps)

    def forward(self, x_TC: Tensor, context: ForwardContext) -> Tensor:
        q, x_TC = self.q_proj(x_TC, hand_on=True)
        k, x_TC = self.k_proj(x_TC, hand_on=True)
        q_THD, k_THD, v_THD = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, self.v_proj(x_TC)))
        if self.qk_norm:
            q_THD, k_THD = self.q_norm(q_THD, context), self.k_norm(k_THD, context)
        else:
            q_THD, k_THD = (rotate(x_THD, None, 0.0, context) for x_THD in (q_THD, k_THD))
        out_THD = context.attend(q_THD, k_THD, v_THD, context.cu_seqlens, context.max_seqlen,
                                 backend=context.kernels.attention, dropout_p=self.dropout if self.training else 0.0)
        return F.dropout(self.o_proj(out_THD.flatten(1)), self.dropout, self.training)


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_TC: Tensor, context: ForwardContext) -> Tensor:
        gate_TI, x_TC = self.gate_proj(x_TC, hand_on=True)
        return self.down_proj(kernels.swiglu(gate_TI, self.up_proj(x_TC), backend=context.kernels.elementwise))


class Experts(nn.Module):
    """All experts' weights in two stacked parameters: every rank and every step touches every one of them."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        E, C, I = config.num_experts, config.hidden_size, config.moe_intermediate_size  # noqa: E741
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * I, C))
        self.down_proj = nn.Parameter(torch.empty(E, C, I))

    def forward(self, x_TC: Tensor, weights_TK: Tensor, experts_TK: Tensor, backend: str) -> Tensor:
        return kernels.moe(x_TC, self.gate_up_proj.to(x_TC.dtype), self.down_proj.to(x_TC.dtype), weights_TK,
                           experts_TK, backend=backend)


class MoEFeedForward(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.gate = Linear(config.hidden_size, config.num_experts)
        self.experts = Experts(config)

    def forward(self, x_TC: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """-> output (T, C), balance loss, choices per expert (E,); the last two None when not asked for."""
        logits_TE, x_TC = self.gate(x_TC, hand_on=True)
        weights_TK, experts_TK, counts_GE, scores_GE = kernels.route(
            logits_TE, self.config.num_experts_per_tok, self.config.norm_topk_prob, context.group_T,
            context.n_groups, backend=context.kernels.router)
        y_TC = self.experts(x_TC, weights_TK, experts_TK, context.kernels.moe)
        if context.group_T is None:
            return y_TC, None, None
        total_GE = context.total_counts(counts_GE) if context.total_counts else counts_GE
        balance = balance_loss(counts_GE, scores_GE, self.config.num_experts_per_tok, total_GE=total_GE)
        return y_TC, balance * self.config.router_aux_loss_coef, counts_GE.sum(dim=0)


def balance_loss(counts_GE: Tensor, scores_GE: Tensor, k: int, *, total_GE: Tensor) -> Tensor:
    """E * sum_e load_e * mean score_e per group of tokens, averaged over groups by their tokens.

    load_e is the number of choices of expert e per token of the group, so loads sum to k (as MiniMind counts).  Where
    ranks hold parts of a group, the mean of their losses, weighted by their tokens, is the group's.

    Args:
        counts_GE: how often a group's tokens chose an expert.  scores_GE: the sums of their scores (differentiable).
        k: experts per token.
        total_GE: the counts over all ranks that hold tokens of the group.
    """
    load_GE = total_GE / (total_GE.sum(dim=1, keepdim=True) / k).clamp(min=1)
    tokens = (counts_GE.sum() / k).clamp(min=1)
    return counts_GE.shape[1] * (load_GE * scores_GE).sum() / tokens


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = ResidualNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = ResidualNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoEFeedForward(config) if config.use_moe else FeedForward(config)
        self.use_moe = config.use_moe

    def forward(self, x_TC: Tensor, y_TC: Tensor | None,
                context: ForwardContext) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The layer of x + y (of x where y is None) -> x and y that the next norm adds, balance loss, choices (E,)."""
        x_TC, normed_TC = self.input_layernorm(x_TC, y_TC, context)
        attended_TC = self.self_attn(normed_TC, context)
        x_TC, normed_TC = self.post_attention_layernorm(attended_TC, x_TC, context)
        if not self.use_moe:
            return x_TC, self.mlp(normed_TC, context), None, None
        return x_TC, *self.mlp(normed_TC, context)


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = FinalNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = config.dropout

    def forward(self, ids_T: Tensor, context: ForwardContext,
                remember: bool) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """-> hidden (T, C), the balance losses and the expert counts of the layers that have them."""
        x_TC = self.embed_tokens(ids_T).to(context.kernels.activations)
        x_TC = F.dropout(x_TC, self.dropout, self.training)
        y_TC, balances, counts = None, [], []
        for layer in self.layers:
            if remember:
                x_TC, y_TC, balance, counts_E = layer(x_TC, y_TC, context)
            else:
                # A checkpoint keeps what its layer is given: one tensor, not two.  The sum has the same bits.
                x_TC = x_TC if y_TC is None else x_TC + y_TC
                x_TC, y_TC, balance, counts_E = checkpoint(layer, x_TC, None, context, use_reentrant=False)
            if balance is not None:
                balances.append(balance)
                counts.append(counts_E)
        return self.norm(x_TC, y_TC, context), balances, counts


class Head(Linear):
    """The output projection.  With labels it gives the loss: under ZeRO-3 its weight is whole only inside forward."""

    def forward(self, hidden_NC: Tensor, labels_N: Tensor | None = None, backend: str = "auto") -> Tensor:
        if labels_N is None:
            return super().forward(hidden_NC)
        return loss.cross_entropy_sum(hidden_NC, self.weight.to(hidden_NC.dtype), labels_N, backend=backend)


class MiniMindForCausalLM(nn.Module):
    """MiniMind-3 or MiniMind2 for training and scoring.

    Args:
        config: the model's shape.
        kernels: "auto", a backend's name, or "attention=NAME,moe=NAME" (see minimind_ds.kernels).
        balance: the groups over which the experts' balance is asked for: "batch" (all real tokens of the
            micro-batch, as MiniMind), "row" (each row of the batch: the same whichever ranks and micro-batches rows
            are dealt to), "document" (each packed sample) or "global" (as "batch", over all ranks' micro-batches).

    Raises:
        ValueError: a backend or a balance that does not exist.
    """

    def __init__(self, config: ModelConfig, kernels: str = "auto", *, balance: str = "batch"):
        super().__init__()
        if balance not in BALANCE:
            raise UserError(f"balance is {balance!r}; it must be one of {', '.join(BALANCE)}")
        parse_kernels(kernels)
        self.config, self.balance, self.kernels = config, balance, kernels
        self.gradient_checkpointing = False
        # sequence_parallel.install changes these where ranks share rows: attention over all their tokens, counts over
        # all ranks.
        self.attend, self.total_counts = attention, None
        self.model = Decoder(config)
        self.rotary = Rotary(config)
        # A tied head owns no memory of its own: both modules hold one Parameter, which ZeRO-3 gathers for either.
        self.lm_head = Head(config.hidden_size, config.vocab_size,
                            device="meta" if config.tie_word_embeddings else None)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        # For its dtype alone.  Under ZeRO-3 reading another module's parameter inside forward gathers it, at a moment
        # that differs between ranks; a tuple does not.
        self.like = (self.model.norm.weight,)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """Draws initial weights: see minimind.fresh."""
        parameters = dict(self.named_parameters())
        for name, tensor in minimind.fresh(self.config):
            parameters[name].copy_(tensor)

    def compile_layers(self):
        """From now on the elementwise parts of the layers run through torch.compile.

        Raises:
            ValueError: another backend was asked for them, or there is no compiler.
        """
        self.kernels = with_compiled(self.kernels)
        self.kernel_selection(self.like[0].device, self.like[0].dtype)

    def kernel_selection(self, device: torch.device | str, dtype: torch.dtype) -> KernelSelection:
        """The backends this model uses there, with the reason: for printing once.  Raises ValueError if it cannot."""
        return resolve(self.kernels, device, dtype, kernel_requirements(self.config))

    def forward(self, batch: PackedBatch, return_logits: bool = False, count_correct: bool = False) -> ModelOutput:
        """Runs packed rows.  The balance loss and expert counts are worked out in training mode only.

        Raises:
            ValueError: a segment longer than max_position_embeddings.
        """
        if batch.max_seqlen > self.config.max_position_embeddings:
            raise UserError(f"a segment of {batch.max_seqlen} tokens is longer than max_position_embeddings "
                             f"{self.config.max_position_embeddings}")
        labels_T = batch.labels.flatten()
        cos_TD, sin_TD = self.rotary(batch.position_ids.flatten())
        selection = self.kernel_selection(labels_T.device, self.like[0].dtype)
        context = ForwardContext(batch.cu_seqlens, batch.max_seqlen, cos_TD, sin_TD, *self.balance_groups(batch),
                                 selection, self.attend, self.total_counts)
        remember = not (self.gradient_checkpointing and self.training)
        hidden_TC, balances, counts = self.model(batch.input_ids.flatten(), context, remember)
        # A batch that brings the labelled positions avoids a GPU synchronization to count them.
        labelled_N = getattr(batch, "labelled_index", None)
        if labelled_N is None:
            labelled_N = (labels_T != IGNORE).nonzero().flatten()
        hidden_NC, labels_N = hidden_TC.index_select(0, labelled_N), labels_T.index_select(0, labelled_N)
        loss_sum = self.lm_head(hidden_NC, labels_N, selection.elementwise)
        return ModelOutput(
            loss_sum=loss_sum,
            n_labelled=len(labelled_N),
            aux_loss=torch.stack(balances).sum() if balances else loss_sum.new_zeros(()),
            logits=self.lm_head(hidden_TC).unflatten(0, batch.labels.shape) if return_logits else None,
            expert_counts=torch.stack(counts) if counts else None,
            n_correct=loss.count_correct(hidden_NC, self.lm_head.weight, labels_N) if count_correct else None,
        )

    def balance_groups(self, batch: PackedBatch) -> tuple[Tensor | None, int]:
        """(T,) the group of each real token, -1 for padding, and how many groups; (None, 0) without a balance loss."""
        if not (self.training and self.config.use_moe and self.config.router_aux_loss_coef > 0):
            return None, 0
        token_T = batch.first_token + torch.arange(batch.labels.numel(), device=batch.labels.device)
        n_rows = batch.n_rows or len(batch.labels)
        if self.balance in ("batch", "global"):
            n_groups, group_T = 1, torch.zeros_like(token_T)
        elif self.balance == "row":
            # cu_seqlens end where the whole batch does, padding included.
            n_groups, group_T = n_rows, token_T // (int(batch.cu_seqlens[-1]) // n_rows)
        else:
            n_groups = len(batch.cu_seqlens) - 1
            group_T = torch.searchsorted(batch.cu_seqlens[1:].to(token_T), token_T, right=True)
        real_mask = getattr(batch, "real_mask", None)
        if real_mask is not None:
            group_T = torch.where(real_mask.flatten(), group_T, -1)
        return group_T, n_groups

    def load_weights(self, state: dict[str, Tensor]):
        """Loads weights under our own names, all and no others.  Raises ValueError naming what does not fit."""
        state = minimind.check(state, self.config, "state dict")
        if self.config.tie_word_embeddings:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        self.load_state_dict(state, strict=True)

    def load_minimind(self, state_dict: dict[str, Tensor]):
        """Loads weights under MiniMind's names, all of them and no others.

        Raises:
            ValueError: one line naming what is missing, unexpected or of another shape.
        """
        self.load_weights(minimind.from_minimind(state_dict, self.config))
