# SPDX-License-Identifier: Apache-2.0
"""Reading and writing of VidTok weights. Tensors only: no code of a file is run, nor of the classes that it names."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vidkernels import _files, _safetensors
from vidkernels.errors import OptionError, ShapeError
from vidkernels.models.tokenizers.vidtok_config import CONFIGS, VidTokConfig

if TYPE_CHECKING:
    from vidkernels.models.tokenizers.vidtok import VidTok

_WEIGHTS = ("model.safetensors", "diffusion_pytorch_model.safetensors")
_OTHER_WEIGHTS = (*(f"{name}.index.json" for name in _WEIGHTS), "diffusion_pytorch_model.bin")


class _Unread:
    """Stands for an object of a file that is no tensor: options, callbacks and the like of the program that trained."""

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _unpickled(path: Path) -> Any:
    """What torch reads as weights only. Classes and functions of others are never imported nor called.

    Raises:
        Exception: of any kind, for bytes that are no pickle raise whatever the unpickler stumbles over.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:
        # A trainer's own objects beside the tensors. Modules that torch blocks, os and sys, it refuses still.
        others = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(_Unread, name) for name in others]):
            return torch.load(path, map_location="cpu", weights_only=True)


def _entry(path: Path, entries: Sequence[str]) -> Mapping[str, Any]:
    """The first of some entries of a pickled file that holds tensors, or the file itself where it has none of those."""
    try:
        raw = _unpickled(path)
    except Exception as error:
        # Invalid argument is what torch's reader raises for some files that are cut short.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        remedy = "Is it whole? Of old or other formats save the state dict alone: no code of a file is run."
        raise OptionError("path", "a file of tensors", f"{path} ({type(error).__name__})", remedy) from error
    if not isinstance(raw, Mapping):
        found = "an object" if isinstance(raw, _Unread) else f"a {type(raw).__name__}"
        raise OptionError("path", "a file of named tensors", f"{path} ({found})", "Save a model's state_dict().")
    held = [raw[name] for name in entries if name in raw] or [raw]
    for found in held:
        if isinstance(found, Mapping) and any(isinstance(value, Tensor) for value in found.values()):
            if all(isinstance(key, str) for key in found):
                return found
    keys = ", ".join(str(key) for key in list(raw)[:5])
    raise OptionError("path", "a file of named tensors", f"{path}, with {keys or 'nothing'}", f"Or in {entries[0]!r}.")


def weights_of(folder: Path) -> Path:
    """The file of weights in a folder that transformers, diffusers or this package wrote."""
    names = (*_WEIGHTS, *_OTHER_WEIGHTS)
    return next((folder / name for name in names if (folder / name).exists()), folder / _WEIGHTS[0])


def read_tensors(path: Path, entries: Sequence[str] = ("state_dict",)) -> dict[str, Tensor]:
    """Every tensor of a `.ckpt`, `.pt` or `.safetensors` file, of the shards that an `.index.json` lists, or of a folder with such
    a file; the first of `entries` that a file has holds them, if it has one. Names are without wrappers, see `unwrapped`.

    Raises OptionError for a file that is missing or not of tensors.
    """
    path = weights_of(path) if path.is_dir() else path
    if not path.is_file():
        raise OptionError("path", "an existing checkpoint file", str(path))
    if path.name.endswith(".index.json"):
        shards = _read_config(path).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise OptionError("path", "an index with a weight_map", str(path))
        found = [read_tensors(path.parent / name, entries) for name in sorted(set(shards.values()))]
        return {key: value for tensors in found for key, value in tensors.items()}
    raw = _safetensors.read(path)[0] if path.suffix == ".safetensors" else _entry(path, entries)
    return unwrapped(raw)


def unwrapped(raw: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors under the names that a model has without `torch.compile`, FSDP and data parallelism around it."""
    tensors = {key: value for key, value in raw.items() if isinstance(value, Tensor)}
    for wrapper in ("_orig_mod.", "_fsdp_wrapped_module."):
        tensors = {key.replace(wrapper, ""): value for key, value in tensors.items()}
    while tensors and all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    return tensors


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The encoder's and decoder's tensors of a file; losses, discriminator and EMA copies are left out."""
    tensors = read_tensors(path, ("state_dict", "ema", "model"))
    own = {key: value for key, value in tensors.items() if key.startswith(("encoder.", "decoder."))}
    if not own:
        found = ", ".join(map(repr, sorted(tensors)[:3])) or "none"
        raise OptionError("path", "a file of a VidTok, with keys encoder.* and decoder.*", f"{path} with {found}")
    return own


def _name_in(path: Path) -> str | None:
    """The published configuration that a file's or folder's name states, the longest match first."""
    for part in (path.name, path.parent.name):
        for name in sorted(CONFIGS, key=len, reverse=True):
            if re.search(rf"{re.escape(name)}(?![a-z0-9])", part.lower()):
                return name
    return None


def _choose_config(
    path: Path, config: str | VidTokConfig | None, version: str | None, folder: VidTokConfig | None
) -> VidTokConfig:
    if isinstance(config, str):
        config = VidTokConfig.named(config)
    stated = _name_in(path)
    chosen = config or (CONFIGS[stated] if stated else None)
    if chosen is None and folder is not None and (version is not None or not folder.causal):
        chosen = folder
    if chosen is None:
        missing = "config" if folder is None else "version"
        wanted = "a published name or a VidTokConfig" if folder is None else "'1.0' or '1.1'"
        raise OptionError(
            missing,
            wanted,
            f"none, and {path.name!r} does not state one",
            "Versions 1.0 and 1.1 have the same keys but compute different results, so neither is assumed.",
        )
    return chosen if version is None else replace(chosen, version=version)


def _is_floating(tensor: Tensor) -> bool:
    return tensor.dtype.is_floating_point


def check_keys(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str, model: str) -> None:
    """Raise ShapeError that names the first missing, unexpected and differently shaped keys, if there are any, and OptionError for
    one that holds other numbers: a quantized file's integers are no weights."""
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    shapes = [key for key in expected if key in state and state[key].shape != expected[key].shape]
    if not (missing or unexpected or shapes):
        kind = next((key for key in expected if _is_floating(state[key]) != _is_floating(expected[key])), None)
        if kind is not None:
            got = f"{state[kind].dtype} of {where}"
            raise OptionError(kind, f"numbers like {expected[kind].dtype}", got, "The file is damaged or quantized.")
        return
    details = [f"missing {key}" for key in missing[:3]] + [f"unexpected {key}" for key in unexpected[:3]]
    details += [f"{key} is {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}" for key in shapes[:3]]
    counts = f"{len(missing)} missing, {len(unexpected)} unexpected, {len(shapes)} of another shape"
    raise ShapeError(where, f"the keys of {model}", f"{counts}: {'; '.join(details)}", "Name the right configuration.")


def _check_keys(model: VidTok, state: Mapping[str, Tensor], path: Path) -> None:
    check_keys(model.state_dict(), state, str(path), model.config.name)


def _read_config(path: Path) -> dict[str, Any]:
    """`config.json` of a folder."""
    if not path.is_file():
        raise OptionError("folder", "a folder with config.json, as save_pretrained writes it", str(path.parent))
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise OptionError("config", "a JSON file", f"{path} ({error})") from error
    if not isinstance(values, dict):
        raise OptionError("config", "a JSON object", f"{path} (a {type(values).__name__})")
    return values


def _diffusers_config(values: Mapping[str, Any]) -> VidTokConfig:
    """Configuration of a diffusers `AutoencoderVidTok` folder. Its own code computes version 1.1."""
    wanted = ("ch", "is_causal", "num_res_blocks", "regularizer", "z_channels")
    missing = [key for key in wanted if key not in values]
    if missing:
        raise OptionError("config", "the config.json of an AutoencoderVidTok", f"one without {missing[0]}")
    multipliers = tuple(values["ch_mult"])
    last = len(multipliers) - 1
    fsq = values["regularizer"] == "fsq"

    def levels(key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        return default if values.get(key) is None else tuple(values[key])

    return VidTokConfig(
        name="diffusers",
        causal=bool(values["is_causal"]),
        version="1.1" if values["is_causal"] else "1.0",
        regularizer=values["regularizer"],
        z_channels=values["z_channels"],
        levels=(8,) * values["z_channels"] if fsq else (),
        channels=values["ch"],
        channel_multipliers=multipliers,
        residual_blocks=values["num_res_blocks"],
        spatial_down=levels("spatial_ds", tuple(range(last))),
        spatial_up=levels("spatial_us", tuple(range(1, last + 1))),
        temporal_down=levels("tempo_ds", (last - 2, last - 1)),
        temporal_up=levels("tempo_us", (1, 2)),
    )


def load(cls: type[VidTok], path: Path, config: str | VidTokConfig | None, version: str | None) -> VidTok:
    """See `VidTok.from_checkpoint`."""
    folder_config = None
    weights = path
    if path.is_dir():
        weights = weights_of(path)
        values = _read_config(path / "config.json")
        if "channel_multipliers" in values and config is None and version is None:
            return load_pretrained(cls, path)
        folder_config = _diffusers_config(values) if "ch_mult" in values else VidTokConfig.from_dict(values)
    state = read_state_dict(weights)
    chosen = _choose_config(path, config, version, folder_config)
    with torch.device("meta"):
        model = cls(chosen)
    _check_keys(model, state, weights)
    model.load_state_dict(state, assign=True)
    return model


def save(model: VidTok, folder: Path) -> None:
    """See `VidTok.save_pretrained`."""
    folder.mkdir(parents=True, exist_ok=True)
    _files.write_text(folder / "config.json", json.dumps(model.config.to_dict(), indent=1) + "\n")
    state = {key: value.detach() for key, value in model.state_dict().items()}
    _safetensors.write(folder / _WEIGHTS[0], state, {"format": "pt", "version": model.config.version})


def load_pretrained(cls: type[VidTok], folder: Path) -> VidTok:
    """See `VidTok.from_pretrained`."""
    config = VidTokConfig.from_dict(_read_config(folder / "config.json"))
    state = read_state_dict(folder / _WEIGHTS[0])
    with torch.device("meta"):
        model = cls(config)
    _check_keys(model, state, folder / _WEIGHTS[0])
    model.load_state_dict(state, assign=True)
    return model
