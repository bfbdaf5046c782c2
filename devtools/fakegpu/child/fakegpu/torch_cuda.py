"""What `torch.cuda` is in a process with fake GPUs: the functions that a torch without CUDA lacks,
for one that has it."""
import contextlib
import sys
import time
import types

from . import native

CAPABILITY = (8, 6)
CUDA_VERSION = "12.8"


def install(torch):
    """Replace what ComfyUI, its packages and this pack use of `torch.cuda`. torch: the module,
    freshly imported."""

    def index_of(device=None) -> int:
        if isinstance(device, int):
            return device
        index = None if device is None else torch.device(device).index
        return native.driver.fake_current() if index is None else index

    class Stream:
        """One of the queues of `source/streams.h`."""

        def __init__(self, device=None, priority=0, stream_id=None, **kwargs):
            self.device = torch.device("cuda", index_of(device))
            self.stream_id = native.device.fake_new_stream() if stream_id is None else stream_id

        @property
        def cuda_stream(self):
            return self.stream_id

        def synchronize(self):
            self.record_event().synchronize()

        def wait_stream(self, other):
            other.synchronize()

        def wait_event(self, event):
            event.synchronize()

        def record_event(self, event=None):
            event = event or Event()
            event.record(self)
            return event

        def query(self):
            return True

        def __eq__(self, other):
            return isinstance(other, Stream) and (other.stream_id, other.device) == (
                self.stream_id,
                self.device,
            )

        def __hash__(self):
            return hash(self.stream_id)

        def __enter__(self):
            self._entered = stream_context(self)
            return self._entered.__enter__()

        def __exit__(self, *error):
            return self._entered.__exit__(*error)

    class Event:
        """A place in a stream: what was put there before it was recorded arrives when somebody
        waits for it."""

        def __init__(self, *args, **kwargs):
            self._moment = None

        def record(self, stream=None):
            stream = stream or current_stream()
            self._moment = stream.stream_id, native.device.fake_now(stream.stream_id)
            self._time = time.perf_counter()

        def synchronize(self):
            if self._moment is not None:
                native.device.fake_finish(*self._moment)

        def wait(self, stream=None):
            self.synchronize()

        def query(self):
            return True

        def elapsed_time(self, other):
            return 1e3 * (other._time - self._time)

    class DeviceContext:
        def __init__(self, device):
            self.index = index_of(device)

        def __enter__(self):
            self._before = native.driver.fake_exchange(self.index)

        def __exit__(self, *error):
            native.driver.fake_exchange(self._before)

    def current_stream(device=None):
        index = index_of(device)
        return Stream(index, stream_id=native.device.fake_stream(index))

    def default_stream(device=None):
        return Stream(device, stream_id=0)

    @contextlib.contextmanager
    def stream_context(stream):
        if stream is None:
            yield
            return
        with DeviceContext(stream.device):
            before = native.device.fake_stream(stream.device.index)
            native.device.fake_set_stream(stream.device.index, stream.stream_id)
            try:
                yield stream
            finally:
                native.device.fake_set_stream(stream.device.index, before)

    def set_stream(stream):
        native.driver.fake_exchange(stream.device.index)
        native.device.fake_set_stream(stream.device.index, stream.stream_id)

    def mem_get_info(device=None):
        total, used = (
            native.driver.fake_capacity(index_of(device)),
            native.driver.fake_used(index_of(device)),
        )
        return max(0, total - used), total

    def memory_allocated(device=None):
        return native.driver.fake_used(index_of(device))

    def memory_stats(device=None):
        used = memory_allocated(device)
        return {f"{kind}_bytes.all.current": used for kind in ("active", "reserved", "allocated")}

    def properties(device=None):
        index = index_of(device)
        return types.SimpleNamespace(name=f"Fake GPU {index}", major=CAPABILITY[0],
                                     minor=CAPABILITY[1], multi_processor_count=1, gcnArchName="",
                                     total_memory=native.driver.fake_capacity(index),
                                     is_integrated=0, L2_cache_size=1 << 20)

    cudart = types.SimpleNamespace(
        cudaHostRegister=lambda pointer, size, flags: native.driver.cuMemHostRegister(
            pointer, size, flags),
        cudaHostUnregister=lambda pointer: native.driver.cuMemHostUnregister(pointer))

    replacements = {
        "Stream": Stream, "Event": Event, "device": DeviceContext, "stream": stream_context,
        "set_stream": set_stream, "current_stream": current_stream,
        "default_stream": default_stream, "is_available": lambda: True,
        "is_initialized": lambda: True, "_lazy_init": lambda: None,
        "device_count": lambda: native.driver.fake_count(),
        "current_device": lambda: native.driver.fake_current(),
        "set_device": lambda device: native.driver.fake_exchange(index_of(device)) and None,
        "synchronize": lambda device=None: native.device.fake_finish_all(),
        "get_device_properties": properties,
        "get_device_name": lambda device=None: properties(device).name,
        "get_device_capability": lambda device=None: CAPABILITY,
        "is_bf16_supported": lambda *args, **options: True, "mem_get_info": mem_get_info,
        "memory_stats": memory_stats, "memory_allocated": memory_allocated,
        "memory_reserved": memory_allocated,
        "max_memory_allocated": lambda device=None: native.driver.fake_peak(index_of(device)),
        "max_memory_reserved": lambda device=None: native.driver.fake_peak(index_of(device)),
        "reset_peak_memory_stats": lambda device=None: native.driver.fake_reset_peaks(),
        "memory_summary": lambda *args, **options: "fake GPUs",
        "get_allocator_backend": lambda: "native",
        "set_per_process_memory_fraction": lambda fraction, device=None: None,
        "empty_cache": lambda: None, "ipc_collect": lambda: None, "cudart": lambda: cudart,
        "manual_seed": lambda seed: None, "manual_seed_all": lambda seed: None,
        "is_current_stream_capturing": lambda: False, "_sleep": lambda cycles: None
    }
    for name, value in replacements.items():
        setattr(torch.cuda, name, value)
    torch.cuda.memory.memory_summary = torch.cuda.memory_summary
    # bitsandbytes asks for it
    torch._C._cuda_getCurrentRawStream = lambda device: native.device.fake_stream(device)
    torch.version.cuda = CUDA_VERSION
    _let_torchvision_be_imported()


def _let_torchvision_be_imported():
    """The shim of the developers' environment helps a torch without CUDA, as this one still is,
    whatever its version says."""
    shim = sys.modules.get("featherweight_cpu_torch_shim")
    if shim is not None:
        shim._torch_is_cpu = lambda: True  # pyright: ignore[reportAttributeAccessIssue]
