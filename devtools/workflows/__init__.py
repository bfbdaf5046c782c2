"""The workflows of examples, demo and blueprints: JSON files, as ComfyUI's editor writes them.

`python -m devtools.workflows FILE...`, from the root, opens and saves them.
"""
from devtools import ROOT

FOLDER = ROOT / "example_workflows"
BLUEPRINT_FOLDER = ROOT / "subgraphs"  # where ComfyUI looks for them
DEMO_FOLDER = ROOT / "demo_model" / "workflows"  # whose models only the repository has
DEMO = "Repository demo"  # how their names begin
FIRST = "Start here"  # how the name of the example for newcomers begins


def example_paths() -> list:
    """Returns the paths of the examples in the order of the template browser, which
    `nodes/web/templates.js` makes."""
    return sorted(FOLDER.glob("*.json"),
                  key=lambda path: (not path.stem.startswith(FIRST), path.stem))


def demo_paths() -> list:
    """Returns the paths of the workflows whose models only the repository has."""
    return sorted(DEMO_FOLDER.glob("*.json"))


def blueprint_paths() -> list:
    """Returns the paths of the blueprints."""
    return sorted(BLUEPRINT_FOLDER.glob("*.json"))
