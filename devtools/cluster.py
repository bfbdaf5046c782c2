"""Ray clusters of several nodes on this machine, each with a ComfyUI folder, models and pack of its
own."""
import contextlib
import logging
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from devtools import ROOT, product_module
from devtools.files import demo_files
from devtools.host import server

if TYPE_CHECKING:
    from ray._private.node import Node
    from ray.cluster_utils import Cluster

MODEL = demo_files.MODELS["Q4_K"]
HOUSES = ("red", "yellow", "blue", "purple", "pink", "white")
TREES, GROUNDS, HOURS = (
    ("a pine", "an oak", "a palm"),
    ("grass", "snow", "sand"),
    ("noon", "dusk", "dawn", "night"),
)
# Ray on one machine, without usage statistics, metrics and workers started in advance. A dead node
# is noticed within seconds; a slow one has 10 s for each answer. With the niceness that
# Ray gives workers, 15, other tests leave them almost no processor time.
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_METRICS_COLLECTION": "0", "RAY_DEDUP_LOGS": "0",
    "RAY_prestart_worker_first_driver": "0", "RAY_memory_monitor_refresh_ms": "0",
    "RAY_health_check_period_ms": "300", "RAY_health_check_timeout_ms": "10000",
    "RAY_worker_niceness": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "PYTHONDONTWRITEBYTECODE": "1", "FEATHERWEIGHT_KERNELS": "torch"
}
# Ray reads some when imported
os.environ.update({name: value for name, value in QUIET.items() if name.startswith("RAY_")})


def workflow(text: str = "a red house", seed: int = 1, steps: int = 2, loras=("ink", "pumpkins"),
             save: bool = True) -> dict:
    """The demo's picture, 128 x 128, with LoRAs, in API format: the prompt is 4.text, the seed
    7.seed, 9 saves it."""
    graph = {
        "1": ("FeatherweightLoadDiffusionModel", {"model_name": MODEL, "compute": "exact"}),
        "2": ("FeatherweightLoadTextEncoder", {
            "text_encoder_1": demo_files.ENCODER_NAME, "text_encoder_2": "none",
            "text_encoder_3": "none", "text_encoder_4": "none", "mmproj": "none",
            "type": "stable_diffusion"
        }), "3": ("VAELoader", {"vae_name": demo_files.VAE_NAME}),
        "4": ("CLIPTextEncode", {"text": text, "clip": ["2", 0]}),
        "5": ("EmptySD3LatentImage", {"width": 128, "height": 128, "batch_size": 1})
    }
    source = ["1", 0]
    for index, name in enumerate(loras):
        graph[f"6{index}"] = (
            "LoraLoaderModelOnly",
            {"model": source, "lora_name": demo_files.LORAS[name], "strength_model": 1.0},
        )
        source = [f"6{index}", 0]
    graph["7"] = (
        "KSampler",
        {
            "model": source,
            "positive": ["4", 0],
            "negative": ["4", 0],
            "latent_image": ["5", 0],
            "seed": seed,
            "steps": steps,
            "cfg": 1.0,
            "sampler_name": "euler",
            "scheduler": "simple",
            "denoise": 1.0,
        },
    )
    graph["8"] = ("VAEDecode", {"samples": ["7", 0], "vae": ["3", 0]})
    if save:
        graph["9"] = ("SaveImage", {"images": ["8", 0], "filename_prefix": "machines"})
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in graph.items()}


def changes(index: int) -> dict:
    """What makes the index-th picture."""
    house, tree, hour = HOUSES[index % 6], TREES[index % 3], HOURS[index % 4]
    text = f"a {house} house left of {tree} tree on {GROUNDS[index // 2 % 3]} at {hour}"
    return {"4.text": text, "7.seed": index}


def make_base(base: Path, models: Path | None = None, pack: str = server.PACK) -> Path:
    """A ComfyUI's folder with the demo's model and LoRAs (those of `models` where given), and the
    pack under a name."""
    for name in ("models", "custom_nodes", "input", "output", "user"):
        (base / name).mkdir(parents=True, exist_ok=True)
    if models is None:
        demo_files.make_models(base, types=("Q4_K",))
    else:
        # hard links would change the files' times, which a ComfyUI notes in its pictures
        shutil.copytree(models, base / "models", dirs_exist_ok=True, copy_function=os.symlink)
    (base / "custom_nodes" / pack).symlink_to(ROOT, target_is_directory=True)
    return base


def model_paths(base: Path) -> Path:
    """A file for `--extra-model-paths-config`, beside a ComfyUI's folder, with which another
    ComfyUI has its models."""
    path = base.parent / "paths.yaml"
    kinds = "".join(f"  {kind}: {kind}\n" for kind in demo_files.FILES)
    path.write_text(f"machines:\n  base_path: {base / 'models'}\n{kinds}", encoding="utf-8")
    return path


def environment(base: Path, name: str) -> dict[str, str]:
    """What `ray start` on such a machine has around it."""
    return {
        **QUIET, "COMFYUI_PATH": str(server.HOST),
        "COMFYUI_ARGUMENTS": f"--base-directory '{base}'", "FEATHERWEIGHT_MACHINE": name
    }


@dataclass
class Machines:
    """A cluster with a CPU on each node. bases: name -> folder; nodes: name -> Ray's node."""
    cluster: "Cluster"
    bases: dict[str, Path]
    nodes: dict[str, "Node"] = field(default_factory=dict)

    @property
    def address(self) -> str:
        assert self.cluster.address is not None  # it has a node
        return self.cluster.address

    def add(self, name: str, cpus: int = 1, **variables: str):
        """Start the node of that name; further environment variables for it."""
        self.nodes[name] = self.cluster.add_node(
            num_cpus=cpus, node_ip_address="127.0.0.1", object_store_memory=150 << 20,
            include_dashboard=False, env_vars={**environment(self.bases[name], name), **variables})

    def remove(self, name: str):
        """As when a machine loses its power."""
        self.cluster.remove_node(self.nodes.pop(name), allow_graceful=False)


@contextlib.contextmanager
def running(bases: dict[str, Path], folder: Path, connect: bool = True, started=None,
            cpus: int = 1):
    """A cluster of a node with some CPUs for each base (or only for those named in `started`), to
    which this process is connected."""
    import ray
    from ray import cloudpickle
    from ray.cluster_utils import Cluster

    before = os.environ.get("RAY_TMPDIR")
    os.environ["RAY_TMPDIR"] = str(folder)
    found = Machines(Cluster(), bases)
    try:
        for name in bases if started is None else started:
            found.add(name, cpus)
        if connect:
            ray.init(address=found.address, log_to_driver=False, logging_level=logging.WARNING)
            product_module("cluster").by_value(cloudpickle)
        yield found
    finally:
        if connect:
            ray.shutdown()
        found.cluster.shutdown()
        os.environ.pop("RAY_TMPDIR")
        if before is not None:
            os.environ["RAY_TMPDIR"] = before
