"""The node Run on Ray (Featherweight)."""
import os
import sys

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy.cli_args import args
from comfy_api.latest import io

from ..cluster.batch_child import BatchChild
from ..cluster.comfyui_install import MachineError, worker_environment
from ..cluster.ray_connection import THIS_COMPUTER, address_options, is_cluster, named_cluster
from ..cluster.workflow_graph import GraphError, classes, upstream
from ..cluster.workflow_variants import make_variants
from ..ops.stable_names import short_error_name
from .node_text import text_sender

CLUSTER = named_cluster()
# by `is_cluster`; they live until ComfyUI ends, with the models of their workers
CHILDREN = {False: BatchChild(), True: BatchChild(CLUSTER)}


@short_error_name
class RayRunError(RuntimeError):
    """The workers did not draw the pictures; the message says why."""


class RunOnRay(io.ComfyNode):
    """Runs the nodes before it on workers of Ray, once for each seed or text."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FeatherweightRunOnRay",
            display_name="Run on Ray (Featherweight)",
            category="Featherweight",
            description="Generates several images at once. The nodes before this one run on other"
            " GPUs and machines, once for each job, each time with another seed or text. This"
            " ComfyUI loads none of their models.",
            search_aliases=[
                "ray",
                "cluster",
                "distributed",
                "multi gpu",
                "multigpu",
                "parallel",
                "batch",
                "workers",
                "many machines",
                "run on ray",
            ],
            inputs=[
                io.Image.Input(
                    "images",
                    lazy=True,
                    raw_link=True,
                    tooltip="The images of one job. All nodes before this input run on the"
                    " workers.",
                ),
                io.Int.Input(
                    "count",
                    default=4,
                    optional=True,
                    min=1,
                    max=10000,
                    tooltip="How many jobs to run. Each job adds 1 to the seeds before this node;"
                    " the first has the seeds themselves.",
                ),
                io.String.Input(
                    "texts",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="One line for each job; if there are too few, they start over. A line"
                    " replaces %text% in the texts before this node, or the whole prompt if no"
                    " text has %text%. Empty: all jobs keep the workflow's text.",
                ),
                io.Combo.Input(
                    "address",
                    options=address_options(CLUSTER),
                    default=THIS_COMPUTER,
                    optional=True,
                    display_name="run on",
                    tooltip="Where the workers are: on the GPUs of this computer, or on the Ray"
                    " cluster named by FEATHERWEIGHT_RAY_ADDRESS when ComfyUI was started.",
                ),
                io.Int.Input(
                    "workers",
                    default=0,
                    min=0,
                    max=10000,
                    optional=True,
                    tooltip="How many workers run at the same time, each a ComfyUI process. 0: one"
                    " on each GPU, or one on each machine if no machine has a GPU.",
                ),
                io.Float.Input(
                    "idle_minutes",
                    default=10.0,
                    min=0.0,
                    max=10000.0,
                    step=0.5,
                    optional=True,
                    display_name="idle minutes",
                    tooltip="How many minutes idle workers keep their models for the next run. Then"
                    " they end and free the memory.",
                ),
            ],
            outputs=[io.Image.Output(tooltip="The images of all jobs, in order.")],
            hidden=[io.Hidden.dynprompt],
        )

    @classmethod
    def validate_inputs(cls, address=THIS_COMPUTER):
        """Returns an error text for an address that may not be used, before anything runs.

        Older workflows may have the address of the named cluster in place of an option.
        """
        try:
            if address is not None:  # None: another node gives it, and `execute` checks it
                is_cluster(address, CLUSTER)
        except MachineError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls, images, count=4, texts="", address=THIS_COMPUTER, workers=0, idle_minutes=10.0
    ) -> io.NodeOutput:
        try:
            return cls._run(images, count, texts, address, workers, idle_minutes)
        except (MachineError, GraphError) as error:  # with long names, by which Ray finds them
            raise RayRunError(str(error)) from error

    @classmethod
    def _run(cls, images, count, texts, address, workers, idle_minutes) -> io.NodeOutput:
        on_cluster = is_cluster(address, CLUSTER)
        graph = upstream(cls.hidden.dynprompt, images)
        if "FeatherweightRunOnRay" in classes(graph):
            raise GraphError(
                "One Run on Ray is before another, so its workers would wait for other workers."
                " Remove one of them."
            )
        changes = make_variants(graph, count, texts)
        bar = comfy.utils.ProgressBar(count)
        show = text_sender()

        def on_progress(done: int, message: str):
            bar.update_absolute(done)
            show(progress_text(done, count, message))

        on_progress(0, "")
        comfyui = os.path.dirname(folder_paths.__file__)
        all_images = CHILDREN[on_cluster].run(
            {
                "graph": graph,
                "images": images,
                "changes": changes,
                "workers": workers,
                "on_cpu": args.cpu and not on_cluster,
                "idle_seconds": idle_minutes * 60,
            },
            on_progress,
            comfy.model_management.throw_exception_if_processing_interrupted,
            worker_environment(comfyui, sys.argv[1:]),
        )
        return io.NodeOutput(torch.from_numpy(all_images))


def progress_text(done: int, count: int, message: str = "") -> str:
    """Returns the text on the node. message: the latest about a worker, or ""."""
    return f"{done} of {count} done" + (f"\n{message}" if message else "")
