"""CLIP as the package open_clip has it: its weights are found, read without unpickling, and kept
frozen."""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile, is_zipfile

import torch
from safetensors import SafetensorError
from torch import Tensor

from taming_dist.access import require_readable
from taming_dist.errors import UserError
from taming_dist.formats.strict_json import read_json
from taming_dist.placeholders import refuse_placeholder
from taming_dist.vision import torchvision_models
from taming_dist.weights import digest

EXTRA = "pip install 'taming-dist[clip]'"
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
DEFAULT_WEIGHTS = {"ViT-B-32": "laion2b_s34b_b79k"}  # those that a model has if none are named
SHOWN = 4  # names in a line


class OpenClip:
    """An `ImageTextModel` of open_clip."""

    def __init__(self, network: Any, tokenizer: Any, device: torch.device) -> None:
        self.fingerprint = digest(network.state_dict())
        self._network = network.to(device).eval().requires_grad_(False)
        self._tokenizer, self._device = tokenizer, device
        shown = network.visual.preprocess_cfg
        sides = shown["size"]
        self.size = int(sides if isinstance(sides, int) else sides[0])
        self.mean: Sequence[float] = tuple(shown["mean"])
        self.std: Sequence[float] = tuple(shown["std"])
        self.context = int(tokenizer.context_length)

    def encode_image(self, pictures: Tensor) -> Tensor:
        return self._network.encode_image(pictures)

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self._network.encode_text(tokens)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        return self._tokenizer(list(texts)).to(self._device)

    def is_cut(self, text: str) -> bool:
        # a text that fits is the same with room for one token more
        fitting = self._tokenizer([text], context_length=self.context)
        longer = self._tokenizer([text], context_length=self.context + 1)
        return not fitting.equal(longer[:, : self.context])


def open_clip_model(name: str, weights: str, device: torch.device) -> OpenClip:
    """The model that open_clip calls `name`, with `weights`, a file or a name of its list, which is
    downloaded; or that in the folder `name`, which has a configuration and weights.

    Raises:
        UserError: the package, the model or its weights are not to be had, or do not fit.
    """
    open_clip = _package(name)
    if Path(name).is_dir():
        chosen, options = _of_folder(Path(name), weights)
    elif name in open_clip.list_models():
        chosen, options = name, _of_list(open_clip, name, weights)
    else:
        raise UserError(
            f"clip_model={name}: there is no such folder, and open_clip has no such model: use "
            f"{some(open_clip.list_models())}"
        )
    try:
        network = open_clip.create_model(
            chosen, weights_only=True, pretrained_text=False, require_pretrained=True, **options
        )
        tokenizer = open_clip.get_tokenizer(chosen, context_length=network.context_length)
    except (
        pickle.UnpicklingError,
        SafetensorError,
        RuntimeError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        EOFError,
        OSError,
        ImportError,
    ) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(
            f"clip_model={name}: its weights {options.get('pretrained', '')} do not fit or are "
            f"damaged ({type(error).__name__}: {why}): give those of this model"
        ) from error
    return OpenClip(network, tokenizer, device)


def _package(name: str) -> Any:
    try:
        torchvision_models("CLIP")  # which open_clip imports, where its operators may not load
        import open_clip
    except ImportError as error:
        raise UserError(f"clip_model={name} needs the package open_clip: {EXTRA}") from error
    return open_clip


def _of_folder(folder: Path, weights: str) -> tuple[str, dict[str, Any]]:
    """What open_clip calls a folder, checked, and how it is opened."""
    if weights:
        raise UserError(
            f"clip_weights={weights}: the folder clip_model={folder} has its own, leave it out"
        )
    require_readable(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(
                f"clip_model={folder} has no {name}: give a folder as open_clip saves it, with "
                f"{CONFIG} and {WEIGHTS}"
            )
    record = read_json(folder / CONFIG)
    if not isinstance(record, dict) or not isinstance(record.get("model_cfg"), dict):
        raise UserError(f"{folder / CONFIG} describes no model of open_clip: it has no model_cfg")
    check_weights(folder / WEIGHTS, f"clip_model={folder}")
    return f"local-dir:{folder}", {}


def _of_list(open_clip: Any, name: str, weights: str) -> dict[str, Any]:
    """How a model of open_clip's list is opened: its weights, downloaded if need be, and what they
    were trained with."""
    known = open_clip.list_pretrained_tags_by_model(name)
    weights = weights or DEFAULT_WEIGHTS.get(name, "")
    if weights in known:
        facts = open_clip.get_pretrained_cfg(name, weights)
        try:
            file = open_clip.download_pretrained(facts)
        except Exception as error:  # of several packages, whatever the network makes them raise
            why = " ".join(str(error).split())[:200]
            raise UserError(
                f"clip_weights={weights}: there is no copy of it here, and the download failed "
                f"({why}): give this machine internet access, or clip_weights=FILE.safetensors"
            ) from error
        check_weights(Path(file), f"clip_weights={weights}")
        seen = {key: facts[key] for key in ("mean", "std") if facts.get(key)}
        asked: dict[str, Any] = {"pretrained": file, "force_preprocess_cfg": seen}
        return asked | ({"force_quick_gelu": True} if facts.get("quick_gelu") else {})
    if not weights or not Path(weights).is_file():
        require_readable(weights)
        what = " is missing" if not weights else f"={weights}: there is no such file"
        raise UserError(
            f"clip_weights{what}: give a file (.safetensors or .pt) of the weights of {name}, or "
            f"what open_clip downloads: {some(known)}"
        )
    check_weights(Path(weights), f"clip_weights={weights}")
    return {"pretrained": weights}


def check_weights(file: Path, said: str) -> None:
    """UserError unless a file may be one of plain tensors; `said`: how the user named it."""
    require_readable(file)
    refuse_placeholder(file, "the weights of a model", said)
    if file.suffix not in SUFFIXES:
        raise UserError(f"{said}: {file.name} is no file of weights, give {' or '.join(SUFFIXES)}")
    if file.suffix == ".safetensors":
        return
    fix = "give its weights as .safetensors, or a .pt with tensors alone"
    try:
        packed = is_zipfile(file)
        if packed and any(name.endswith("/constants.pkl") for name in ZipFile(file).namelist()):
            raise UserError(f"{said} is a TorchScript program, which is not run here: {fix}")
        torch.load(file, map_location="cpu", weights_only=True, mmap=packed)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, BadZipFile) as error:
        raise UserError(f"{said} holds more than tensors, or is damaged: {fix}") from error


def some(names: Sequence[str]) -> str:
    """The first of many names, for a line."""
    shown = ", ".join(names[:SHOWN])
    more = len(names) - SHOWN
    return f"{shown} or one of {more} more" if more > 0 else shown or "none"
