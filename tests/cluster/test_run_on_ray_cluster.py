"""The node Run on Ray on clusters that several editors share, or whose machines fail."""
import contextlib
import os
import re
import threading
import time

from devtools.cluster import MODEL, QUIET, model_paths, running, workflow

import pytest

from devtools.host import server

from .test_run_on_ray import COUNT, on_ray, pictures, pixels

pytest.importorskip("ray")
pytestmark = pytest.mark.heavy


@contextlib.contextmanager
def editor_of(bases, ray_folder, name: str, address: str):
    with server.Server(
            bases["desk"].parent / name,
            env={**QUIET, "RAY_TMPDIR": str(ray_folder), "FEATHERWEIGHT_RAY_ADDRESS": address},
            arguments=["--extra-model-paths-config",
                       str(model_paths(bases["desk"]))]) as editor:
        yield editor


@pytest.fixture(scope="module")
def editors(bases, ray_folder, cluster):
    with editor_of(bases, ray_folder, "one", cluster.address) as one, \
            editor_of(bases, ray_folder, "two", cluster.address) as two:
        yield one, two


def queued(editor, graph) -> tuple[threading.Thread, list]:
    """Returns a thread that runs a graph, and a list that will have its result.

    That is (pixels, run), or the server's error as a text.
    """
    results = []

    def run():
        try:
            results.append(pictures(editor, graph))
        except server.ServerError as error:
            results.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


def on_cluster(**inputs) -> dict:
    """Returns a graph for the cluster, whose workers end soon after it."""
    return on_ray(address="the cluster", idle_minutes=0.01, **inputs)


def test_two_editors_draw_one_after_the_other(cluster, editors, plain):
    runs = [
        queued(editor, on_cluster(seed=seed, workers=0)) for editor, seed in zip(editors, (5, 15))
    ]
    for (thread, results), seed in zip(runs, (5, 15)):
        thread.join()
        assert isinstance(results[0], tuple), results[0]
        assert results[0][0] == [
            pixels(plain(workflow(seed=seed + index))) for index in range(COUNT)
        ]


def test_cancel_of_what_waits_ends_nothing_that_runs(cluster, editors, plain):
    first, second = editors
    running_thread, results = queued(first, on_cluster(seed=30, steps=60, workers=0))
    waiting_thread, errors = queued(second, on_cluster(seed=40, steps=60, workers=0))
    time.sleep(3)
    assert running_thread.is_alive() and waiting_thread.is_alive()
    second.post("/interrupt", {})
    waiting_thread.join()
    assert "interrupted" in errors[0] and running_thread.is_alive()
    running_thread.join()
    assert results[0][0] == [
        pixels(plain(workflow(seed=30 + index, steps=60))) for index in range(COUNT)
    ]
    assert pictures(second, on_cluster(count=1, seed=50))[0] == [pixels(plain(workflow(seed=50)))]


def test_a_machine_that_lacks_a_model_is_named_and_another_draws(cluster, editors, bases):
    path = next((bases["desk"] / "models").rglob(MODEL))
    # not a hard link, which changes the file's times, which are saved in pictures
    os.symlink(path, path.with_name("at the desk.gguf"))
    graph = on_cluster(count=12, seed=60, steps=60, workers=0)  # enough for attic to take one
    graph["1"]["inputs"]["model_name"] = "at the desk.gguf"
    images, run = pictures(editors[0], graph)
    assert len(images) == 12
    assert re.search(r"Job \d+ goes to another machine: attic has no file 'at the desk.gguf'",
                     "\n".join(run.texts["10"]))


def test_a_head_that_goes_away_ends_no_comfyui(bases, ray_folder, plain):
    with contextlib.ExitStack() as head:
        address = head.enter_context(running(bases, ray_folder, connect=False,
                                             started=["desk"])).address
        with editor_of(bases, ray_folder, "three", address) as editor:
            images, _ = pictures(editor, on_cluster(count=1, seed=70, workers=1))
            assert images == [pixels(plain(workflow(seed=70)))]
            thread, errors = queued(editor, on_cluster(count=1, seed=71, steps=5000, workers=1))
            time.sleep(3)
            assert thread.is_alive()
            head.close()
            thread.join(180)
            assert not thread.is_alive() and "Ray" in errors[0]
            with pytest.raises(server.ServerError, match="No Ray cluster answers at"):
                editor.queue(on_cluster(count=1, seed=73, workers=1))
            assert pictures(editor, on_ray(count=1, seed=72, address="", workers=2))[0] == [
                pixels(plain(workflow(seed=72)))
            ]
