"""Node ids of other packs, with the same inputs in the same order, so that shared workflows run.

Each file is a pack. Its `NODE_CONFIG` is a table of the pack's ids and of what differs between
them. ComfyUI Manager reads the ids there, and `make_nodes` makes the classes. All are deprecated
nodes, which the editor's search leaves out.

Scripts and other packs call these classes as Python:
`NODE_CLASS_MAPPINGS["UnetLoaderGGUF"]().load_unet(...)`. So the method that runs has the original
name and parameters, returns a tuple, and is the `FUNCTION`.
"""
from collections.abc import Callable, Mapping

from comfy_api.latest import io

from ..file_inputs import validate_main

FURTHER_CLIPS = ("clip_name2", "clip_name3", "clip_name4")


class LegacyNode:
    """Base of the classes in the tables, next to the host's own base class.

    A subclass defines the method that its `FUNCTION` names.

    Attributes:
        inputs: called on the class, makes the inputs.
        outputs: what makes the outputs.
        folders: keys of the folders that its files lie in.
    """

    FUNCTION: str
    node_id: str
    display_name: str
    description: str
    inputs: Callable[[], list]
    outputs: tuple = (io.Model.Output,)
    folders: tuple[str, ...]
    category = "Featherweight/legacy"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=cls.node_id,
            display_name=cls.display_name,
            category=cls.category,
            description=cls.description,
            is_deprecated=True,
            inputs=cls.inputs(),
            outputs=[output() for output in cls.outputs],
        )

    @classmethod
    def validate_inputs(
        cls, unet_name=None, gguf_name=None, ckpt_name=None, clip_name=None, clip_name1=None
    ):
        """Checks the main file, which has one of these names."""
        names = (unet_name, gguf_name, ckpt_name, clip_name, clip_name1)
        name = next((name for name in names if name is not None), None)
        return validate_main(name, FURTHER_CLIPS, cls.folders)

    @classmethod
    def execute(cls, *args, **inputs) -> tuple:
        return getattr(cls, cls.FUNCTION)(*args, **inputs)

    @classmethod
    def GET_NODE_INFO_V1(cls) -> dict:
        """Returns what the host answers at /object_info.

        The type of an input with options is the list of its options, as in the original packs,
        because scripts read the names of files there. The host itself reads `INPUT_TYPES`, in which
        it stays "COMBO": an output of that type can be connected to it.
        """
        info = super().GET_NODE_INFO_V1()
        for inputs in info["input"].values():
            for name, (kind, *settings) in inputs.items():
                if kind == io.Combo.io_type:
                    options = settings[0].pop("options")
                    settings[0].pop("multiselect", None)
                    inputs[name] = (options, *settings)
        return info


def make_node(
    module: str, node_id: str, base: type[LegacyNode], display_name: str, **attributes
) -> type[io.ComfyNode]:
    """Makes the class of one id, as if it were written in the module of that name."""
    attributes |= {"__module__": module, "node_id": node_id, "display_name": display_name}
    return type(node_id, (base, io.ComfyNode), attributes)


def make_nodes(
    module: str, config: Mapping[str, tuple], **attributes
) -> dict[str, type[io.ComfyNode]]:
    """Makes the classes of a table with id: (base class, title, inputs, description)."""
    return {
        node_id: make_node(
            module, node_id, base, title, inputs=inputs, description=description, **attributes
        )
        for node_id, (base, title, inputs, description) in config.items()
    }
