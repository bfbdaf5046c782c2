"""python3 dev.py inspect FILE: what a model file is, as the node Inspect Model File says it."""
import argparse

import devtools.measure  # noqa: F401  the host and the pack

from PIL import Image

from featherweight.loaders.inspect import inspect
from featherweight.loaders.inspect.inspection_chart import inspection_picture
from featherweight.loaders.inspect.inspection_text import inspection_text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="dev.py inspect",
                                     description="Say what a model file or folder is.")
    parser.add_argument(
        "file",
        help="a file or folder: GGUF, safetensors, or as diffusers and transformers save a model")
    parser.add_argument("--reference", metavar="FILE",
                        help="the same model in a more exact file, to measure errors against")
    parser.add_argument("--picture", metavar="OUT.png", help="write the picture there")
    options = parser.parse_args(arguments)
    found = inspect(options.file, options.reference)
    print("\n\n".join(map(inspection_text, found)))
    if options.picture:
        picture = inspection_picture(max(found, key=lambda part: part.memory_bytes))[0]
        Image.fromarray((picture.numpy() * 255).round().astype("uint8")).save(options.picture)
    return 1 if any(part.problem for part in found) else 0


if __name__ == "__main__":
    raise SystemExit(main())
