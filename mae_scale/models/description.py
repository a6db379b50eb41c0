"""Facts that lie beside weights and exports: their architecture, crop and classes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mae_scale.config.sizes import ImageSize, plain_size, sides
from mae_scale.config.yaml_files import parse_yaml
from mae_scale.errors import UserError
from mae_scale.files import read_file
from mae_scale.models.hugging_face import StateDict
from mae_scale.models.mae import MODELS, architecture
from mae_scale.models.weights import ratio_of, read_json, sizes_of

CARD, CONFIG, PREPROCESSOR = "README.md", "config.json", "preprocessor_config.json"
FACTS = "mae_scale"  # key of the front matter of a model card, with what `Description` holds
_MOST_CARD = 1 << 20  # bytes
_SIZES = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio",
          "decoder_num_heads")  # fmt: skip
# Switches of a masked autoencoder that its weights do not show, and the values that each may have;
# a type allows all its values that `_is_allowed` does.
_SWITCHES: dict[str, Any] = {
    "norm_pix_loss": bool,
    "mask_ratio": float,
    "mask_sampling": ("random", "block", "grid"),
    "mask_tokens_in_encoder": bool,
    "target": ("pixels", "pca", "tokens"),
    "pca_components": int,
    "vocabulary_size": int,
}
_HUGGING_FACE = {
    "image_size": "img_size",
    "patch_size": "patch_size",
    "hidden_size": "embed_dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
    "decoder_num_attention_heads": "decoder_num_heads",
}


@dataclass(frozen=True)
class Description:
    """Facts about weights that their tensors do not show; an unknown fact is None or empty."""

    name: str | None = None
    """Name of one of `mae.MODELS`."""
    sizes: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of `build_mae`; `encoder_sizes` are those of `build_classifier`."""
    crop_ratio: float | None = None
    """Share of the short side that the centre crop of an evaluation covers."""
    classes: list[str] = field(default_factory=list)
    """Names of the outputs, in order."""
    switches: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `build_mae`: its target and its masking."""
    mean: tuple[float, ...] | None = None
    """Mean of each band of the images, for values from 0 to 1."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each band."""
    value_range: Any = None
    """Values of the images that become black and white, as in `Bands.value_range`."""

    def sizes_for(self, state: StateDict, decoder: bool = False) -> dict[str, Any]:
        """Return the sizes of the model that weights belong to, as arguments of `build_classifier`.

        Shapes of the weights count more than the description. Only the height and width of images
        cannot be told from shapes: the described ones count if they have as many patches.

        Args:
            state: the weights.
            decoder: whether the sizes are for `build_mae`, with those of the decoder.
        """
        shown, table = sizes_of(state), state.get("pos_embed")
        if "img_size" in shown and "img_size" in self.sizes and table is not None:
            height, width = (side // shown["patch_size"] for side in sides(self.sizes["img_size"]))
            if height * width == table.shape[1] - 1:
                del shown["img_size"]
        sizes = self.sizes | shown
        return {key: v for key, v in sizes.items() if decoder or not key.startswith("decoder_")}

    def arguments(
        self,
        path: str | Path,
        state: StateDict,
        *,
        name: str | None = None,
        num_heads: int | None = None,
        decoder_num_heads: int | None = None,
        decoder: bool = False,
    ) -> tuple[str, dict[str, Any]]:
        """Return the architecture and the sizes of the model that weights belong to.

        Args:
            path: where the weights come from, for messages.
            state: the weights.
            name, num_heads, decoder_num_heads: architecture and attention heads that the user
                names; None: those of the description, or else of the architecture.
            decoder: whether the sizes are for `build_mae`, with those of the decoder.

        Raises:
            UserError: nothing names the architecture or the heads, or the description says another
                number of heads than the user.
        """
        name = name or self.name
        if name is None:
            raise UserError(f"{path} is no run folder and does not say what it is: --model NAME")
        sizes, usual = self.sizes_for(state, decoder), architecture(name)
        given = {"": num_heads, "decoder_": decoder_num_heads} if decoder else {"": num_heads}
        for stack, heads in given.items():
            key, width = f"{stack}num_heads", f"{stack}embed_dim"
            if heads is not None:
                if self.sizes.get(key, heads) != heads:
                    raise UserError(f"--{key} {heads}: {path} has {self.sizes[key]}, as it says")
                sizes[key] = heads
            elif key not in sizes and sizes.get(width, usual[width]) != usual[width]:
                raise UserError(
                    f"{path} has {width} {sizes[width]}, {name} has {usual[width]}, and weights do "
                    f"not show their number of attention heads: --{key} N"
                )
        return name, sizes


def describe(path: str | Path) -> Description:
    """Read the facts that lie beside weights: in the model card of an export, or in config.json.

    Args:
        path: file or folder of weights.

    Raises:
        UserError: config.json or preprocessor_config.json exists, but holds no record.
    """
    path = Path(path)
    card = path / CARD if path.is_dir() else path.with_suffix(".md")
    config = _json(path / CONFIG) if path.is_dir() else {}
    theirs = Description()
    if "architecture" in config:
        theirs = _of_timm(config)
    elif "hidden_size" in config:
        theirs = _of_hugging_face(config, _json(path / PREPROCESSOR))
    facts = _front_matter(card).get(FACTS)
    if not isinstance(facts, dict):
        return theirs
    return Description(
        facts["architecture"] if facts.get("architecture") in MODELS else theirs.name,
        theirs.sizes | _numbers(facts),
        _ratio(facts.get("crop_pct")) or theirs.crop_ratio,
        theirs.classes or _names(facts.get("classes")),
        theirs.switches | _switches(facts),
        _values(facts.get("mean")) or theirs.mean,
        _values(facts.get("std")) or theirs.std,
        _range(facts.get("value_range")),
    )


def facts_of(
    name: str,
    model: Any,
    *,
    crop_ratio: float | None = None,
    switches: Mapping[str, Any] = {},
    **more: Any,
) -> dict[str, Any]:
    """Collect the facts for the card of an export, from which `describe` reads them.

    Args:
        name: name of the architecture.
        model: model to export; it may be on the meta device.
        crop_ratio: share of the short side that evaluation crops; None: there is no evaluation.
        switches: settings of a masked autoencoder, of which those of `Description.switches` count.
        more: facts that go into the card as they are: classes, and the attributes of `Bands`.
    """
    encoder = getattr(model, "backbone", model)
    size = plain_size(encoder.patch_embed.img_size)
    facts: dict[str, Any] = {
        "architecture": name,
        "img_size": size if isinstance(size, int) else list(size),
        "num_heads": encoder.blocks[0].attn.num_heads,
    }
    if decoder := getattr(model, "decoder_blocks", None):
        facts["decoder_num_heads"] = decoder[0].attn.num_heads
        facts |= _switches(switches)
    if crop_ratio is not None:
        facts["crop_pct"] = crop_ratio
    return facts | more


def _of_timm(config: Mapping[str, Any]) -> Description:
    """Read the config.json that timm writes to the Hub."""
    size = re.match(r"vit_(\w+?)_patch(\d+)", str(config["architecture"]))
    names = [name for name in MODELS if size and f"_{size[1]}_" in name]
    preprocessing = config.get("pretrained_cfg")
    preprocessing = preprocessing if isinstance(preprocessing, dict) else config
    arguments = config.get("model_args")
    return Description(
        names[0] if names else None,
        _numbers(arguments if isinstance(arguments, dict) else {}),
        _ratio(preprocessing.get("crop_pct")),
        _names(config.get("label_names")),
        mean=_values(preprocessing.get("mean")),
        std=_values(preprocessing.get("std")),
    )


def _of_hugging_face(config: Mapping[str, Any], processor: Mapping[str, Any]) -> Description:
    """Read the config.json of a ViT or ViTMAE, and that of the processor of its images."""
    sizes = _numbers({ours: config.get(theirs) for theirs, ours in _HUGGING_FACE.items()})
    hidden, width = config.get("intermediate_size"), config["hidden_size"]
    if isinstance(hidden, int) and isinstance(width, int) and width and hidden != 4 * width:
        sizes["mlp_ratio"] = ratio_of(hidden, width)
    like = [name for name, usual in MODELS.items() if usual["embed_dim"] == width]
    labels = config.get("id2label")
    labels = labels if isinstance(labels, dict) else {}
    names = [labels.get(str(number)) for number in range(len(labels))]
    if names == [f"LABEL_{number}" for number in range(len(names))]:  # the defaults of transformers
        names = []
    return Description(
        like[0] if like else "mae_vit_base_patch16",  # `sizes` replaces the rest
        sizes,
        _ratio_of_processor(processor),
        _names(names),
        _switches(config),
        _values(processor.get("image_mean")),
        _values(processor.get("image_std")),
    )


def _ratio_of_processor(processor: Mapping[str, Any]) -> float | None:
    size, crop = processor.get("size"), processor.get("crop_size")
    if not processor.get("do_center_crop") or not isinstance(size, dict):
        return None
    short = size.get("shortest_edge")
    crop = crop.get("height") if isinstance(crop, dict) else crop
    if not (isinstance(short, int) and isinstance(crop, int) and 0 < crop <= short):
        return None
    # A hair less, so that int(crop / ratio) is this short side again whatever is rounded.
    return _ratio(crop / short * (1 - 1e-9))


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {
        key: values[key]
        for key in _SIZES
        if isinstance(values.get(key), (int, float)) and values[key] > 0
    }
    size = _image_size(values.get("img_size"))
    return sizes if size is None else {"img_size": size, **sizes}


def _image_size(value: Any) -> ImageSize | None:
    both = value if isinstance(value, (list, tuple)) else [value, value]
    if len(both) == 2 and all(type(side) is int and 0 < side < 1 << 20 for side in both):
        return plain_size(both)
    return None


def _switches(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: values[key]
        for key, allowed in _SWITCHES.items()
        if key in values and _is_allowed(values[key], allowed)
    }


def _is_allowed(value: Any, allowed: Any) -> bool:
    if isinstance(allowed, tuple):
        return value in allowed
    if type(value) is not allowed:
        return False
    return allowed is bool or (0 < value < 1 if allowed is float else 0 < value < 1 << 20)


def _values(value: Any) -> tuple[float, ...] | None:
    """Return a list of finite numbers as a tuple; None for anything else."""
    if not isinstance(value, (list, tuple)) or not value:
        return None
    if not all(type(v) in (int, float) and abs(v) < 1e30 for v in value):
        return None
    return tuple(float(v) for v in value)


def _range(value: Any) -> Any:
    """Return a pair of numbers that rise, or a pair for each band; None for anything else."""
    if isinstance(value, list) and value and all(isinstance(pair, list) for pair in value):
        pairs = [_range(pair) for pair in value]
        return None if None in pairs else tuple(pairs)
    pair = _values(value)
    return pair if pair is not None and len(pair) == 2 and pair[0] < pair[1] else None


def _ratio(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and 0 < value <= 1 else None


def _names(value: Any) -> list[str]:
    is_list = isinstance(value, list) and all(isinstance(name, str) for name in value)
    return value if is_list else []


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _front_matter(card: Path) -> dict[str, Any]:
    """Read the YAML at the head of a card, between lines of dashes; empty where there is none."""
    try:
        found = re.match(rb"---\n(.*?)\n---\n", read_file(card, _MOST_CARD), re.DOTALL)
        content = parse_yaml(found[1]) if found else {}
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
