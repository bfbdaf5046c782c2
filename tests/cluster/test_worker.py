"""A worker of Ray renders what a plain ComfyUI does, with code that was sent to it."""
import io
import os
import random
import subprocess
import sys
import tempfile

from devtools.cluster import changes, workflow

import numpy
import pytest
from PIL import Image
from process_tree import IMPORT_PACK

from devtools import ROOT
from featherweight.cluster import embedded_comfyui
from featherweight.cluster.actor_pool import Share
from featherweight.cluster.comfyui_install import MachineError
from featherweight.cluster.worker import Worker
from featherweight.cluster.workflow_graph import GraphError, with_result

ray = pytest.importorskip("ray")
LOADER = IMPORT_PACK + "from featherweight.cluster import embedded_comfyui\n"


def answering_worker() -> type[Worker]:
    """Returns a worker class that returns the files of a graph."""
    class AnsweringWorker(Worker):
        def answer(self, graph):
            return self.running_host().run(graph)

        def check(self, graph):
            return self.running_host().validate(graph)[1]

    return AnsweringWorker


@pytest.fixture(scope="module")
def worker(cluster):
    """Yields a worker on the machine whose pack has another name."""
    actor = ray.remote(answering_worker()).options(num_cpus=1, label_selector={
        "ray.io/node-id": cluster.nodes["attic"].node_id}).remote()
    yield actor
    ray.kill(actor)


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path, monkeypatch):
    """A process in another container with the same /tmp is alive though its id is unknown here."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = (
        "import time; made = embedded_comfyui.make_scratch(); print(made[0], flush=True);"
        " time.sleep(1000)"
    )
    killed, alive = (subprocess.Popen([sys.executable, "-c", LOADER + code, str(ROOT)],
                                      stdout=subprocess.PIPE, text=True,
                                      env={**os.environ, "TMPDIR": str(tmp_path)})
                     for _ in range(2))
    try:
        folders = [process.stdout.readline().strip() for process in (killed, alive)]
        killed.kill()
        killed.wait()
        # the live one's folder, as a process of another container would name it
        other = tmp_path / f"{embedded_comfyui.SCRATCH}999999999-b"
        os.rename(folders[1], other)
        for name in (f"{embedded_comfyui.SCRATCH}of-a-person", "other"):
            (tmp_path / name).mkdir()
        embedded_comfyui.sweep_dead()
        assert sorted(os.listdir(tmp_path)) == sorted(
            [other.name, f"{embedded_comfyui.SCRATCH}of-a-person", "other"]
        )
    finally:
        for process in (killed, alive):
            process.kill()
            process.wait()
            process.stdout.close()


def test_nodes_of_like_names_overwrite_no_file_of_each_other(tmp_path):
    comfyui = embedded_comfyui.EmbeddedComfyUI.__new__(embedded_comfyui.EmbeddedComfyUI)
    comfyui.scratch = str(tmp_path)
    (tmp_path / "output").mkdir()
    for name in ("a", "b"):
        (tmp_path / "output" / name).write_text(name)
    outputs = {"9:1": {"images": [{"filename": "a"}]}, "9-1": {"images": [{"filename": "b"}]}}
    assert (
        comfyui._read_files(outputs)
        == comfyui._read_files(dict(reversed(outputs.items())))
        == {"9-1_0": b"b", "9-1_1": b"a"}
    )


def drawn(worker, graph):
    """Runs a graph and returns its files."""
    return ray.get(worker.answer.remote(graph), timeout=300)


def test_a_worker_draws_what_a_plain_comfyui_draws(worker, plain):
    texts = [changes(index) for index in range(3)]
    graphs = [workflow(text["4.text"], text["7.seed"]) for text in texts]
    files = [drawn(worker, graph) for graph in graphs]
    assert [list(names) for names in files] == [["9_0.png"]] * 3
    assert [content["9_0.png"] for content in files] == [plain(graph) for graph in graphs]


def test_a_worker_says_where_it_is(worker, cluster):
    info, problem = ray.get(worker.ready.remote(), timeout=300)
    assert (info["name"], info["node"], problem) == ("attic", cluster.nodes["attic"].node_id, "")


def test_machines_of_a_ray_that_does_not_say_what_is_free_count_as_busy(cluster, monkeypatch):
    assert sum(Share(1).free().values()) > 0
    monkeypatch.delattr("ray._private.state.available_resources_per_node")
    assert Share(1).free() == {}


def test_images_are_saved_as_they_are(worker):
    """And again if the same graph runs again, whose other outputs are cached."""
    graph, name = with_result(workflow(save=False), ["8", 0])
    for _ in range(2):
        files = drawn(worker, graph)
        assert [*files] == [f"{name}_0.npy"]
        images = numpy.load(io.BytesIO(files[f"{name}_0.npy"]))
        assert (images.shape, images.dtype) == ((1, 128, 128, 3), numpy.float32)
        assert (images * 255 % 1).any()  # more than 8 bits


def test_a_graph_drawn_again_gives_its_files_again_byte_for_byte(worker):
    """ComfyUI has cached its outputs, but the files are gone; with and without a graph between."""
    files = [drawn(worker, workflow(seed=seed)) for seed in (11, 11, 12, 11)]
    assert list(files[0]) == ["9_0.png"]
    assert files[0] == files[1] == files[3] != files[2]


def squares(*colors: int, **more) -> dict:
    """A graph that saves a square of each color, all under the same name."""
    graph = dict(more)
    for index, color in enumerate(colors):
        graph[f"{index}"] = {"class_type": "EmptyImage", "inputs": {
            "width": 16, "height": 16, "batch_size": 1, "color": color}}
        graph[f"9{index}"] = {"class_type": "SaveImage", "inputs": {
            "images": [f"{index}", 0], "filename_prefix": "square"}}
    return graph


def test_a_node_that_does_not_run_again_keeps_its_own_picture(worker):
    for _ in range(8):
        colors = [random.choice((0xff0000, 0xff00, 0xff)) for _ in range(3)]
        files = drawn(worker, squares(*colors))
        seen = [Image.open(io.BytesIO(files[f"9{index}_0.png"])).getpixel((0, 0))
                for index in range(3)]
        assert seen == [tuple(color.to_bytes(3, "big")) for color in colors]


def test_a_row_of_which_another_machine_could_draw_more_is_refused(worker):
    model = {"class_type": "UpscaleModelLoader", "inputs": {"model_name": "not_here.safetensors"}}
    upscaled = {"class_type": "ImageUpscaleWithModel",
                "inputs": {"upscale_model": ["20", 0], "image": ["0", 0]}}
    saved = {"class_type": "SaveImage", "inputs": {"images": ["21", 0], "filename_prefix": "up"}}
    with pytest.raises(MachineError, match="no file 'not_here.safetensors' .20.model_name"):
        drawn(worker, squares(0xff, **{"20": model, "21": upscaled, "22": saved}))


def test_a_check_refuses_what_the_run_would(worker):
    graph = workflow() | {"60": {"class_type": "FeatherweightApplyLora", "inputs": {
        "model": ["1", 0], "lora_name": "no_such_lora.safetensors", "strength": 1.0}}}
    for method in (worker.check, worker.answer):
        with pytest.raises(MachineError, match="no file 'no_such_lora.safetensors'"):
            ray.get(method.remote(graph), timeout=300)


def test_a_text_that_looks_like_a_file_hides_no_other_reason(worker, bases):
    """IMG_1018.JPG is a prompt that people use."""
    (bases["attic"] / "input").mkdir(exist_ok=True)
    broken = bases["attic"] / "input" / "broken.png"
    broken.write_bytes(b"no picture")
    graph = squares(0xff, **{
        "20": {"class_type": "LoadImage", "inputs": {"image": "broken.png"}},
        "21": {"class_type": "PreviewImage", "inputs": {"images": ["20", 0]}},
        "22": {"class_type": "PrimitiveString", "inputs": {"value": "IMG_1018.JPG"}},
        "23": {"class_type": "PreviewAny", "inputs": {"source": ["22", 0]}}})
    try:
        with pytest.raises(GraphError, match="node 20 .LoadImage"):
            drawn(worker, graph)
    finally:
        broken.unlink()


@pytest.mark.parametrize(("path", "value", "error", "message"), [
    ("7.sampler_name", "no_such_sampler", GraphError, "node 7 .KSampler.*no_such_sampler"),
    ("60.lora_name", "no_such_lora.safetensors", MachineError,
     "no file 'no_such_lora.safetensors' .60.lora_name"),
    ("1.model_name", "no_such_model.gguf", MachineError,
     "no file 'no_such_model.gguf' .1.model_name")])
def test_what_is_wrong_is_said_and_whose_fault_it_is(worker, path, value, error, message):
    graph = workflow()
    node, name = path.split(".")
    graph[node]["inputs"][name] = value
    with pytest.raises(error, match=message):
        drawn(worker, graph)


def test_a_class_that_is_not_there_is_the_machines_fault(worker):
    graph = workflow()
    graph["9"]["class_type"] = "SaveImageOfAnotherPack"
    with pytest.raises(MachineError, match="no node 'SaveImageOfAnotherPack'"):
        drawn(worker, graph)


def exiting_worker() -> type[Worker]:
    """Returns a worker class whose ComfyUI has a node that ends the thread which runs it."""
    class Exit:
        RETURN_TYPES = ("IMAGE",)
        FUNCTION = "exit"
        CATEGORY = ""

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {}}

        def exit(self):
            raise SystemExit

    class ExitingWorker(answering_worker()):
        def boot(self, comfyui):
            host = super().boot(comfyui)
            host.node_classes["Exit"] = Exit
            return host

    return ExitingWorker


def test_a_node_that_ends_comfyuis_thread_is_an_error_and_the_next_prompt_has_another_worker(
        cluster):
    actor = ray.remote(exiting_worker()).options(num_cpus=1).remote()
    try:
        with pytest.raises(MachineError, match="ComfyUI's thread that runs prompts has ended"):
            drawn(actor, {"8": {"class_type": "Exit", "inputs": {}},
                          "9": {"class_type": "PreviewImage", "inputs": {"images": ["8", 0]}}})
        with pytest.raises(ray.exceptions.ActorDiedError):  # for which a pool starts another
            drawn(actor, workflow())
    finally:
        ray.kill(actor)
