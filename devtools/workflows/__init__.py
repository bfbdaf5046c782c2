"""The example workflows and the blueprints. `python -m devtools.workflows`, from the root, writes
them."""
from devtools import ROOT
from devtools.workflows import (
    blueprints,
    demo,
    flux,
    flux_with_pictures,
    packing,
    qwen_image,
    stable_diffusion,
    video,
)

FOLDER = ROOT / "example_workflows"
BLUEPRINT_FOLDER = ROOT / "subgraphs"  # where ComfyUI looks for them
BLUEPRINTS = blueprints.BLUEPRINTS
WORKFLOWS = tuple(
    make
    for family in (demo, flux, flux_with_pictures, packing, stable_diffusion, qwen_image, video)
    for make in family.WORKFLOWS
)
