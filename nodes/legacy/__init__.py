"""Node ids of other packs, with the same inputs in the same order, so that shared workflows run.

Each file with a `NODE_CONFIG` is a pack: a table of the pack's ids and of what differs between
them, whose inputs are rows of `inputs.py`. ComfyUI Manager reads the ids there, and `make_nodes`
makes the classes. All are deprecated nodes, which the editor's search leaves out.

Scripts and other packs call these classes as Python:
`NODE_CLASS_MAPPINGS["UnetLoaderGGUF"]().load_unet(...)`. So the method that runs has the original
name and takes the original's parameters, returns a tuple, and is the `FUNCTION`.
"""
import inspect
from collections.abc import Mapping

from comfy_api.latest import io

from .inputs import INPUTS, make_inputs


class LegacyNode:
    """Base of the classes in the tables, next to the host's own base class.

    A subclass defines `run`, which gets the node's files, then the other inputs that have an effect
    by name, and returns a tuple.

    Attributes:
        keys: of the inputs, of `inputs.INPUTS`, with spaces between them.
        also: keys of what callers of the method may pass too.
        outputs: what makes the outputs.
    """

    FUNCTION: str
    node_id: str
    display_name: str
    description: str
    keys: str
    also: str = ""
    outputs: tuple = (io.Model.Output,)
    category = "Featherweight/legacy"

    @classmethod
    def inputs(cls) -> list:
        return make_inputs(cls.keys)

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
    def execute(cls, *args, **inputs) -> tuple:
        return getattr(cls, cls.FUNCTION)(*args, **inputs)

    @classmethod
    def GET_NODE_INFO_V1(cls) -> dict:
        """Returns what the host answers at /object_info.

        The type of an input with options is the list of its options, as in the original packs,
        because scripts read the names of files there. The host itself reads `INPUT_TYPES`, in which
        it stays "COMBO": an output of that type can be connected to it.
        """
        info = super().GET_NODE_INFO_V1()  # pyright: ignore[reportAttributeAccessIssue]  the host's
        for inputs in info["input"].values():
            for name, (kind, *settings) in inputs.items():
                if kind == io.Combo.io_type:
                    options = settings[0].pop("options")
                    settings[0].pop("multiselect", None)
                    inputs[name] = (options, *settings)
        return info


def _method(keys: list[str]) -> classmethod:
    """Makes the method of a node with these inputs, which calls `run`."""
    rows = {key.partition(":")[0]: INPUTS[key] for key in keys}

    def method(cls, *args, **inputs) -> tuple:
        given = method.__signature__.bind(cls, *args, **inputs).arguments
        files = [value for name, value in given.items() if name in rows and rows[name].file]
        return cls.run(*files, **{
            name: value for name, value in given.items()
            if name in rows and not rows[name].file and not rows[name].unused
        })

    parameter, kind = inspect.Parameter, inspect.Parameter.POSITIONAL_OR_KEYWORD
    method.__signature__ = inspect.Signature(
        [parameter("cls", kind), *(parameter(name, kind, default=None) for name in rows)])
    return classmethod(method)


def make_node(
    module: str, node_id: str, base: type[LegacyNode], function: str, title: str, keys: str,
    **attributes
) -> type[io.ComfyNode]:
    """Makes the class of one id, as if it were written in the module of that name.

    Args:
        function: name of the method that scripts call.
        title, keys: of the node and its inputs, as in `LegacyNode`.
        attributes: further ones of the class.
    """
    attributes |= {
        "__module__": module, "node_id": node_id, "display_name": title, "keys": keys,
        "FUNCTION": function,
        function: _method(list(dict.fromkeys([*keys.split(), *base.also.split()])))
    }
    return type(node_id, (base, io.ComfyNode), attributes)


def make_nodes(
    module: str, config: Mapping[str, tuple], **attributes
) -> dict[str, type[io.ComfyNode]]:
    """Makes the classes of a table with id: (base class, method, title, inputs, description)."""
    return {
        node_id: make_node(module, node_id, *row, description=description, **attributes)
        for node_id, (*row, description) in config.items()
    }
