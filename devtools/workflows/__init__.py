"""The workflows of examples, demo and blueprints: JSON files, as ComfyUI's editor writes them.

`python -m devtools.workflows FILE...`, from the root, opens, saves and draws them.
"""
from devtools import ROOT

FOLDER = ROOT / "example_workflows"
BLUEPRINT_FOLDER = ROOT / "subgraphs"  # where ComfyUI looks for them
DEMO_FOLDER = ROOT / "demo_model" / "workflows"  # demos that the template browser does not show
DEMO = "Repository demo"  # how the names of those begin whose models only the repository has
FIRST = "Start here"  # and of the one for newcomers


def example_paths() -> list:
    """Returns the paths of the examples in the order of the template browser, which
    `nodes/web/templates.js` makes."""
    def place(path):
        return not path.stem.startswith(FIRST), path.stem.startswith(DEMO), path.stem

    return sorted(FOLDER.glob("*.json"), key=place)


def demo_paths() -> list:
    """Returns the paths of the workflows whose models only the repository has."""
    return sorted([*DEMO_FOLDER.glob("*.json"), *FOLDER.glob(f"{DEMO}*.json")],
                  key=lambda path: path.stem)


def blueprint_paths() -> list:
    """Returns the paths of the blueprints."""
    return sorted(BLUEPRINT_FOLDER.glob("*.json"))
