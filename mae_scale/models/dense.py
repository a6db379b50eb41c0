"""The plain Vision Transformer as an encoder for detection and segmentation.

It is the encoder of pre-training with the changes of two papers: attention within windows for most
blocks, relative positions, position embeddings for larger images, and features of several blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from timm.layers import LayerScale
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn import functional as F

from mae_scale.errors import UserError
from mae_scale.models.encoder import Encoder, layer_norm
from mae_scale.models.pos_embed import resize_grid, sincos_pos_embed

Relative = Literal["none", "shared", "table", "decomposed"]
Positions = Literal["fixed", "trained"]


class RelativeTable(nn.Module):
    """A learned bias of attention for each offset between two tokens and each head.

    As in Swin and BEiT, an offset is the row (query row - key row + g - 1) * (2 g - 1) +
    (query column - key column + g - 1) of the table. With a class token three rows follow: class to
    patch, patch to class, class to class.

    Args:
        grid: g, tokens along a side of the square within which tokens attend to each other.
        heads: number of attention heads.
        class_token: whether the first token is a class token, outside of the grid.
    """

    def __init__(self, grid: int, heads: int, class_token: bool = False) -> None:
        super().__init__()
        self.grid, self.class_token = grid, class_token
        rows = (2 * grid - 1) ** 2 + (3 if class_token else 0)
        self.table = nn.Parameter(torch.zeros(rows, heads))

    def index(self) -> torch.Tensor:
        """Return the row of the table for each query and key, int64 [N, N]."""
        place = torch.arange(self.grid**2, device=self.table.device)
        row, column = place // self.grid, place % self.grid
        rows = row[:, None] - row[None, :] + self.grid - 1
        columns = column[:, None] - column[None, :] + self.grid - 1
        index = rows * (2 * self.grid - 1) + columns
        if self.class_token:
            index = F.pad(index, (1, 0, 1, 0))
            own = (2 * self.grid - 1) ** 2
            index[0, :], index[:, 0], index[0, 0] = own, own + 1, own + 2
        return index

    def forward(self) -> torch.Tensor:
        """Return the bias, [1, heads, N, N]."""
        return self.table.t()[:, self.index()].unsqueeze(0)


class DenseAttention(Attention):
    """timm's attention with relative positions of its own or given from outside.

    Args:
        dim, num_heads: width, and number of attention heads.
        grid: tokens along a side of the square within which tokens attend to each other.
        relative: "table" and "decomposed" have parameters here; "none" and "shared" do not.
        class_token: whether the first token is a class token, outside of the grid.
    """

    def __init__(
        self, dim: int, num_heads: int, grid: int, relative: Relative, class_token: bool
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias=True)
        self.relative = relative
        if relative == "table":
            self.rel_pos = RelativeTable(grid, num_heads, class_token)
        elif relative == "decomposed":
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * grid - 1, self.head_dim))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * grid - 1, self.head_dim))

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, size: tuple[int, int], bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Apply attention to tokens.

        Args:
            x: [B, N, D].
            size: rows and columns of the N tokens, without a class token.
            bias: bias added to the logits under "shared", [1, heads, N, N].

        Returns:
            [B, N, D].
        """
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.relative == "table":
            bias = self.rel_pos()
        elif self.relative == "decomposed":
            bias = decomposed_bias(q, self.rel_pos_h, self.rel_pos_w, size)
        bias = None if bias is None else bias.to(q.dtype)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(x.transpose(1, 2).reshape(b, n, -1))


def decomposed_bias(
    q: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, size: tuple[int, int]
) -> torch.Tensor:
    """Return a bias of attention: a term for the rows plus one for the columns between tokens.

    Args:
        q: queries that are not scaled, [B, heads, H * W, d].
        rows, columns: a vector for each offset, [2 g - 1, d]; interpolated where H or W is not g.
        size: H and W, the rows and columns of tokens.

    Returns:
        [B, heads, H * W, H * W].
    """
    (h, w), (b, heads, n, d) = size, q.shape
    q = q.reshape(b, heads, h, w, d)
    by_row = torch.einsum("bnhwd,hkd->bnhwk", q, _of_offsets(rows, h))
    by_column = torch.einsum("bnhwd,wkd->bnhwk", q, _of_offsets(columns, w))
    return (by_row.unsqueeze(-1) + by_column.unsqueeze(-2)).reshape(b, heads, n, n)


def _of_offsets(vectors: torch.Tensor, length: int) -> torch.Tensor:
    """Pick the vector of each query and key: [2 g - 1, d] -> [length, length, d]."""
    if len(vectors) != 2 * length - 1:
        wanted = F.interpolate(vectors.t().unsqueeze(0), 2 * length - 1, mode="linear")
        vectors = wanted.squeeze(0).t()
    place = torch.arange(length, device=vectors.device)
    return vectors[place[:, None] - place[None, :] + length - 1]


class DenseBlock(Block):
    """A transformer block that may attend within windows; it drops paths for whole images.

    Args:
        dim, num_heads: width, and number of attention heads.
        window: tokens along a side of a window; 0: all tokens see each other.
        grid: tokens along a side of the image.
        relative: kind of relative positions; see `DenseEncoder`.
        class_token: whether the first token is a class token; allowed without windows only.
        drop_path: rate of stochastic depth.
        mlp_ratio: width of the MLP's hidden layer divided by that of the block.
        layer_scale: initial factor of each channel of both residual branches; None: no factors.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: int,
        grid: int,
        relative: Relative,
        class_token: bool,
        drop_path: float,
        mlp_ratio: float,
        layer_scale: float | None,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=True,
            norm_layer=layer_norm,
            drop_path=drop_path,
            init_values=layer_scale,
        )
        self.window = window
        self.attn = DenseAttention(dim, num_heads, window or grid, relative, class_token)

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, size: tuple[int, int], bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run the block on [B, N, D]; `size` and `bias` are those of `DenseAttention.forward`."""
        y = self.norm1(x)
        if self.window:
            y, inner = into_windows(y, size, self.window), (self.window, self.window)
            y = out_of_windows(self.attn(y, inner, bias), size, self.window)
        else:
            y = self.attn(y, size, bias)
        x = x + self.drop_path1(self.ls1(y))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def into_windows(x: torch.Tensor, size: tuple[int, int], window: int) -> torch.Tensor:
    """Cut [B, H * W, D] into [B * windows, window ** 2, D]; zeros fill up right and bottom."""
    (h, w), (b, _, d) = size, x.shape
    x = F.pad(x.reshape(b, h, w, d), (0, 0, 0, -w % window, 0, -h % window))
    rows, columns = x.shape[1] // window, x.shape[2] // window
    x = x.reshape(b, rows, window, columns, window, d).transpose(2, 3)
    return x.reshape(b * rows * columns, window**2, d)


def out_of_windows(x: torch.Tensor, size: tuple[int, int], window: int) -> torch.Tensor:
    """Undo `into_windows` and remove the padding: the result is [B, H * W, D]."""
    (h, w), d = size, x.shape[-1]
    rows, columns = -(-h // window), -(-w // window)
    x = x.reshape(-1, rows, columns, window, window, d).transpose(2, 3)
    x = x.reshape(-1, rows * window, columns * window, d)[:, :h, :w]
    return x.reshape(-1, h * w, d)


class DenseEncoder(Encoder):
    """A plain ViT whose features after some blocks become maps.

    Args:
        img_size, patch_size: sides of the square image and its patches, in pixels.
        embed_dim, depth, num_heads: width, blocks and attention heads of the transformer.
        drop_path: rate of stochastic depth in the last block; it rises linearly from 0.
        mlp_ratio: width of the MLPs' hidden layers divided by that of the blocks.
        out_blocks: numbers (from 0) of the blocks after which features are taken.
        window: tokens along a side of a window; 0: all blocks are global.
        global_blocks: numbers of the blocks that are global where there are windows.
        relative: "none"; "shared": one `RelativeTable` for all windowed blocks and one for all
            global ones (Li et al. 2021); "table": one in each block (BEiT); "decomposed": a row and
            a column term in each block (ViTDet). All begin at zero.
        positions: "fixed": the sine-cosine embedding of the image's own grid, not trained;
            "trained": a parameter.
        pos_grid: patches along a side of the grid for which trained positions are stored; each
            forward pass resizes them, as ViTDet does. None: the image's own grid.
        class_token: whether a class token goes through the blocks; the features leave it out.
        layer_scale: initial factors of the residual branches; None: no factors.

    Raises:
        UserError: sizes that do not fit each other.
    """

    def __init__(
        self,
        *,
        img_size: int = 1024,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        drop_path: float = 0.0,
        mlp_ratio: float = 4.0,
        out_blocks: Sequence[int] = (11,),
        window: int = 0,
        global_blocks: Sequence[int] = (),
        relative: Relative = "none",
        positions: Positions = "trained",
        pos_grid: int | None = None,
        class_token: bool = False,
        layer_scale: float | None = None,
    ) -> None:
        _check_blocks("out_blocks", out_blocks, depth)
        _check_blocks("global_blocks", global_blocks, depth)
        if not out_blocks:
            raise UserError("out_blocks must name at least one block")
        if window < 0:
            raise UserError(f"window {window} must be at least 1 token, or 0 for no windows")
        if window and class_token:
            raise UserError(f"window {window} leaves no place for a class token")
        if positions == "fixed" and pos_grid is not None:
            raise UserError("pos_grid is for trained positions; fixed ones fit every grid")
        grid = img_size // max(1, patch_size)

        def make_block(number: int, rate: float) -> nn.Module:
            return DenseBlock(
                embed_dim,
                num_heads,
                window=0 if number in global_blocks else window,
                grid=grid,
                relative=relative,
                class_token=class_token,
                drop_path=rate,
                mlp_ratio=mlp_ratio,
                layer_scale=layer_scale,
            )

        super().__init__(
            img_size,
            patch_size,
            embed_dim,
            depth,
            num_heads,
            drop_path,
            mlp_ratio,
            make_block,
        )
        self.out_blocks, self.positions, self.layer_scale = (
            tuple(out_blocks),
            positions,
            layer_scale,
        )
        self.class_token, self.width, self.pos_grid = class_token, embed_dim, pos_grid or grid
        if not class_token:
            del self.cls_token
        rows = self.pos_grid**2 + int(class_token)
        self.pos_embed = nn.Parameter(torch.zeros(1, rows, embed_dim))
        self.pos_embed.requires_grad_(positions == "trained")
        self.patch_embed.strict_img_size = False
        self.rel_pos_window: RelativeTable | None = None
        self.rel_pos_global: RelativeTable | None = None
        if relative == "shared":
            if any(block.window for block in self.blocks):
                self.rel_pos_window = RelativeTable(window, num_heads)
            if not all(block.window for block in self.blocks):
                self.rel_pos_global = RelativeTable(grid, num_heads, class_token)
        self.initialize_weights()

    @property
    def encoder_tokens(self) -> int:
        """Count the tokens of an image that the blocks see, the class token included."""
        return int(self.class_token) + self.num_patches

    @torch.no_grad()
    def initialize_module(self, module: nn.Module) -> None:
        """Set the own parameters of one of `self.modules()`, not those of the modules in it."""
        if module is self:
            table = sincos_pos_embed(self.width, self.pos_grid)
            self.pos_embed.copy_(table if self.class_token else table[:, 1:])
            if self.class_token:
                nn.init.normal_(self.cls_token, std=0.02)
        elif isinstance(module, RelativeTable):
            nn.init.zeros_(module.table)
        elif isinstance(module, DenseAttention) and module.relative == "decomposed":
            nn.init.zeros_(module.rel_pos_h)
            nn.init.zeros_(module.rel_pos_w)
        elif isinstance(module, LayerScale):
            nn.init.constant_(module.gamma, self.layer_scale or 1.0)
        else:
            super().initialize_module(module)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return the features after `out_blocks`.

        Args:
            images: float [B, 3, H, W], normalised; sides are multiples of the patch size. With
                tables of relative positions it must be the square that the encoder is made for.

        Returns:
            [B, D, H / patch_size, W / patch_size] for each of `out_blocks`.
        """
        size = images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size
        x = self.patch_embed(images.to(self.patch_embed.proj.weight.dtype))
        first = int(self.class_token)
        x = x + resize_grid(self.pos_embed[:, first:], size)
        if self.class_token:
            x = self.prepend_cls_token(x)
        in_window = None if self.rel_pos_window is None else self.rel_pos_window()
        in_image = None if self.rel_pos_global is None else self.rel_pos_global()
        features = {}
        for i, block in enumerate(self.blocks[: max(self.out_blocks) + 1]):
            bias: Any = in_window if block.window else in_image
            x = self.run_block(i, block, x, size, bias)
            if i in self.out_blocks:
                features[i] = x[:, first:].transpose(1, 2).reshape(len(x), -1, *size)
        return [features[i] for i in self.out_blocks]

    def layer_of(self, name: str) -> int:
        """Return the number of a parameter's layer, for layer-wise decay.

        It is 0 for class token, position and patch embedding; k + 1 for block k; depth + 1 for
        shared tables of relative positions, which all blocks use.
        """
        if name in ("cls_token", "pos_embed") or name.startswith("patch_embed."):
            return 0
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        return len(self.blocks) + 1


def _check_blocks(what: str, numbers: Sequence[int], depth: int) -> None:
    wrong = [n for n in numbers if not 0 <= n < depth]
    if wrong or list(numbers) != sorted(set(numbers)):
        raise UserError(
            f"{what} {', '.join(map(str, numbers))} must be rising numbers from 0 to {depth - 1}, "
            f"the blocks of the encoder"
        )
