"""The example workflows of full-size models. `python -m devtools.workflows`, from the root, writes them."""
from devtools.server import ROOT
from devtools.workflows import flux, flux_with_pictures, qwen_image, stable_diffusion, video

FOLDER = ROOT / "example_workflows"
WORKFLOWS = tuple(make for family in (flux, flux_with_pictures, stable_diffusion, qwen_image, video)
                  for make in family.WORKFLOWS)
