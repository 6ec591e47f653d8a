"""From an autoencoder folder to two ONNX files, compared with torch before they appear."""

from __future__ import annotations

import importlib.util
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latent_ae.errors import UserError
from latent_ae.folders import require_free, whole_folder
from latent_ae.frozen import PRECISIONS, FrozenAutoencoder
from latent_ae.onnx_check import compare_with_torch

__all__ = ["DEFAULT_OPSET", "OPSETS", "export_onnx"]

OPSETS = range(18, 24)  # torch writes 18 and up; of later ones 23 is the last that was tried
DEFAULT_OPSET = 18  # op for op the graph of 20; from 21 on GroupNorm is one node
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
FILE_LIMIT = 2**31  # bytes that protobuf puts into one file
RECORD = "latent_ae_onnx.json"
# diffusers' upsampling makes batches of 64 and more contiguous first: torch.export takes that for
# another graph, though what is computed, and the ONNX file, is the same.
TRACED_BATCHES = 63


class _Encoder(nn.Module):
    """Pictures to moments, or to latents where there is no posterior."""

    def __init__(self, network: Any, has_posterior: bool) -> None:
        super().__init__()
        self.network = network
        self.has_posterior = has_posterior

    def forward(self, sample: Tensor) -> Tensor:
        output = self.network.encode(sample, return_dict=False)[0]
        return output.parameters if self.has_posterior else output


class _Decoder(nn.Module):
    """Raw latents to pictures."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, latent_sample: Tensor) -> Tensor:
        return self.network.decode(latent_sample, return_dict=False)[0]


def export_onnx(
    model: str | Path, out: str | Path, *, opset: int = DEFAULT_OPSET, precision: str = "fp32"
) -> dict[str, Any]:
    """Writes the encoder and the decoder of an autoencoder as ONNX, where Optimum looks for them.

    `vae_encoder/model.onnx` maps `sample`, of shape (batch, C, height, width), in [-1, 1], to
    `latent_parameters`, of shape (batch, 2c, height / f, width / f): the posterior's mean before
    its log-variance, not clamped. Without a posterior it gives `latent_sample` of c channels.
    `vae_decoder/model.onnx` maps raw `latent_sample` to `sample`. Batch, height and width are
    dynamic. Each has its `config.json`. onnxruntime runs both on photographs of two sizes and
    batches, and is compared with torch, before the folder is renamed into place.

    Args:
        model: an exported folder, or any image autoencoder of diffusers' on disk.
        out: the folder to make; must not exist yet.
        opset: the version of ONNX' operators, one of `OPSETS`.
        precision: of weights, inputs and outputs: `fp32` or `fp16`.

    Returns:
        What `latent_ae_onnx.json` in the folder says: names, shapes, differences, versions.

    Raises:
        UserError: a package is missing, `model` cannot be loaded or must not run in fp16, `out`
            exists, or onnxruntime computes something else than torch.
    """
    _require_packages()
    if opset not in OPSETS:
        raise UserError(f"opset {opset} is not one of {OPSETS[0]} to {OPSETS[-1]}")
    out = Path(out).absolute()
    require_free(out)
    reference = FrozenAutoencoder(model, device="cpu")
    _require_fp16_is_safe(reference, precision)
    frozen = reference if precision == "fp32" else FrozenAutoencoder(model, "cpu", precision)
    facts = {"opset": opset, "precision": precision, **_facts(frozen)}
    with whole_folder(out) as aside:
        for part in ("encoder", "decoder"):
            _write_half(frozen, part, aside / f"vae_{part}", facts)
        record = {
            "format": 1,
            **facts,
            "files": {part: _described(aside, part) for part in ("encoder", "decoder")},
            "comparison": compare_with_torch(reference, aside, precision),
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("latent_ae", "torch", "diffusers", *PACKAGES)},
            },
        }
        (aside / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    return record


def _require_packages() -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"ONNX needs {', '.join(missing)}, not installed here: pip install 'latent_ae[onnx]'"
        )


def _require_fp16_is_safe(frozen: FrozenAutoencoder, precision: str) -> None:
    if precision == "fp16" and frozen.network.config.get("force_upcast"):
        raise UserError(
            f"{frozen.path} says force_upcast, its activations do not fit into fp16: export it in "
            "fp32, or, where `latent-ae evaluate` finds fp16 safe, set force_upcast to false in "
            "its config.json"
        )


def _facts(frozen: FrozenAutoencoder) -> dict[str, Any]:
    """What whoever holds the files must know, and a reader of the ONNX metadata too."""
    known = frozen.describe()
    names = ("class_name", "weights_sha256", "downsampling", "latent_channels")
    return {**{name: known[name] for name in names}, **frozen.scaling.model_dump()}


def _write_half(frozen: FrozenAutoencoder, part: str, folder: Path, facts: dict[str, Any]) -> None:
    """Traces one half and writes its `model.onnx` and `config.json`."""
    factor, channels, images = frozen.downsampling, frozen.channels, frozen.image_channels
    weights = getattr(frozen.network, part, frozen.network).parameters()
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    if size >= FILE_LIMIT:
        hint = ", or export it in fp16" if frozen.precision == "fp32" else ""
        raise UserError(
            f"the {part} has {size / 1e9:.1f} GB of weights, an ONNX file holds 2{hint}"
        )
    if part == "encoder":
        half, scale = _Encoder(frozen.network, frozen.has_posterior), factor
        shapes = {
            "sample": ["batch", images, "height", "width"],
            "latent_parameters" if frozen.has_posterior else "latent_sample": [
                "batch",
                channels * (1 + frozen.has_posterior),
                # With spaces: Optimum splits there to compute the sizes of what it allocates.
                f"height / {factor}",
                f"width / {factor}",
            ],
        }
    else:
        half, scale = _Decoder(frozen.network), 1
        shapes = {
            "latent_sample": ["batch", channels, "latent_height", "latent_width"],
            "sample": ["batch", images, f"latent_height * {factor}", f"latent_width * {factor}"],
        }
    example = torch.zeros(2, images if part == "encoder" else channels, 8 * scale, 12 * scale)
    example = example.to(PRECISIONS[frozen.precision])
    # torch's optimizer takes DC's 1e-15 for zero and drops it: its attention would divide 0 by 0.
    optimize = frozen.class_name != "AutoencoderDC"
    try:
        proto = _trace(half.eval(), example, scale, facts["opset"], optimize)
    except Exception as error:  # torch's exporter wraps whatever a network does
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"torch cannot write the {part} of {frozen.class_name} as ONNX: {reason}"
        ) from error
    _name(proto, shapes, facts)
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(proto.SerializeToString(deterministic=True))
    # All keys, also those that the model's own file leaves to diffusers: Optimum takes another
    # scaling_factor where there is none.
    config = json.loads(frozen.network.to_json_string())
    config.pop("_name_or_path", None)  # means nothing on another machine
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _trace(half: nn.Module, example: Tensor, multiple: int, opset: int, optimize: bool) -> Any:
    """The `onnx.ModelProto` of a half for any batch, height and width.

    Args:
        half: takes one tensor and gives one.
        example: of shape (B, C, H, W).
        multiple: of which H and W are multiples.
        opset: the version of ONNX' operators.
        optimize: whether torch's exporter simplifies the graph.
    """
    dim = torch.export.Dim
    dynamic = {
        0: dim("batch", min=1, max=TRACED_BATCHES),
        2: multiple * dim("rows"),
        3: multiple * dim("columns"),
    }
    with torch.no_grad():
        captured = torch.export.export(half, (example,), dynamic_shapes=(dynamic,))
        program: Any = torch.onnx.export(
            captured, dynamo=True, opset_version=opset, verbose=False, optimize=optimize
        )
    return program.model_proto


def _name(proto: Any, shapes: dict[str, list[int | str]], facts: dict[str, Any]) -> None:
    """Puts names, symbolic sizes and facts into a model, and takes the exporter's traces out."""
    graph = proto.graph
    renamed = {}
    for value, (name, shape) in zip([*graph.input, *graph.output], shapes.items(), strict=True):
        renamed[value.name] = name
        value.name = name
        del value.type.tensor_type.shape.dim[:]
        for size in shape:
            key = "dim_param" if isinstance(size, str) else "dim_value"
            value.type.tensor_type.shape.dim.add(**{key: size})
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [renamed.get(name, name) for name in names]
        del node.metadata_props[:]  # stack traces, with the paths of this machine
        node.doc_string = ""
    for value in [*graph.input, *graph.output, *graph.initializer]:
        del value.metadata_props[:]
    del graph.value_info[:], graph.metadata_props[:], proto.metadata_props[:]
    proto.producer_name, proto.producer_version = "latent_ae", version("latent_ae")
    for key, value in facts.items():
        text = value if isinstance(value, str) else json.dumps(value)
        proto.metadata_props.add(key=f"latent_ae.{key}", value=text)


def _described(folder: Path, part: str) -> dict[str, Any]:
    """Names and shapes as they can be read back from the file."""
    import onnx

    file = folder / f"vae_{part}" / "model.onnx"
    onnx.checker.check_model(str(file), full_check=True)
    proto = onnx.load(file)
    tell = {"path": str(file.relative_to(folder)), "bytes": file.stat().st_size}
    for kind in ("input", "output"):
        (value,) = getattr(proto.graph, kind)
        dims = value.type.tensor_type.shape.dim
        tell[kind] = {"name": value.name, "shape": [d.dim_param or d.dim_value for d in dims]}
    return tell
