"""The node Run on Ray on the real server with this machine alone: its pictures and its workers."""
import contextlib
import io
import os
import time

from devtools.cluster import MODEL, QUIET, changes, model_paths, workflow

import numpy
import psutil
import pytest
from PIL import Image
from process_tree import has, listening

from devtools.host import server

pytest.importorskip("ray")
COUNT = 4
ADDRESS = """
class Address:
    RETURN_TYPES, FUNCTION, CATEGORY = ("COMBO",), "give", "test"
    INPUT_TYPES = classmethod(lambda cls: {"required": {}})
    give = lambda self: ("127.0.0.1:1",)
NODE_CLASS_MAPPINGS = {"Address": Address}
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


def cancelled(running, graph, when) -> tuple[str, float]:
    """Runs a graph, and cancels it once `when` is true of the steps so far.

    Returns:
        (the server's error or "", the share of node 10's steps until then).
    """
    steps, message, is_cancelled = [], "", False

    def step(node, value, maximum):
        nonlocal is_cancelled
        steps.append((node, value, maximum))
        if when(steps) and not is_cancelled:
            is_cancelled = True
            running.post("/interrupt", {})

    try:
        running.queue(graph, on_progress=step)
    except server.ServerError as error:
        message = str(error)
    shares = [value / (maximum or 1) for node, value, maximum in steps if node == "10"]
    return message, max(shares)


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    """Returns the workers of Run on Ray among the descendants of a process."""
    workers = []
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):
            if child.cmdline()[0].startswith("ray::PromptWorker"):
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
            base, env={**QUIET, "RAY_TMPDIR": str(ray_folder), "TMPDIR": str(base.parent)},
            arguments=[
                "--preview-method", "latent2rgb", "--extra-model-paths-config",
                os.path.relpath(model_paths(bases["desk"]), server.HOST)
            ], extra_custom_nodes={"address": ADDRESS}) as running:
        yield running


def test_this_machine_draws_what_the_graph_gives_once_per_item(editor, plain):
    """It loads nothing itself, and shows steps and previews of all items and the workers' names."""
    texts = [changes(index)["4.text"] for index in range(COUNT)]
    steps = []
    images, run = pictures(editor, on_ray(texts="\n".join(texts), seed=5, steps=3),
                           on_progress=lambda *step: steps.append(step))
    assert images == [
        pixels(plain(workflow(text, 5 + index, steps=3))) for index, text in enumerate(texts)
    ]
    assert [step for step in steps if step[0] == "10"][-1][1:] == (3 * COUNT, 3 * COUNT)
    assert "4 of 4 done" in run.texts["10"][-1]
    assert run.previews and all(
        len(Image.open(io.BytesIO(preview)).getcolors(1 << 20)) > 1 for preview in run.previews
    )
    host = psutil.Process(editor.process.pid)
    assert not mapped(host, MODEL)
    assert any(mapped(worker, MODEL) for worker in workers_of(host))


def test_no_process_of_that_ray_listens_on_a_network(editor):
    """Its workers, which run now, do not either."""
    host = psutil.Process(editor.process.pid)
    assert workers_of(host) and has(host, "raylet")
    assert set().union(*map(listening, host.children())) == {"127.0.0.1"}


def test_cancel_frees_the_workers_and_the_next_picture_is_right(editor, plain):
    pids = {worker.pid for worker in workers_of(psutil.Process(editor.process.pid))}
    message, share = cancelled(editor, on_ray(steps=2000, seed=50),
                               lambda steps: any(value > 3 for _, value, _ in steps))
    # of 8 000 steps, which take minutes; 0.001 on an idle machine
    assert "interrupted" in message and share < 0.5
    images, _ = pictures(editor, on_ray(count=1, seed=60))
    assert images == [pixels(plain(workflow(seed=60)))]
    assert {worker.pid for worker in workers_of(psutil.Process(editor.process.pid))} & pids


@pytest.mark.parametrize(("change", "message"), [
    # from this ComfyUI, before anything runs
    ({"7.sampler_name": "no_such_sampler"}, "Value not in list"),
    ({"1.model_name": "no_such_model.gguf"},
     r"Job \d of 2 cannot run on .*no file 'no_such_model.gguf'"),
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
        if node == "10" and value > 2 and not killed:
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
