"""A worker of Ray renders what a plain ComfyUI does, with code that was sent to it."""
import asyncio
import os
import subprocess
import sys
import tempfile
import time
import uuid

from devtools.cluster import changes, workflow

import pytest
from process_tree import IMPORT_PACK

from devtools import ROOT
from featherweight.cluster import embedded_comfyui
from featherweight.cluster.actor_pool import Share
from featherweight.cluster.comfyui_install import MachineError
from featherweight.cluster.worker import PromptWorker
from featherweight.cluster.workflow_graph import GraphError, with_result

ray = pytest.importorskip("ray")
LOADER = IMPORT_PACK + "from featherweight.cluster import embedded_comfyui\n"


def answering_worker() -> type[PromptWorker]:
    """Returns a worker class that can also return the `PromptResult` of a graph."""
    class AnsweringWorker(PromptWorker):
        async def answer(self, graph):
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self.threads, self.host.run, graph)

    return AnsweringWorker


@pytest.fixture(scope="module")
def worker(cluster):
    """Yields a worker on the machine whose pack has another name."""
    actor = ray.remote(answering_worker()).options(num_cpus=1, max_concurrency=8, label_selector={
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


def begin(worker, graph, prompt_id="", extra=None):
    """Starts a prompt and returns the stream of its events."""
    return worker.render.options(num_returns="streaming").remote(
        with_result(graph, ["8", 0]), extra or {}, prompt_id or str(uuid.uuid4()))


def events_left(stream):
    """Returns all (event, data) of a stream that are still to come."""
    return [ray.get(ref, timeout=300) for ref in stream]


def drawn(worker, graph):
    """Runs a graph and returns (files, images)."""
    answer = ray.get(worker.answer.remote(graph), timeout=300)
    return answer.files, answer.images


def test_a_worker_draws_what_a_plain_comfyui_draws(worker, plain):
    texts = [changes(index) for index in range(3)]
    graphs = [workflow(text["4.text"], text["7.seed"]) for text in texts]
    files = [drawn(worker, graph)[0] for graph in graphs]
    assert [list(names) for names in files] == [["9_0.png"]] * 3
    assert [content["9_0.png"] for content in files] == [plain(graph) for graph in graphs]


def test_a_worker_says_where_it_is(worker, cluster):
    info, problem = ray.get(worker.ready.remote(), timeout=300)
    assert (info["name"], info["node"], problem) == ("attic", cluster.nodes["attic"].node_id, "")


def test_machines_of_a_ray_that_does_not_say_what_is_free_count_as_busy(cluster, monkeypatch):
    assert sum(Share(1).free().values()) > 0
    monkeypatch.delattr("ray._private.state.available_resources_per_node")
    assert Share(1).free() == {}


def test_pictures_come_back_as_a_tensor(worker):
    graph = workflow(save=False)
    files, images = drawn(worker, with_result(graph, ["8", 0]))
    assert files == {}
    assert images.shape == (1, 128, 128, 3)
    assert events_left(begin(worker, graph))[-1][1].tobytes() == images.numpy().tobytes()


def test_a_graph_drawn_again_gives_its_files_again_byte_for_byte(worker):
    """ComfyUI has cached its outputs, but the files are gone; with and without a graph between."""
    files = [drawn(worker, workflow(seed=seed))[0] for seed in (11, 11, 12, 11)]
    assert list(files[0]) == ["9_0.png"]
    assert files[0] == files[1] == files[3] != files[2]


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


def test_cancelling_one_prompt_leaves_the_others(worker, plain):
    """Cancelling a prompt that waits does not end the one that runs, and the next is right."""
    first = begin(worker, workflow(seed=21, steps=40))
    for seed in (22, 23):  # waits; runs
        other = begin(worker, workflow(seed=seed, steps=400), f"{seed}")
        if seed == 23:
            assert ray.get(next(other), timeout=300) == ("begins", "attic")
        ray.get(worker.cancel.remote(f"{seed}"), timeout=300)
        events = {event for event, _ in events_left(other)}
        assert events <= {"begins", "progress"}  # and no images
        if seed == 22:
            assert events_left(first)[-1][0] == "images"
    assert drawn(worker, workflow(seed=24))[0]["9_0.png"] == plain(workflow(seed=24))


def test_prompts_are_drawn_in_the_order_they_came(worker):
    """ComfyUI's queue sorts prompts of one number by their ids, which are random."""
    def tasks_of(worker):
        return worker.host.server.prompt_queue.get_tasks_remaining()

    deadline, waiting = time.monotonic() + 300, []
    for seed in range(25, 31):
        # the first runs until all are queued
        graph = workflow(seed=seed, steps=2000 if seed == 25 else 2)
        waiting.append(begin(worker, graph, f"{seed}").completed())
        while ray.get(worker.__ray_call__.remote(tasks_of), timeout=300) < len(waiting):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    ray.get(worker.cancel.remote("25"), timeout=300)
    ended, pending = [], waiting
    while pending:
        done, pending = ray.wait(pending, timeout=300)
        assert done
        ended += done
    cancelled = waiting.pop(0)  # of which word may come later than of the next
    ended.remove(cancelled)
    assert ended == waiting


def test_progress_and_previews_come_while_it_draws(worker):
    stream = begin(worker, workflow(seed=31, steps=6), extra={"preview_method": "latent2rgb"})
    events = events_left(stream)
    names = [event for event, _ in events]
    assert names[0] == "begins" and names[-1] == "images"
    assert names.count("progress") == 6
    previews = [data for event, data in events if event == "preview"]
    assert previews and all(data.startswith((b"\xff\xd8", b"\x89PNG")) for data in previews)


def exiting_worker() -> type[PromptWorker]:
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

    class ExitingWorker(PromptWorker):
        def boot(self, comfyui):
            host = super().boot(comfyui)
            host.node_classes["Exit"] = Exit
            return host

    return ExitingWorker


def test_a_node_that_ends_comfyuis_thread_is_an_error_and_the_next_prompt_has_another_worker(
        cluster):
    actor = ray.remote(exiting_worker()).options(num_cpus=1).remote()
    try:
        event, reason = events_left(begin(actor, {"8": {"class_type": "Exit", "inputs": {}}}))[-1]
        assert event == "unusable" and "ComfyUI's thread that runs prompts has ended" in reason
        with pytest.raises(ray.exceptions.ActorDiedError):  # for which a pool starts another
            events_left(begin(actor, workflow(save=False)))
    finally:
        ray.kill(actor)
