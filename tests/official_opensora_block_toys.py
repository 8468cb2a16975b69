# SPDX-License-Identifier: Apache-2.0
"""Blocks with the attributes, class names and results of those of Open-Sora 1.0 and 1.1, of PixArt and of Open-Sora-Plan's
LatteT2V, written anew in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from test_patching_official import CrossAttention, SelfAttention, mlp, norm
from torch import Tensor, nn

WIDTH, FRAMES, POSITIONS = 32, 3, 5


def t2i_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class Frames(nn.Module):
    """What STDiT's and STDiT2's blocks share; `sized`: the grid is two attributes."""

    grid: tuple[int, int] = (FRAMES, POSITIONS)

    def __init__(self, sized: bool = True) -> None:
        super().__init__()
        if sized:
            self.d_t, self.d_s = FRAMES, POSITIONS
        self.norm1, self.norm2, self.drop_path = norm(WIDTH), norm(WIDTH), nn.Identity()
        self.attn, self.attn_temp = SelfAttention(WIDTH, 4), SelfAttention(WIDTH, 4)
        self.cross_attn, self.mlp = CrossAttention(WIDTH), mlp(WIDTH)
        self.scale_shift_table = nn.Parameter(torch.randn(6, WIDTH) / WIDTH**0.5)

    def t_mask_select(self, x_mask: Tensor | None, moving: Tensor, clean: Tensor) -> Tensor:
        return (
            moving
            if x_mask is None
            else torch.where(x_mask.repeat_interleave(self.grid[1], 1)[..., None], moving, clean)
        )

    def rows(self, table: Tensor, t: Tensor, x_mask: Any, t0: Any) -> list[Tensor]:
        pairs = (table + (t if other is None else other).unflatten(1, table.shape) for other in (None, t0))
        moving, clean = (pair[:, None].expand(-1, self.grid[0] * self.grid[1], -1, -1) for pair in pairs)
        return [self.t_mask_select(x_mask, moving[:, :, i], clean[:, :, i]) for i in range(table.shape[0])]

    def space(self, x: Tensor) -> Tensor:
        return self.attn(x.reshape(-1, self.grid[1], WIDTH)).reshape(x.shape)

    def time(self, x: Tensor, tpe: Any = 0) -> Tensor:
        columns = x.unflatten(1, self.grid).transpose(1, 2).flatten(0, 1)
        return self.attn_temp(columns + tpe).unflatten(0, (-1, self.grid[1])).transpose(1, 2).reshape(x.shape)

    def end(self, x: Tensor, y: Tensor, mask: Any, rows: list[Tensor]) -> Tensor:
        x = x + self.cross_attn(x, y, mask)
        return x + self.drop_path(rows[2] * self.mlp(t2i_modulate(self.norm2(x), rows[0], rows[1])))


class STDiTBlock(Frames):
    def forward(
        self, x: Tensor, y: Tensor, t: Tensor, mask: Any = None, tpe: Any = None, x_mask: Any = None, t0: Any = None
    ) -> Tensor:
        rows = self.rows(self.scale_shift_table, t, x_mask, t0)
        x = x + self.drop_path(rows[2] * self.space(t2i_modulate(self.norm1(x), rows[0], rows[1])))
        moving = self.rows(self.scale_shift_table, t, None, None)[2]
        x = x + self.drop_path(moving * self.time(x, 0 if tpe is None else tpe))
        return self.end(x, y, mask, rows[3:])


class STDiT2Block(Frames):
    def __init__(self, sized: bool = True) -> None:
        super().__init__(sized)
        self.norm_temp = norm(WIDTH)
        self.scale_shift_table_temporal = nn.Parameter(torch.randn(3, WIDTH) / WIDTH**0.5)

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        t: Tensor,
        t_tmp: Tensor,
        mask: Any = None,
        x_mask: Any = None,
        t0: Any = None,
        t0_tmp: Any = None,
        T: Any = None,
        S: Any = None,
    ) -> Tensor:
        self.grid = (self.d_t, self.d_s) if hasattr(self, "d_t") else (T, S)
        rows = self.rows(self.scale_shift_table, t, x_mask, t0)
        times = self.rows(self.scale_shift_table_temporal, t_tmp, x_mask, t0_tmp)
        x = x + self.drop_path(rows[2] * self.space(t2i_modulate(self.norm1(x), rows[0], rows[1])))
        x = x + self.drop_path(times[2] * self.time(t2i_modulate(self.norm_temp(x), times[0], times[1])))
        return self.end(x, y, mask, rows[3:])


class PixArtBlock(Frames):
    def __init__(self) -> None:
        super().__init__(sized=False)
        self.attn_temp = None

    def chain(self, x: Tensor, y: Tensor, t: Tensor, mask: Any, **sizes: Any) -> Tensor:
        rows = list((self.scale_shift_table + t.unflatten(1, (6, -1))).split(1, dim=1))
        x = x + self.drop_path(rows[2] * self.attn(t2i_modulate(self.norm1(x), rows[0], rows[1]), **sizes))
        return self.end(x, y, mask, rows[3:])

    def forward(self, x: Tensor, y: Tensor, t: Tensor, mask: Any = None) -> Tensor:
        return self.chain(x, y, t, mask)


class SizedAttention(SelfAttention):
    def forward(self, x: Tensor, HW: tuple[int, int]) -> Tensor:
        assert len(HW) == 2
        return super().forward(x)


class PixArtMSBlock(PixArtBlock):
    def __init__(self) -> None:
        super().__init__()
        self.attn = SizedAttention(WIDTH, 4)

    def forward(self, x: Tensor, y: Tensor, t: Tensor, mask: Any = None, HW: Any = None, **kwargs: Any) -> Tensor:
        return self.chain(x, y, t, mask, HW=HW)


class PlacedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(
        self, x: Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None, **places: Any
    ) -> Tensor:
        assert set(places) == {"position_q", "position_k", "last_shape"}
        given = x if encoder_hidden_states is None else encoder_hidden_states
        return F.scaled_dot_product_attention(self.to_q(x), self.to_k(given), self.to_v(given), attention_mask)


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(WIDTH)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.net(x)


class Plan(nn.Module):
    second = "norm2"

    def __init__(self, cross: bool = True) -> None:
        super().__init__()
        self.use_ada_layer_norm_single, self.only_cross_attention = True, False
        self.pos_embed = self._chunk_size = None
        self.norm1, self.attn1, self.ff = norm(WIDTH), PlacedAttention(), FeedForward()
        setattr(self, self.second, norm(WIDTH))
        self.attn2 = PlacedAttention() if cross else None
        self.scale_shift_table = nn.Parameter(torch.randn(6, WIDTH) / WIDTH**0.5)

    def chain(self, x: Tensor, timestep: Any, caption: Any, **places: Any) -> Tensor:
        a = (self.scale_shift_table[None] + timestep.unflatten(1, (6, -1))).chunk(6, dim=1)
        x = x + a[2] * self.attn1(t2i_modulate(self.norm1(x), a[0], a[1]), **places)
        if self.attn2 is not None:
            x = x + self.attn2(x, caption, **dict.fromkeys(places))
        return x + a[5] * self.ff(t2i_modulate(getattr(self, self.second)(x), a[3], a[4]))


class BasicTransformerBlock(Plan):
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Any = None,
        timestep: Any = None,
        cross_attention_kwargs: Any = None,
        class_labels: Any = None,
        position_q: Any = None,
        position_k: Any = None,
        hw: Any = None,
    ) -> Tensor:
        places = {"position_q": position_q, "position_k": position_k, "last_shape": hw}
        return self.chain(hidden_states, timestep, encoder_hidden_states, **places)


class BasicTransformerBlock_(Plan):
    second = "norm3"

    def __init__(self) -> None:
        super().__init__(cross=False)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Any = None,
        timestep: Any = None,
        cross_attention_kwargs: Any = None,
        class_labels: Any = None,
        position_q: Any = None,
        position_k: Any = None,
        frame: Any = None,
    ) -> Tensor:
        return self.chain(hidden_states, timestep, None, position_q=position_q, position_k=position_k, last_shape=frame)
