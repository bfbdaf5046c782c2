"""The node Run on Ray on the real server with this machine alone: its pictures and its workers."""
import contextlib
import io
import os
import threading
import time

from devtools.cluster import MODEL, QUIET, changes, model_paths, workflow

import numpy
import psutil
import pytest
from PIL import Image
from process_tree import has, listening, wait_until

from devtools.host import server

pytest.importorskip("ray")
COUNT = 4
NODES = """
import hashlib
import torch

class Address:
    RETURN_TYPES, FUNCTION, CATEGORY = ("COMBO",), "give", "test"
    INPUT_TYPES = classmethod(lambda cls: {"required": {}})
    give = lambda self: ("127.0.0.1:1",)

class Paint:
    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "paint", "test"
    INPUT_TYPES = classmethod(lambda cls: {"required": {
        "seed": ("INT", {"default": 0}), "kind": ("STRING", {"default": ""})}})

    def paint(self, seed, kind):
        generator = torch.Generator().manual_seed(seed)
        count = 1 + seed % 3 if kind == "counts" else 2
        width = 8 + seed if kind == "sizes" else 8
        images = torch.randn(count, 5, width, 4, generator=generator) * 1e3
        images[0, 0, 0] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-40])
        return (images,)

class Digest:
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "digest", "test", True
    INPUT_TYPES = classmethod(lambda cls: {"required": {"images": ("IMAGE",)}})

    def digest(self, images):
        values = images.contiguous().numpy().tobytes()
        return {"ui": {"text": [str(images.dtype), str(list(images.shape)),
                                hashlib.sha256(values).hexdigest()]}}

class Join:
    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "join", "test"
    INPUT_TYPES = classmethod(lambda cls: {"required": {"a": ("IMAGE",), "b": ("IMAGE",)}})
    join = lambda self, a, b: (torch.cat([a, b]),)

NODE_CLASS_MAPPINGS = {each.__name__: each for each in (Address, Paint, Digest, Join)}
"""

def on_ray(count=COUNT, seed=1, texts="", steps=2, **inputs):
    graph = workflow(seed=seed, steps=steps, save=False)
    graph["10"] = {
        "class_type": "FeatherweightRunOnRay",
        "inputs": {"images": ["8", 0], "count": count, "texts": texts, "workers": 2, **inputs}
    }
    graph["9"] = {
        "class_type": "SaveImage", "inputs": {"images": ["10", 0], "filename_prefix": "ray"}
    }
    return graph


def pixels(png: bytes) -> bytes:
    return numpy.asarray(Image.open(io.BytesIO(png))).tobytes()


def pictures(running, graph, **options):
    """Returns (pixels of the pictures that node 9 saved, the run)."""
    run = running.queue(graph, **options)
    return [pixels(running.image(image)) for image in run.outputs["9"]["images"]], run


def cancelled(running, graph, when) -> str:
    """Runs a graph, cancels it once `when()` is true, and returns the server's error."""
    def cancel():
        wait_until(when)
        time.sleep(1)
        running.post("/interrupt", {})

    thread = threading.Thread(target=cancel)
    thread.start()
    try:
        running.queue(graph)
        return ""
    except server.ServerError as error:
        return str(error)
    finally:
        thread.join()


def digests(running, sources: dict, link: list) -> list[str]:
    """Returns (dtype, shape, sha256) of what this ComfyUI's node 20 gets from a link."""
    digest = {"class_type": "Digest", "inputs": {"images": link}}
    return running.queue({**sources, "20": digest}).outputs["20"]["text"]


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    """Returns the workers of Run on Ray among the descendants of a process."""
    workers = []
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):
            if child.cmdline()[0].startswith("ray::RowRenderer"):
                workers.append(child)
    return workers


def mapped(process: psutil.Process, name: str) -> bool:
    return any(name in part.path for part in process.memory_maps(grouped=True))


@pytest.fixture(scope="module")
def editor(bases, ray_folder):
    """Yields a server with the desk's models, through a relative path."""
    base = bases["desk"].parent / "editor"
    with server.Server(
            # its workers leave what they have written to the next ones
            base, env={**QUIET, "RAY_TMPDIR": str(ray_folder), "TMPDIR": str(base.parent),
                       "OMP_NUM_THREADS": "1"},
            arguments=[
                "--extra-model-paths-config",
                os.path.relpath(model_paths(bases["desk"]), server.HOST)
            ], extra_custom_nodes={"nodes_of_the_test": NODES}) as running:
        yield running


def test_this_machine_draws_what_the_graph_gives_once_per_item(editor, plain):
    """It loads nothing itself, and shows how many are done."""
    texts = [changes(index)["4.text"] for index in range(COUNT)]
    steps = []
    images, run = pictures(editor, on_ray(texts="\n".join(texts), seed=5, steps=3),
                           on_progress=lambda *step: steps.append(step))
    assert images == [
        pixels(plain(workflow(text, 5 + index, steps=3))) for index, text in enumerate(texts)
    ]
    # ComfyUI sends no step within 0.1 s after another, but the last
    done = [value for node, value, maximum in steps if node == "10" and maximum == COUNT]
    assert done == sorted({*done, 0, COUNT}) and {*done} <= {*range(COUNT + 1)}
    assert run.texts["10"][-1] == "4 of 4 done"
    assert {*run.texts["10"]} == {f"{done} of 4 done" for done in range(COUNT + 1)}
    host = psutil.Process(editor.process.pid)
    assert not mapped(host, MODEL)
    assert any(mapped(worker, MODEL) for worker in workers_of(host))
    assert not mapped(host, "/site-packages/ray/")  # ComfyUI imports no ray


def test_the_next_run_starts_no_comfyui(editor):
    """It loads no model either."""
    host = psutil.Process(editor.process.pid)
    before = {worker.pid: mapped(worker, MODEL) for worker in workers_of(host)}
    pictures(editor, on_ray(seed=20))
    assert {worker.pid: mapped(worker, MODEL) for worker in workers_of(host)} == before
    assert any(before.values())


def run_of(link: list, count: int) -> dict:
    return {"class_type": "FeatherweightRunOnRay",
            "inputs": {"images": link, "count": count, "workers": 2}}


@pytest.mark.parametrize("kind", ["", "counts"])
def test_images_of_any_channels_and_numbers_come_back_bit_for_bit(editor, kind):
    """Not a number, infinity and the smallest numbers too; a job has one image or several."""
    paints = {str(seed): {"class_type": "Paint", "inputs": {"seed": seed, "kind": kind}}
              for seed in (1, 2, 3)}
    joins = {"4": {"class_type": "Join", "inputs": {"a": ["1", 0], "b": ["2", 0]}},
             "5": {"class_type": "Join", "inputs": {"a": ["4", 0], "b": ["3", 0]}}}
    expected = digests(editor, {**paints, **joins}, ["5", 0])
    assert expected[:2] == ["torch.float32", "[6, 5, 8, 4]"]
    assert digests(editor, {"1": paints["1"], "10": run_of(["1", 0], 3)}, ["10", 0]) == expected


def test_a_models_images_come_back_bit_for_bit(editor):
    graph = workflow(seed=7, save=False)
    assert digests(editor, {**graph, "10": run_of(["8", 0], 1)}, ["10", 0]) == digests(
        editor, graph, ["8", 0])


def test_images_of_several_sizes_are_told_by_job(editor):
    graph = {"1": {"class_type": "Paint", "inputs": {"seed": 1, "kind": "sizes"}},
             "10": run_of(["1", 0], 2)}
    with pytest.raises(server.ServerError, match=(
            r"Job [12] of 2 is (9|10) x 5 with 4 channels, job [12] is (9|10) x 5 with 4 channels:"
            " images of one run have one size")):
        digests(editor, graph, ["10", 0])


def test_no_process_of_that_ray_listens_on_a_network(editor):
    """Its workers, which run now, do not either."""
    pictures(editor, on_ray(count=1, seed=30))
    host = psutil.Process(editor.process.pid)
    assert workers_of(host) and has(host, "raylet")
    assert set().union(*map(listening, host.children())) == {"127.0.0.1"}


def test_cancel_leaves_nothing_running_and_the_next_picture_is_right(editor, plain):
    host, started = psutil.Process(editor.process.pid), []

    def draws():
        started[:] = host.children(recursive=True)
        return any(mapped(worker, MODEL) for worker in workers_of(host))

    pictures(editor, on_ray(count=1, seed=49, steps=1))  # so that workers are there
    message = cancelled(editor, on_ray(steps=10_000, seed=50), draws)
    assert "interrupted" in message
    assert psutil.wait_procs(started, timeout=10)[1] == []
    folders = os.listdir(editor.base.parent)
    assert [name for name in folders if name.startswith("featherweight-")] == []
    images, _ = pictures(editor, on_ray(count=1, seed=60))
    assert images == [pixels(plain(workflow(seed=60)))]


@pytest.mark.parametrize(("change", "message"), [
    # from this ComfyUI, before anything runs
    ({"7.sampler_name": "no_such_sampler"}, "Value not in list"),
    ({"1.model_name": "no_such_model.gguf"},
     r"Job \d of 2 failed: .* has no file 'no_such_model.gguf' \(1.model_name\)"),
    ({"5.width": 16, "5.height": 16, "4.text": "x"}, None)])
def test_what_is_wrong_is_said_in_one_sentence(editor, change, message):
    graph = on_ray(count=2)
    for path, value in change.items():
        node, name = path.split(".")
        graph[node]["inputs"][name] = value
    if message is None:
        assert len(pictures(editor, graph)[0]) == 2
    else:
        with pytest.raises(server.ServerError, match=message):
            editor.queue(graph)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1:6379", "auto", "ray://somewhere:10001", "local", "x" * 10_000, 5, {"a": 1}],
)
def test_an_address_in_a_workflow_is_refused_before_anything_starts(editor, address):
    before = {child.pid for child in psutil.Process(editor.process.pid).children()}
    with pytest.raises(server.ServerError,
                       match="A workflow may not name a Ray cluster, .* FEATHERWEIGHT_RAY_ADDRESS"):
        editor.queue(on_ray(address=address))
    assert {child.pid for child in psutil.Process(editor.process.pid).children()} <= before


def test_an_address_that_another_node_gives_is_refused_too(editor):
    graph = on_ray(address=["11", 0])
    graph["11"] = {"class_type": "Address", "inputs": {}}
    with pytest.raises(
            server.ServerError,
            match="A workflow may not name a Ray cluster, and this one names '127.0.0.1:1'"):
        editor.queue(graph)


def test_the_cluster_where_none_is_named_is_one_sentence(editor):
    with pytest.raises(
            server.ServerError,
            match="No Ray cluster is named on this machine: set FEATHERWEIGHT_RAY_ADDRESS"):
        editor.queue(on_ray(address="the cluster"))


@pytest.mark.heavy
def test_a_killed_worker_costs_nothing_but_time(editor, plain):
    host, killed = psutil.Process(editor.process.pid), []

    def step(node, value, maximum):
        if node == "10" and value and not killed:
            killed.append(workers_of(host)[0])
            killed[0].kill()

    images, run = pictures(editor, on_ray(seed=70, steps=6), on_progress=step)
    assert killed and images == [
        pixels(plain(workflow(seed=70 + index, steps=6))) for index in range(COUNT)
    ]


@pytest.mark.heavy
def test_idle_workers_end_and_others_come_when_there_is_work(editor, plain):
    host = psutil.Process(editor.process.pid)
    pictures(editor, on_ray(count=1, seed=80, idle_minutes=0.02))
    deadline = time.monotonic() + 120
    while workers_of(host) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert workers_of(host) == []
    images, _ = pictures(editor, on_ray(count=1, seed=81, idle_minutes=10.0))
    assert images == [pixels(plain(workflow(seed=81)))]


def test_ray_ends_with_the_editor(bases, ray_folder, editor):
    """It ends even if the editor is killed."""
    children = psutil.Process(editor.process.pid).children(recursive=True)
    assert has(psutil.Process(editor.process.pid), "gcs_server")
    editor.process.kill()
    _, alive = psutil.wait_procs(children, timeout=180)
    assert alive == []
