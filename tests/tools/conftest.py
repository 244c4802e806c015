"""The layout of the original's checkpoints, written down by hand: names and shapes."""

import importlib.util
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

TOOLS = Path(__file__).parents[2] / "tools"

Shapes = dict[str, tuple[int, ...]]


def convolution(name: str, out: int, channels: int, kernel: int, bias: bool = True) -> Shapes:
    weight: Shapes = {f"{name}.weight": (out, channels, kernel, kernel)}
    return weight | ({f"{name}.bias": (out,)} if bias else {})


def pair(name: str, size: int) -> Shapes:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def linear(name: str, out: int, width: int) -> Shapes:
    return {f"{name}.weight": (out, width), f"{name}.bias": (out,)}


def residual(name: str, channels: int, out: int) -> Shapes:
    shapes = pair(f"{name}.norm1", channels) | convolution(f"{name}.conv1", out, channels, 3)
    shapes |= pair(f"{name}.norm2", out) | convolution(f"{name}.conv2", out, out, 3)
    shortcut = convolution(f"{name}.nin_shortcut", out, channels, 1)
    return shapes | (shortcut if out != channels else {})


def attention(name: str, channels: int) -> Shapes:
    shapes = pair(f"{name}.norm", channels)
    for part in ("q", "k", "v", "proj_out"):
        shapes |= convolution(f"{name}.{part}", channels, channels, 1)
    return shapes


def middle(name: str, channels: int) -> Shapes:
    shapes = residual(f"{name}.mid.block_1", channels, channels)
    shapes |= attention(f"{name}.mid.attn_1", channels)
    return shapes | residual(f"{name}.mid.block_2", channels, channels)


def first_stage(
    images: int = 3,
    ch: int = 32,
    ch_mult: tuple[int, ...] = (1, 2),
    blocks: int = 1,
    attended: tuple[int, ...] = (1,),
    z: int = 8,
    dim: int = 4,
    codes: int = 12,
) -> Shapes:
    """VQModel without `loss.*`; `attended` are the levels with attention."""
    shapes = convolution("encoder.conv_in", ch, images, 3)
    width, last = ch, len(ch_mult) - 1
    for level, multiplier in enumerate(ch_mult):
        name = f"encoder.down.{level}"
        for block in range(blocks):
            shapes |= residual(f"{name}.block.{block}", width, ch * multiplier)
            width = ch * multiplier
            shapes |= attention(f"{name}.attn.{block}", width) if level in attended else {}
        if level < last:
            shapes |= convolution(f"{name}.downsample.conv", width, width, 3)
    shapes |= middle("encoder", width) | pair("encoder.norm_out", width)
    shapes |= convolution("encoder.conv_out", z, width, 3)
    shapes |= convolution("decoder.conv_in", width, z, 3) | middle("decoder", width)
    for level in range(last, -1, -1):
        name = f"decoder.up.{level}"
        for block in range(blocks + 1):
            shapes |= residual(f"{name}.block.{block}", width, ch * ch_mult[level])
            width = ch * ch_mult[level]
            shapes |= attention(f"{name}.attn.{block}", width) if level in attended else {}
        if level:
            shapes |= convolution(f"{name}.upsample.conv", width, width, 3)
    shapes |= pair("decoder.norm_out", width) | convolution("decoder.conv_out", images, width, 3)
    shapes |= {"quantize.embedding.weight": (codes, dim)}
    return shapes | convolution("quant_conv", dim, z, 1) | convolution("post_quant_conv", z, dim, 1)


def discriminator(width: int = 8) -> Shapes:
    """PatchGAN of three layers with BatchNorm."""
    name, sizes = "loss.discriminator.main", (width, 2 * width, 4 * width, 8 * width)
    shapes = convolution(f"{name}.0", width, 3, 4)
    for index, (size, out) in zip((2, 5, 8), zip(sizes, sizes[1:], strict=False), strict=True):
        shapes |= convolution(f"{name}.{index}", out, size, 4, bias=False)
        shapes |= pair(f"{name}.{index + 1}", out)
        for statistic in ("running_mean", "running_var"):
            shapes[f"{name}.{index + 1}.{statistic}"] = (out,)
        shapes[f"{name}.{index + 1}.num_batches_tracked"] = ()
    return shapes | convolution(f"{name}.11", 1, sizes[-1], 4)


def perceptual(width: int = 2) -> Shapes:
    """LPIPS on VGG16."""
    name = "loss.perceptual_loss"
    shapes: Shapes = {f"{name}.scaling_layer.{kind}": (1, 3, 1, 1) for kind in ("shift", "scale")}
    slices = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
    for number, layers in enumerate(slices):
        shapes[f"{name}.lin{number}.model.1.weight"] = (1, width, 1, 1)
        for layer in layers:
            shapes |= convolution(f"{name}.net.slice{number + 1}.{layer}", width, width, 3)
    return shapes


def gpt(vocab: int = 12, block: int = 16, layers: int = 2, width: int = 8) -> Shapes:
    shapes: Shapes = {"tok_emb.weight": (vocab, width), "pos_emb": (1, block, width)}
    for layer in range(layers):
        name = f"blocks.{layer}"
        shapes |= pair(f"{name}.ln1", width) | pair(f"{name}.ln2", width)
        for part in ("key", "query", "value", "proj"):
            shapes |= linear(f"{name}.attn.{part}", width, width)
        shapes[f"{name}.attn.mask"] = (1, 1, block, block)
        shapes |= linear(f"{name}.mlp.0", 4 * width, width)
        shapes |= linear(f"{name}.mlp.2", width, 4 * width)
    return shapes | pair("ln_f", width) | {"head.weight": (vocab, width)}


def fill(shapes: Shapes) -> dict[str, Tensor]:
    """Random tensors of these shapes; masks are causal, counts are integers."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        tensors[name] = torch.randn(shape, generator=generator) * 0.1
        if name.endswith("attn.mask"):
            tensors[name] = torch.ones(shape).tril()
        elif name.endswith("num_batches_tracked"):
            tensors[name] = torch.zeros(shape, dtype=torch.int64)
    return tensors


class Original:
    """What the original writes, by the names of its classes."""

    fill = staticmethod(fill)
    first_stage = staticmethod(first_stage)
    discriminator = staticmethod(discriminator)
    perceptual = staticmethod(perceptual)

    @staticmethod
    def vqmodel(**sizes: Any) -> dict[str, Tensor]:
        return fill(first_stage(**sizes))

    @staticmethod
    def net2net(**sizes: Any) -> dict[str, Tensor]:
        """With a first stage of 2 pixels per code and 12 codes."""
        shapes = {f"first_stage_model.{name}": shape for name, shape in first_stage().items()}
        return fill(shapes | {f"transformer.{name}": shape for name, shape in gpt(**sizes).items()})

    @staticmethod
    def condition(labels: int | None = 5, images: int = 1, **sizes: Any) -> dict[str, Tensor]:
        """The VQGAN of a condition: VQSegmentationModel with its colours, or VQModel."""
        shapes = first_stage(images=labels or images, **sizes)
        shapes |= {"colorize": (3, labels, 1, 1)} if labels else {}
        return {f"cond_stage_model.{name}": value for name, value in fill(shapes).items()}

    @staticmethod
    def permuter(places: list[int]) -> dict[str, Tensor]:
        forward = torch.tensor(places)
        indices = {"forward": forward, "backward": forward.argsort()}
        return {f"permuter.{name}_shuffle_idx": value for name, value in indices.items()}


@pytest.fixture
def original() -> type[Original]:
    return Original


@pytest.fixture
def tool(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str]]:
    """Runs a tool's main function and gives what it printed."""

    def run(main: Callable[[list[str]], None], *arguments: object) -> str:
        main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return run


@pytest.fixture
def convert_whole(tmp_path: Path, tool: Callable[..., str]) -> Callable[..., str]:
    """Writes a file with just these contents and imports it into tmp_path/out."""
    import_checkpoint = runpy.run_path(str(TOOLS / "import_checkpoint.py"))["main"]

    def run(contents: dict[str, Any], *options: object) -> str:
        path = tmp_path / "last.ckpt"
        torch.save(contents, path)
        return tool(import_checkpoint, path, "--out", tmp_path / "out", *options)

    return run


@pytest.fixture
def convert(convert_whole: Callable[..., str]) -> Callable[..., str]:
    """Writes tensors as lightning does and imports them into tmp_path/out."""

    def run(tensors: dict[str, Tensor], *options: object, **beside: Any) -> str:
        contents = {"epoch": 3, "global_step": 7, "state_dict": tensors} | beside
        return convert_whole(contents, *options)

    return run


def describe(folder: Path, params: dict[str, Any], **train: Any) -> Path:
    """The YAML file of a model with these parameters, and those of its training data."""
    path = folder / "project.yaml"
    model = {"target": "not.to.be.Imported", "params": params}
    data = {"target": "main.DataModuleFromConfig", "params": {"train": {"params": train}}}
    path.write_text(yaml.safe_dump({"model": model, "data": data}))
    return path


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """A tool as a module, by its name."""

    def call(name: str) -> Any:
        monkeypatch.syspath_prepend(str(TOOLS))
        spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return call
