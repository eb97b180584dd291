"""The baseline: MiniMind's own way of training, to measure against.

One sample a row, padded to one length; every position goes through attention, experts and head; experts are separate
modules visited in a loop with masks; the loss is a mean over the labelled tokens of the batch.  Written after
model/model_minimind.py and trainer/train_full_sft.py of jingyaogong/minimind; tests/bench/test_padded.py holds it to
the goldens, so that what is compared computes the same thing.

    deepspeed launch/benchmark.py --compare padded
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind_ds.config.model import ModelConfig


class Norm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps))).type_as(x)


def turn(x_BTHD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    first, second = x_BTHD.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x_BTHD * cos_TD.unsqueeze(1) + turned * sin_TD.unsqueeze(1)).to(x_BTHD.dtype)


def causal_attention(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor) -> Tensor:
    """Over whole rows, padding and all: k and v, of fewer heads, are repeated.  -> (B, T, H, D)."""
    groups = q_BTHD.shape[2] // k_BTHD.shape[2]
    k_BTHD, v_BTHD = (t.repeat_interleave(groups, dim=2) for t in (k_BTHD, v_BTHD))
    out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q_BTHD, k_BTHD, v_BTHD)), is_causal=True)
    return out.transpose(1, 2)


def expert_loop(x_TC: Tensor, experts, chosen_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Each expert on the tokens that chose it, found by a mask, added into place.  Idle experts stay in the graph."""
    y_TC = torch.zeros_like(x_TC)
    for e, expert in enumerate(experts):
        mask_TK = chosen_TK == e
        if mask_TK.any():
            tokens = mask_TK.any(-1).nonzero().flatten()
            part = expert(x_TC[tokens]) * weights_TK[mask_TK].view(-1, 1)
            y_TC.index_add_(0, tokens, part.to(y_TC.dtype))
        else:
            y_TC[0, 0] += 0 * sum(p.sum() for p in expert.parameters())
    return y_TC


class SelfAttention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.D = config.head_dim
        C, wide = config.hidden_size, config.num_attention_heads * config.head_dim
        narrow = config.num_key_value_heads * config.head_dim
        self.q_proj, self.k_proj = nn.Linear(C, wide, bias=False), nn.Linear(C, narrow, bias=False)
        self.v_proj, self.o_proj = nn.Linear(C, narrow, bias=False), nn.Linear(wide, C, bias=False)
        self.q_norm = Norm(self.D, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = Norm(self.D, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x_BTC: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        q, k, v = (proj(x_BTC).unflatten(-1, (-1, self.D)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = turn(self.q_norm(q), cos_TD, sin_TD), turn(self.k_norm(k), cos_TD, sin_TD)
        return self.o_proj(causal_attention(q, k, v).flatten(2))


class Dense(nn.Module):
    def __init__(self, C: int, I: int):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(C, I, bias=False), nn.Linear(C, I, bias=False)
        self.down_proj = nn.Linear(I, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class ExpertLoop(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(Dense(config.hidden_size, config.moe_intermediate_size)
                                     for _ in range(config.num_experts))

    def forward(self, x_BTC: Tensor) -> tuple[Tensor, Tensor]:
        config, x_TC = self.config, x_BTC.flatten(0, 1)
        scores_TE = F.softmax(self.gate(x_TC), dim=-1)
        weights_TK, chosen_TK = scores_TE.topk(config.num_experts_per_tok, dim=-1, sorted=False)
        if config.norm_topk_prob:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        y_TC = expert_loop(x_TC, self.experts, chosen_TK, weights_TK)
        load = F.one_hot(chosen_TK, config.num_experts).float().mean(0)
        aux = (load * scores_TE.mean(0)).sum() * config.num_experts * config.router_aux_loss_coef
        return y_TC.view_as(x_BTC), aux


class Layer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.mlp = ExpertLoop(config) if config.use_moe else Dense(config.hidden_size, config.intermediate_size)


class PaddedMiniMind(nn.Module):
    """MiniMind's model and loss over (B, T) padded rows; parameter names are MiniMind's own.

    forward(input_ids_BT, targets_BT) -> (mean cross-entropy over targets that are not -100, balance loss, logits).
    targets[b, t] is the token after input_ids[b, t].
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.model.norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        D = config.head_dim
        angles = torch.outer(torch.arange(config.max_position_embeddings).float(),
                             config.rope_theta ** (-torch.arange(0, D, 2).float() / D)).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, input_ids_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        T = input_ids_BT.shape[1]
        x_BTC, aux = self.model.embed_tokens(input_ids_BT), torch.zeros((), device=input_ids_BT.device)
        for layer in self.model.layers:
            x_BTC = x_BTC + layer.self_attn(layer.input_layernorm(x_BTC), self.cos[:T], self.sin[:T])
            y_BTC = layer.mlp(layer.post_attention_layernorm(x_BTC))
            if self.config.use_moe:
                y_BTC, balance = y_BTC
                aux = aux + balance
            x_BTC = x_BTC + y_BTC
        logits_BTV = self.lm_head(self.model.norm(x_BTC))
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=-100)
        return loss, aux, logits_BTV
