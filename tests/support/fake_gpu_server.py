"""Runs every server of `tests/server` on fake GPUs, next to one on the CPU that runs the same
workflows and must draw the same pictures.

    pytest tests/server --fake-gpus 2x4-late-dynamic
"""
import copy
import io
from typing import NamedTuple

import av

from devtools import ROOT, fakegpu
from devtools.host.server import HOST, Run, Server

# The same arithmetic on the CPU and on GPUs, for which ComfyUI would choose other dtypes. A custom
# node sets what no argument can.
SAME = ("--fp32-unet", "--fp32-vae", "--fp32-text-enc", "--use-pytorch-cross-attention")
SAME_ENV = {"FEATHERWEIGHT_KERNELS": "torch", "FEATHERWEIGHT_LORA": "apart",
            "OMP_NUM_THREADS": "1"}
SAME_PACK = {
    "as_on_a_cpu": (ROOT / "tests" / "support" / "as_on_a_cpu.py").read_text(encoding="utf-8")
}


class Size(NamedTuple):
    """What an option such as 2x4-late-dynamic asks for."""
    devices: int
    gib: float
    late: bool
    dynamic: bool

    @classmethod
    def read(cls, text: str) -> "Size":
        """Raises ValueError."""
        size, *words = text.split("-")
        devices, gib = size.split("x")
        if unknown := set(words) - {"late", "dynamic"}:
            raise ValueError(f"{unknown.pop()!r} is neither 'late' nor 'dynamic'")
        return cls(int(devices), float(gib), "late" in words, "dynamic" in words)


def node_of(graph: dict, class_type: str) -> dict:
    return next(spec for spec in graph.values() if spec["class_type"] == class_type)


def with_cfg_2(graph: dict) -> dict:
    """Two parts in each step, which devices can share. The host never puts them together, for one
    text is too long for that."""
    graph = copy.deepcopy(graph)
    sampler = node_of(graph, "KSampler")
    graph["negative"] = copy.deepcopy(graph[sampler["inputs"]["positive"][0]])
    graph["negative"]["inputs"]["text"] = "a blue house, " * 100
    sampler["inputs"] |= {"cfg": 2.0, "negative": ["negative", 0]}
    return graph


def pictures(server: Server, run: Run) -> dict[str, list[bytes]]:
    """Returns node -> the pixels of the pictures and videos it made. Their files also hold the
    prompt, in which ComfyUI writes how often a model's file was seen to change."""
    return {
        node: [pixels for entry in output["images"] for pixels in frames(server.image(entry))]
        for node, output in run.outputs.items() if "images" in output
    }


def frames(file: bytes) -> list[bytes]:
    with av.open(io.BytesIO(file)) as container:
        return [frame.to_ndarray().tobytes() for frame in container.decode(video=0)]


class FakeGpuServer(Server):
    """Replaces a server on the CPU by one on fake GPUs, whose twin on the CPU runs every workflow
    too."""

    size: Size  # set by whoever puts this class in the place of `Server`

    def __init__(self, base, host=HOST, cpu: bool = True, arguments=(), with_pack: bool = True,
                 extra_custom_nodes=None, env=None):
        if not cpu:
            raise ValueError("this server chooses its devices itself")
        packs, env = {**(extra_custom_nodes or {}), **SAME_PACK}, {**(env or {}), **SAME_ENV}
        vram = () if self.size.dynamic else ("--disable-dynamic-vram",)
        super().__init__(
            base, host, False, (*arguments, *SAME, *vram), with_pack, packs,
            {**env, **fakegpu.environment(self.size.devices, self.size.gib, self.size.late)})
        folder = self.base / "cpu"
        own = [f"--{name}-directory={folder / name}" for name in ("output", "temp", "user")]
        self.twin = Server(base, host, True, (*arguments, *SAME, *own), with_pack, packs, env)
        self.twin.log_path = folder / "server.log"

    def __exit__(self, *error):
        if self.twin.process is not None:
            self.twin.__exit__(*error)
        super().__exit__(*error)
        if error == (None, None, None):
            log = self.log()
            assert f"Fake GPU {self.size.devices - 1}" in log and "Pin error" not in log
            assert ("DynamicVRAM support detected and enabled" in log) == self.size.dynamic

    def queue(self, prompt: dict, on_progress=None, timeout: float = 600) -> Run:
        run = super().queue(prompt, on_progress, timeout)
        if self.twin.process is None:
            for name in ("output", "temp", "user"):
                (self.base / "cpu" / name).mkdir(parents=True)
            self.twin.__enter__()
        expected = pictures(self.twin, self.twin.queue(prompt, timeout=timeout))
        results = pictures(self, run)
        different = [f"{node} ({prompt[node]['class_type']})" for node in expected
                     if results.get(node) != expected[node]]
        assert results.keys() == expected.keys() and not different, (
            f"not the pictures of the CPU: {', '.join(different)}")
        return run
